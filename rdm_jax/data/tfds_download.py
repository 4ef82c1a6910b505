"""Downloads and prepares data sets of tensorflow-datasets."""

import contextlib
import io
import re
from pathlib import Path

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import

tfds = lazy_import("tensorflow_datasets", "data")


def prepared_by_tfds(name: str) -> Path:
    """The directory of a data set of tensorflow-datasets, downloaded and prepared if needed.

    Raises:
      InputError: the data set is unknown, or cannot be prepared here.
    """
    fix = (
        "Prepare it once in an environment with TensorFlow (`pip install tensorflow "
        "tensorflow-datasets array_record importlib_resources`, then "
        f'`python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        "file_format='array_record').download_and_prepare()\"`; with another TFDS_DATA_DIR, if it "
        "exists in another format), or use a folder: or zip: of its images."
    )
    try:
        builder = tfds.builder(name, file_format="array_record")
        if not builder.is_prepared():
            log.info("data: tensorflow-datasets prepares %s in %s", name, builder.data_dir)
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        return Path(builder.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"tensorflow-datasets has no data set {name!r}", "Use a name of `tfds.list_builders()`."
        ) from error
    except ImportError as error:
        raise InputError(
            f"tensorflow-datasets needs a missing package for {name!r} ({error})", fix
        ) from error
    # Downloads, checksums, manual downloads, formats: the library has an error for each.
    except Exception as error:
        raise InputError(
            f"tensorflow-datasets cannot prepare {name!r} ({_short(error)})", fix
        ) from error


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:600]
