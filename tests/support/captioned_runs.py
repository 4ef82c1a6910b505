"""Runs on captioned images in small: images, an encoder without weights, checkpoints."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from rdm_jax.checkpoints import store
from rdm_jax.config import Config, to_dict
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.text_table import embedded
from rdm_jax.models.conditions import Text
from rdm_jax.sampling import prompts
from rdm_jax.sampling.run_captions import Captions
from rdm_jax.workdir import Workdir
from tests.support.configs import tiny_config
from tests.support.fake_encoder import FakeEncoder

ENCODER = FakeEncoder(tokens=4, width=6)
TEXT = {"encoder": ENCODER.name, "weights_hash": ENCODER.weights_hash, "tokens": 4, "width": 6}


def open_fake(monkeypatch) -> FakeEncoder:
    """Makes pipelines encode prompts by the encoder that is returned."""
    encoder = FakeEncoder(tokens=4, width=6)
    monkeypatch.setattr(prompts, "open_encoder", lambda spec, tokens, field: encoder)
    return encoder


def config_of(classes: bool = False, **sampling) -> Config:
    """Two stages that are conditioned on text."""
    config = tiny_config("images")
    for number in (1, 2):
        config = config.with_stage(number, condition=Text(tokens=4, width=6, classes=classes))
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **sampling))


def captioned(
    captions: Sequence[str],
    encoder: FakeEncoder = ENCODER,
    pixels: UInt8[np.ndarray, "n h w c"] | None = None,
) -> ImageSet:
    """A set in memory with these captions, of two classes in turn; without pixels random 8 x 8."""
    random = np.random.default_rng(len(captions[0]))
    if pixels is None:
        pixels = random.integers(0, 256, (len(captions), 8, 8, 3), np.uint8)
    items = [(image, i % 2) for i, image in enumerate(pixels)]
    images = ImageSet(items, pixels.shape[1:], ("a", "b"))
    images.cache("reading")
    images.add_text(embedded(captions, encoder))
    return images


def write_run(folder: Path, config: Config, text=TEXT, **captions) -> Path:
    """Checkpoints of random parameters, all of which matter, and captions.json."""
    for number, stage in enumerate(config.stages, 1):
        leaves, tree = jax.tree.flatten(stage.build(3, 2).abstract)
        random = np.random.default_rng(number)
        params = [0.2 * random.standard_normal(x.shape).astype("f4") for x in leaves]
        checkpoints = store.Checkpoints(folder / f"stage{number}/checkpoints")
        about = {"stage": to_dict(config)[f"stage{number}"], "classes": ["a", "b"], "seed": 0}
        about |= {"text": text} if text else {}
        checkpoints.save_ema(1, tree.unflatten(params), json.loads(json.dumps(about)))
        checkpoints.close()
    Workdir(folder).write_config(config)
    if captions:
        Captions(**captions).write(Workdir(folder).captions)
    return folder
