"""Training from sums of cells sees the bits that training from the full records sees."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import folders
from rdm_jax.data.augment import mirror
from rdm_jax.data.cell_sums import sums_of
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.modes import run
from rdm_jax.runtime import sharding
from rdm_jax.stage_datasets import open_sets
from rdm_jax.training import metric_writer
from rdm_jax.training.loop import Trainer
from rdm_jax.training.program import PROGRAMS
from tests.support.configs import tiny_config, write_images

BATCH, CLASSES, FULL, CELL = 8, 2, (16, 16, 3), 4


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def device_sums(pixels, cell):
    return jnp.asarray(sums_of(pixels, cell))


def assert_same_bits(tree, other):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), tree, other)
    )


@pytest.mark.parametrize("cell", [2, 3, 4, 16, 24])
@pytest.mark.parametrize("compiled", [True, False])
def test_means_of_pixels_and_of_sums_have_the_same_bits(cell, compiled):
    wrap = jax.jit if compiled else lambda function: function
    pixels = images(6, 48, 96, 3)
    full = wrap(lambda x: Pixels().encode(x, cell))(jnp.asarray(pixels))
    assert_same_bits(full, jax.jit(lambda x: Pixels().encode(x, cell))(pixels))
    assert_same_bits(full, wrap(Pixels(cell).encode)(device_sums(pixels, cell)))
    exact = sums_of(pixels, cell).astype(np.float64) / (127.5 * cell**2) - 1
    np.testing.assert_allclose(full, exact, rtol=0, atol=2**-23)


def test_sums_may_be_pooled_further():
    pixels = images(6, 48, 96, 3)
    full = Pixels().encode(jnp.asarray(pixels), 12)
    for cell in (2, 3, 4, 6):
        assert_same_bits(full, Pixels(cell).encode(device_sums(pixels, cell), 12 // cell))


def test_means_of_every_sum_have_the_same_bits():
    """All 1,021 sums of 2 x 2 pixels; black is -1, white is 1, and decoding undoes encoding."""
    sums = np.arange(4 * 255 + 1)
    pixels = np.stack([(sums + i) // 4 for i in range(4)], -1).astype(np.uint8)
    pixels = pixels.reshape(-1, 2, 2, 1)
    np.testing.assert_array_equal(sums_of(pixels, 2).ravel(), sums)
    full = jax.jit(lambda x: Pixels().encode(x, 2))(pixels)
    assert_same_bits(full, jax.jit(Pixels(2).encode)(sums_of(pixels, 2)))
    assert full[0] == -1 and full[-1] == 1 and (np.diff(full.ravel()) > 0).all()
    rounded = np.asarray(Pixels().decode(full)).ravel()
    off = np.abs(rounded - sums / 4)
    assert off.max() <= 0.5  # halves are rounded either way
    np.testing.assert_array_equal(rounded[::4], sums[::4] // 4)


def test_pixels_have_the_bits_that_they_had():
    """Stages that see whole records: x / 127.5 - 1, as ever."""
    pixels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    for wrap in (jax.jit, lambda function: function):
        former = wrap(lambda x: x.astype(jnp.float32) / 127.5 - 1)(pixels)
        assert_same_bits(former, wrap(Pixels().encode)(pixels))


def test_flips_have_the_same_bits():
    pixels, keys = images(16, 48, 96, 3), jax.random.split(jax.random.key(0), 16)
    full = jax.jit(lambda x: mirror(Pixels().encode(x, 4), keys))(pixels)
    assert_same_bits(full, jax.jit(lambda x: mirror(Pixels(4).encode(x), keys))(sums_of(pixels, 4)))


@functools.cache
def program(cell, mode, flip, augment, devices=2):
    stage = tiny_config("images").stage(1)
    training = dataclasses.replace(stage.training, flip=flip, augment=augment, batch_size=BATCH)
    stage = dataclasses.replace(stage, training=training)
    mesh = sharding.make_mesh(-1, 1, jax.devices()[:devices])
    shape = (FULL[0] // cell, FULL[1] // cell, FULL[2])
    made = PROGRAMS[mode](stage, shape, CLASSES, jax.random.key(1), mesh, cell=cell)
    made.compile()
    return made


@pytest.mark.parametrize(
    "mode, flip, augment",
    [
        ("pjit", True, 0.0),
        ("pjit", False, 0.5),
        ("pmap", False, 0.0),
    ],
)
@pytest.mark.second
def test_steps_on_sums_have_the_same_bits(mode, flip, augment):
    """Losses and parameters of three steps from the full records, and from sums."""
    found = []
    for cell in (1, CELL):
        made = program(cell, mode, flip, augment)
        state = made.place(made.init(jax.random.key(0)))
        for number in range(3):
            pixels = images(BATCH, *FULL, seed=number)
            batch = {
                "image": sums_of(pixels, cell),
                "label": np.arange(BATCH, dtype=np.int32) % CLASSES,
                "position": np.arange(BATCH, dtype=np.int32),
            }
            state, metrics = made(state, made.put(batch))
            found.append(jax.device_get(metrics))
        found.append(jax.device_get(made.whole(state)))
    assert_same_bits(found[:4], found[4:])
    assert len({float(metrics["loss"]) for metrics in found[:3]}) == 3


def test_trainer_reads_sums_where_they_are(tmp_path):
    write_images(tmp_path / "images")
    config = tiny_config(tmp_path / "images")
    sets = open_sets(config, [1, 2])
    held_out, images = sets[1].split(4)
    for source, held in ((sets[1], None), (images, held_out)):
        trainer = Trainer(config, 1, source, tmp_path / "stage1", held)
        assert (trainer.source.cell, trainer.source.image_shape) == (2, (4, 4, 3))
        assert (trainer.objective.pool, trainer.objective.representation) == (1, Pixels(2))
    assert Trainer(config, 2, sets[2], tmp_path / "stage2").source is sets[2]


def numbers(lines):
    names = ("loss", "grad_norm", "validation_loss")
    return [line[name] for line in lines for name in names if name in line]


@pytest.mark.long
def test_run_is_the_same_with_sums_without_and_half_way(tmp_path, caplog, monkeypatch):
    """Losses and the last checkpoint's identities; sums come at half the run.

    The means have the same bits, but each run is a program of its own, and the compiler may add up
    its gradients in another order: float32's rounding of these sums is left.
    """
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    caplog.set_level("INFO")
    write_images(tmp_path / "images")
    config = tiny_config(tmp_path / "images", preview_every=0)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, held_out=4, cache_gib=0.0)
    )
    prepared, says = tmp_path / "images_prepared", "stage1 reads the full records, 4 times"
    run(config, tmp_path / "sums", mode="train", stage=1)
    assert says not in caplog.text
    shutil.rmtree(prepared / "sums_2x2")
    run(config, tmp_path / "full", mode="train", stage=1)
    assert says in caplog.text and not (prepared / "sums_2x2").exists()
    half = dataclasses.replace(config.stage(1).training, images=80)
    run(config.with_stage(1, training=half), tmp_path / "both", mode="train", stage=1)
    run(config, tmp_path / "both", mode="prepare")
    caplog.clear()
    run(config, tmp_path / "both", mode="train", stage=1)
    assert says not in caplog.text and "stage1: resuming from 80 images" in caplog.text
    sums, full, both = (
        list(metric_writer.read(tmp_path / name / "stage1" / "metrics.jsonl"))
        for name in ("sums", "full", "both")
    )
    for lines in (sums, both):
        assert [line["step"] for line in lines] == [line["step"] for line in full]
        np.testing.assert_allclose(numbers(lines), numbers(full), rtol=1e-6)
    abouts = [
        folders.read_about(tmp_path / name / "stage1/checkpoints/20")
        for name in ("sums", "full", "both")
    ]
    for field in ("images", "validated_on", "data"):
        assert abouts[0][field] == abouts[1][field] == abouts[2][field]
    validated = [about["validation_loss"] for about in abouts]
    np.testing.assert_allclose(validated, validated[0], rtol=1e-6)
