"""Data sets of tensorflow-datasets as sources."""

from rdm_jax.data.captions import COLUMNS, plain, usable
from rdm_jax.data.readers import Tfds
from rdm_jax.data.source import Source
from rdm_jax.data.tfds_download import prepared_by_tfds
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import

tfds = lazy_import("tensorflow_datasets", "data")


def by_tfds(name: str, split: str = "train", captions: str = "none") -> Source:
    """The source of a data set, whose label and text are its classes and captions.

    Args:
      name: of the data set.
      split: such as 'train', or 'train+test[:10%]'.
      captions: 'none', or 'auto' for the first text feature of `captions.COLUMNS`.

    Raises:
      InputError: it cannot be prepared, has no images, or no text where it is asked for.
    """
    reader = Tfds(prepared_by_tfds(name), split)
    features = reader.features
    if not isinstance(features.get("image"), tfds.features.Image):
        raise InputError(
            f"the data set {name!r} has no feature 'image' but {', '.join(features)}",
            "Use a data set of images.",
        )
    label = features.get("label")
    class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    source = Source([f"{i:08d}" for i in range(len(reader))], reader, class_names)
    if captions == "none":
        return source
    column = next((c for c in COLUMNS if isinstance(features.get(c), tfds.features.Text)), None)
    if column is None:
        raise InputError(
            f"the data set {name!r} has no text feature {' or '.join(COLUMNS)}",
            "Use config.data.captions='none'.",
        )
    found = {name: plain(reader.text(name, column)) for name in source.names}
    return source.captioned(usable(source.names, found, {}, f"in {column!r}"))
