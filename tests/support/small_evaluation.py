"""What the tests of evaluation share: a config in small, its images, and features that are means of
pixels."""

import copy
import dataclasses

import numpy as np

from rdm_jax.config import Evaluation
from rdm_jax.data.image_sets import ImageSet, open_direct
from rdm_jax.data.images import ImageSpec
from rdm_jax.evaluation.evaluator import Evaluator
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.runtime.signals import StopOnSignal
from tests.support.configs import tiny_config

SIZE = 5


def config_of(source, *, held_out: int = 20, **evaluation):
    config = tiny_config(source)
    data = dataclasses.replace(config.data, directory="", held_out=held_out)
    values = {
        "features": "classifier",
        "images": "held_out, stage1, samples",
        "batch_size": 8,
        "seeds": "0-19",
    } | evaluation
    return dataclasses.replace(config, data=data, evaluation=Evaluation(**values))


def parts_of(config) -> tuple[ImageSet, ImageSet | None]:
    form = ImageSpec(*config.stages[-1].resolution, channels=3)
    return open_direct(config.data.source, form, cache_bytes=2**30).split(config.data.held_out)


def means(params, images):
    """Features that are nothing but means of some pixels."""
    return {
        "features": images.reshape(len(images), -1)[:, : 8 * SIZE]
        .reshape(len(images), SIZE, 8)
        .mean(-1)
        / params
    }


SPACE = FeatureSpace("means", "of pixels", {"features": SIZE}, np.float32(64), means)


def measured(config, relay, folder, space=SPACE, stop=None):
    """evaluation.json of the config, with a feature extractor of our own, in a folder of its
    own."""
    relay = copy.copy(relay)
    relay.config = config
    evaluator = Evaluator(config, *parts_of(config), folder, stop or StopOnSignal(), space)
    return evaluator.run(relay)
