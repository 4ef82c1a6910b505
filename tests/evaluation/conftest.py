import jax
import numpy as np
import pytest

from rdm_jax.checkpoints import store
from rdm_jax.config import to_dict
from rdm_jax.evaluation import classifier
from rdm_jax.sampling.pipeline import RelayPipeline
from tests.support.configs import tiny_config, write_images
from tests.support.small_evaluation import config_of


@pytest.fixture(autouse=True)
def quick_classifier(request, monkeypatch):
    """Classifiers are trained for a few steps, as most tests ask nothing of their accuracy."""
    if request.module.__name__.rpartition(".")[2] != "test_classifier":
        monkeypatch.setattr(classifier, "IMAGES_SHOWN", 300)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "images"
    write_images(folder, count=60)
    return folder


@pytest.fixture(scope="session")
def workdir(source, tmp_path_factory):
    """A run whose stages have parameters that are random, and no longer the zero output of
    initialisation."""
    workdir, config = tmp_path_factory.mktemp("run"), tiny_config(source)
    for number, stage in enumerate(config.stages, 1):
        params = jax.jit(stage.build(3, 2).init)(jax.random.key(number))
        nudged = jax.tree.map(
            lambda x: (
                np.asarray(x) + 0.1 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
            ),
            params,
        )
        checkpoints = store.Checkpoints(workdir / f"stage{number}" / "checkpoints")
        about = {"stage": to_dict(config)[f"stage{number}"], "classes": ["a", "b"], "seed": 0}
        checkpoints.save_ema(0, nudged, about)
        checkpoints.close()
    return workdir


@pytest.fixture(scope="session")
def relay(source, workdir):
    """Compiled once."""
    return RelayPipeline(config_of(source), workdir)
