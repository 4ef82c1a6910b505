"""Pictures of what a stage has learnt so far, during its training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rdm_jax import sharding
from rdm_jax.config import Config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.sampling import pictures
from rdm_jax.sampling.sampler import evaluations, stage_sampler, to_uint8
from rdm_jax.terminal import log
from rdm_jax.training.step import to_float


def make_preview(config: Config, number: int, source: ImageSet) -> Callable[[Any, Path], None]:
    """A function (params, path) that draws samples of one stage.

    A relay stage starts from real images' means, so that its picture does not depend on the stages before it.
    """
    stage, channels, classes = config.stages[number - 1], source.image_shape[-1], len(source.class_names)
    kwargs = {"number": number, "channels": channels, "classes": classes, "run_seed": config.seed}
    sampler = stage_sampler(stage, stage.build(channels, classes), **kwargs)
    batch_size, mesh = config.sampling.batch_size, sharding.data_mesh()
    seeds = np.arange(batch_size)
    labels, low = (seeds % classes).astype(np.int32) if classes else np.full(batch_size, -1, np.int32), None
    if number > 1:
        real = source.batch(np.linspace(0, len(source) - 1, batch_size).astype(int))  # of all classes, if it is sorted
        labels, pool = real["label"], source.image_shape[0] // config.stages[number - 2].resolution[0]
        low = sharding.put_batch(np.asarray(to_float(jnp.asarray(real["image"]), pool)), mesh)
    seeds, labels = sharding.put_batch((seeds.astype(np.uint32), labels), mesh)

    def preview(params: Any, path: Path) -> None:
        images = np.asarray(to_uint8(sampler(params, low, labels, seeds)))
        pictures.save_picture(pictures.plain_grid(images, columns=10), path)

    log.info("stage%d: previews of %d samples, %d network evaluations an image", number, batch_size, evaluations(stage))
    return preview
