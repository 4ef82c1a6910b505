"""Training on captions: what a stage learns from them, what its checkpoints say, refusals."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import folders, store
from rdm_jax.config import Stage, Training, validate
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion import preconditioning
from rdm_jax.models.adm import ADM
from rdm_jax.models.backbone import vector_size
from rdm_jax.models.conditions import Nothing, Text
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training.loop import Trainer
from rdm_jax.training.program import PROGRAMS
from tests.support.captioned_runs import captioned
from tests.support.checkpoints import assert_equal, state, steps
from tests.support.configs import tiny_config
from tests.support.fake_encoder import FakeEncoder
from tests.support.small_networks import parameters
from tests.support.text_networks import NETWORKS, TOKENS, WIDTH, text_batch

NETWORK = {"attention_levels": (0,), "head_channels": 8}
SETTINGS = {
    "images": 4000,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "ema_halflife": 100.0,
    "checkpoint_every": 4000,
    "preview_every": 0,
    "validation": 16,
    "label_dropout": 0.25,
}
CONDITION = Text(tokens=TOKENS, width=WIDTH)
ENCODER = FakeEncoder(TOKENS, WIDTH, name="words", weights_hash="0123")
CAPTIONS = ("pitch black", "white as snow")


def captioned_set(**encoder) -> ImageSet:
    """Flat images of 4x4 pixels: black ones with one caption, white ones with the other."""
    pixels = np.zeros((24, 4, 4, 3), np.uint8)
    pixels[1::2] = 255
    return captioned(CAPTIONS * 12, dataclasses.replace(ENCODER, **encoder), pixels)


def both_captions():
    """The condition of a batch of two, with one caption each."""
    made = ENCODER(CAPTIONS)
    given = {"text": jnp.asarray(made.tokens), "text_length": jnp.asarray(made.lengths)}
    return CONDITION.encode(given)


def config(condition=CONDITION, **training):
    values = tiny_config("nowhere", **SETTINGS | training)
    return values.with_stage(1, condition=condition, network=NETWORK)


def train(directory, values, images):
    trainer = Trainer(values, 1, images, directory)
    trainer.run(StopOnSignal())
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("captions") / "stage1"
    return train(directory, config(), captioned_set())


def newest(directory):
    checkpoints = directory / "checkpoints"
    return checkpoints / str(max(int(each.name) for each in folders.step_folders(checkpoints)))


def denoised(trainer, condition):
    """The mean of what the network denoises from nearly pure noise, the same for all images."""
    path = newest(trainer.directory)
    with contextlib.closing(store.Checkpoints(path.parent, read_only=True)) as checkpoints:
        params, _ = checkpoints.restore_ema(int(path.name), trainer.abstract.ema)
    objective, images = trainer.objective, condition["mask"].shape[0]

    def network(x, c_noise):
        return objective.network.apply(params, x, c_noise, condition)

    denoise = preconditioning.denoiser(network, objective.precondition)
    sigma = 20.0
    x = sigma * jax.random.normal(jax.random.key(0), (1, 4, 4, 3)).repeat(images, 0)
    return np.asarray(denoise(x, jnp.full(images, sigma)).mean((1, 2, 3)))


@pytest.mark.second
def test_training_learns_what_captions_say(trained):
    black, white = denoised(trained, both_captions())
    assert black < -0.8 and white > 0.8


@pytest.mark.second
def test_checkpoints_say_which_captions_they_know(trained):
    text = folders.read_about(newest(trained.directory))["text"]
    wanted = {"encoder": "words", "weights_hash": "0123", "tokens": TOKENS, "width": WIDTH}
    assert text == wanted


@pytest.mark.second
def test_resumed_training_on_captions_has_the_same_bits(tmp_path):
    """Half way, a run goes on with the captions that it would have had."""
    whole, half = config(images=128), config(images=64)
    train(tmp_path / "whole/stage1", whole, captioned_set())
    train(tmp_path / "parts/stage1", half, captioned_set())
    assert steps(tmp_path / "parts") == [4]
    train(tmp_path / "parts/stage1", whole, captioned_set())
    once, twice = (state(tmp_path / name, step=8) for name in ("whole", "parts"))
    assert_equal(once, twice)
    assert any("'text'" in name for name in once)


@pytest.mark.second
def test_captions_are_not_read_by_a_stage_without_them(tmp_path):
    """Its batches and checkpoints are those of images without captions."""
    trainer = train(tmp_path / "stage1", config(Nothing(), images=32), captioned_set())
    assert trainer._program.inputs.keys() == {"image", "label", "position"}
    assert "text" not in folders.read_about(newest(trainer.directory))


@pytest.mark.second
def test_training_with_classes_and_captions(tmp_path):
    both = dataclasses.replace(CONDITION, classes=True)
    trainer = train(tmp_path / "stage1", config(both, images=32), captioned_set())
    assert trainer.objective.condition.spec["vector"].shape == (WIDTH + 2,)
    assert "map_label" in trainer.abstract.params


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"width": 384}, r"stage1\.condition\.width=12 cannot be used.* Use 384, .*\(words\)"),
        ({"tokens": 8}, r"stage1\.condition\.tokens=5 cannot be used.* Use 8, .*\(words\)"),
    ],
)
def test_training_refuses_other_captions(tmp_path, encoder, message):
    with pytest.raises(InputError, match=message):
        Trainer(config(), 1, captioned_set(**encoder), tmp_path)


def test_training_refuses_images_without_captions(tmp_path):
    items = [(np.zeros((4, 4, 3), np.uint8), -1)] * 4
    with pytest.raises(InputError, match="condition.kind='text', but the images have no captions"):
        Trainer(config(), 1, ImageSet(items, (4, 4, 3), ()), tmp_path)


@dataclasses.dataclass(frozen=True)
class OfVectors(ADM):
    """A network that knows vectors alone."""

    def build(self, shapes, *, rngs):
        vector_size(shapes.condition)
        raise AssertionError("it was built")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (JiT(hidden=32, depth=2, heads=2, class_tokens=0), "class_tokens_from=4 is not one of"),
        (ADM(32, (1,), 1, ()), r"attention_levels=\(\) has no block that attends to captions"),
        (OfVectors(), r"takes a condition of one vector per image, .* gives \{.*tokens"),
    ],
    ids=["transformer", "u-net", "other"],
)
def test_config_refuses_networks_that_see_no_captions(network, message):
    """Before the data is prepared."""
    values = tiny_config("nowhere", **SETTINGS)
    values = values.with_stage(
        1, condition=Text(classes=True), network=network, resolution=(16, 16)
    )
    values = values.with_stage(2, resolution=(32, 32))
    with pytest.raises(InputError, match=rf"^config\.stage1\.network.*{message}"):
        validate.check_config(values, evaluates=False)


@pytest.mark.second
def test_resume_refuses_captions_of_another_encoder(trained):
    other = captioned_set(name="letters", weights_hash="4567")
    with pytest.raises(
        InputError, match="stage1 is trained with captions of letters .* knows those of words "
    ):
        train(trained.directory, config(images=6400), other)


@pytest.mark.second
def test_start_from_refuses_captions_of_another_encoder(trained, tmp_path):
    other = captioned_set(weights_hash="4567")
    start_from = str(newest(trained.directory))
    with pytest.raises(InputError, match="stage1 is trained with captions of words .*4567.*0123"):
        train(tmp_path / "stage1", config(start_from=start_from), other)


@pytest.mark.second
@pytest.mark.second
def test_start_from_takes_over_what_is_known_of_captions(trained, tmp_path):
    values = config(start_from=str(newest(trained.directory)), images=16, learning_rate=1e-8)
    trainer = train(tmp_path / "stage1", values, captioned_set())
    black, white = denoised(trainer, both_captions())
    assert black < -0.8 and white > 0.8


def test_multiply_adds_of_captions():
    """Of the tokens' keys and values, the queries, both products and the last layer; the vector."""
    stage, channels, pixels, keys = config().stage(1), 8, 16, TOKENS + 1
    without = dataclasses.replace(stage, condition=Nothing()).multiply_adds(3, 0)
    block = 2 * pixels * channels**2 + 2 * keys * WIDTH * channels + 2 * pixels * keys * channels
    attending = 4  # one block of the encoder, the first in the middle, two of the decoder
    assert stage.multiply_adds(3, 0) - without == attending * block + WIDTH * 4 * channels


BATCH = 16


def program(name, devices=1, fsdp=1, mode="pjit", **options):
    """The program of a stage with captions and classes."""
    network = dataclasses.replace(NETWORKS[name], **options)
    training = Training(batch_size=BATCH, learning_rate=1e-3, warmup=16, epsilon=1e-3)
    condition = dataclasses.replace(CONDITION, classes=True)
    stage = Stage((4, 8), network, training=training, condition=condition)
    mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:devices])
    made = PROGRAMS[mode](stage, (4, 8, 3), 3, jax.random.key(1), mesh)
    made.compile()
    return made


@functools.cache
def first_state(name):
    """Parameters as after some training, so that captions count from the first step."""
    made = program(name)
    state = jax.device_get(made.init(jax.random.key(0)))
    return state.replace(params=jax.device_get(parameters(made.objective.network)))


def stepped(made, name, steps=2):
    state = jax.device_put(first_state(name), sharding.shardings(made.abstract))
    state, losses = made.place(state), []
    for number in range(steps):
        rng = np.random.default_rng(number)
        batch = {
            "image": rng.integers(0, 256, (BATCH, 4, 8, 3), np.uint8),
            "position": np.arange(BATCH, dtype=np.int32),
            **text_batch(rng.integers(0, TOKENS + 1, BATCH), rng.integers(0, 3, BATCH)),
        }
        state, metrics = made(state, made.put(jax.device_get(batch)))
        losses.append(float(metrics["loss"]))
    return jax.device_get(made.whole(state).params), losses


@functools.cache
def on_one_device(name):
    return stepped(program(name), name)


MESHES = [
    pytest.param("context", {"devices": 8, "fsdp": 4}, marks=pytest.mark.second),
    pytest.param(
        "adm", {"devices": 8, "fsdp": 8, "remat": "convolutions"}, marks=pytest.mark.second
    ),
]
MESHES += [
    pytest.param(name, how, marks=pytest.mark.long)
    for name, how in (
        ("context", {"devices": 2, "mode": "pmap"}),
        ("cross", {"devices": 8, "fsdp": 4, "remat": "block"}),
        ("adm", {"devices": 8, "fsdp": 4}),
    )
]


@pytest.mark.parametrize(("name", "how"), MESHES, ids=str)
def test_training_on_captions_is_independent_of_mesh_and_program(name, how):
    made = program(name, **how)
    if "fsdp" in how:
        of_captions = {
            path: leaf.sharding.is_fully_replicated
            for path, leaf in jax.tree_util.tree_leaves_with_path(made.abstract.params)
            if {"text", "cross"} & {key.key for key in path} and path[-1].key == "kernel"
        }
        assert of_captions and not any(of_captions.values())
    params, losses = stepped(made, name)
    wanted, wanted_losses = on_one_device(name)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))
