"""Kinds of networks, processes, samplers and conditions that are defined outside the package."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rdm_jax.config import Config, Stage, extend, parse, to_dict, validate
from rdm_jax.config.codec import choices, field_types
from rdm_jax.config.load import load_config
from rdm_jax.diffusion.guidance import ClassifierFree
from rdm_jax.diffusion.processes import FromNoise
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.models.backbone import Shapes
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least, bounds_of, positive
from rdm_jax.sampling.stage_sampler import StageSampler
from rdm_jax.training.count import Count
from rdm_jax.training.program import build_objective
from rdm_jax.training.step import init_state, make_step

SIZE, CHANNELS, CLASSES, BATCH = (4, 6), 3, 5, 8
FIELDS = ("network", "process", "sampler", "condition")


class PixelwiseNetwork(nnx.Module):
    """A 1x1 convolution of the image, plus an embedding of the condition."""

    def __init__(self, shapes: Shapes, width: int, *, rngs: nnx.Rngs):
        self.inner = nnx.Linear(shapes.channels_in, width, dtype=jnp.float32, rngs=rngs)
        self.outer = nnx.Linear(width, shapes.channels_out, dtype=jnp.float32, rngs=rngs)
        self.embed = (
            nnx.Linear(shapes.condition["code"].shape[0], width, dtype=jnp.float32, rngs=rngs)
            if shapes.condition is not None
            else None
        )

    def __call__(self, x, noise_label, condition=None, augment_label=None, dropout_keys=None):
        h = self.inner(x) + noise_label[:, None, None, None]
        if self.embed is not None and condition is not None:
            h = h + self.embed(condition["code"])[:, None, None]
        return self.outer(nnx.silu(h))


@dataclasses.dataclass(frozen=True)
class Pixelwise:
    """A family of networks."""

    condition_parameters: typing.ClassVar[tuple[str, ...]] = ("embed",)
    width: int = at_least(1, default=8)
    augment_labels: int = 0
    dtype: str = "float32"
    remat: str = "none"

    @property
    def stride(self) -> int:
        return 1

    def build(self, shapes: Shapes, *, rngs: nnx.Rngs) -> nnx.Module:
        return PixelwiseNetwork(shapes, self.width, rngs=rngs)

    def check(self, path: str) -> None:
        if self.width == 13:
            raise InputError(f"{path}.width=13 is unlucky", "Use 12.")


@dataclasses.dataclass(frozen=True)
class FlatProcess(FromNoise):
    """sigma uniform between 0 and `sigma_max`."""

    sigma_max: float = positive(default=2.0)

    def sigma(self, level):
        return 1e-3 + self.sigma_max * level

    def weight(self, sigma):
        return jnp.ones_like(sigma)


@dataclasses.dataclass(frozen=True)
class Euler(Heun):
    """Euler's method."""

    order: int = 1


@dataclasses.dataclass(frozen=True)
class BinaryCode:
    """The bits of the class index: a tree with one array."""

    bits: int = at_least(1, default=3)

    def bound(self, classes: int) -> "BinaryCode":
        return self

    @property
    def spec(self):
        return {"code": jax.ShapeDtypeStruct((self.bits,), jnp.float32)}

    @property
    def inputs(self):
        return {"label": jax.ShapeDtypeStruct((), jnp.int32)}

    def encode(self, batch):
        labels = batch["label"]
        bits = (labels[:, None] >> jnp.arange(self.bits)) % 2
        return {"code": jnp.where(labels[:, None] < 0, 0.5, bits.astype(jnp.float32))}

    def null(self, condition):
        return jax.tree.map(lambda code: jnp.full_like(code, 0.5), condition)

    def drop(self, condition, keys, rate):
        dropped = jax.vmap(jax.random.uniform)(keys) < rate
        null = self.null(condition)
        return jax.tree.map(lambda n, c: jnp.where(dropped[:, None], n, c), null, condition)


@dataclasses.dataclass(frozen=True)
class Brighter:
    """Guidance that adds a number to every denoised image."""

    by: float = at_least(0, default=0.5)
    guide: typing.ClassVar[str] = ""
    passes: typing.ClassVar[int] = 1
    needs_null: typing.ClassVar[bool] = False

    def check(self, path: str) -> None:
        if self.by == 13:
            raise InputError(f"{path}.by=13.0 is unlucky", "Use 12.")

    def transform(self, conditional, null, guide):
        return lambda x, sigma, condition: conditional(x, sigma, condition) + self.by


KINDS = {"network": Pixelwise, "process": FlatProcess, "sampler": Euler, "condition": BinaryCode}


@pytest.fixture
def extended():
    """Adds these kinds to the config, and removes them after the test."""
    for field, cls in KINDS.items():
        extend(field, cls)
    yield
    for field, cls in KINDS.items():
        Stage.__dataclass_fields__[field].metadata["kinds"].remove(cls)
        assert cls not in choices(field_types(Stage)[field])


def stage_of(**changes) -> Stage:
    kinds = {field: cls() for field, cls in KINDS.items()}
    kinds["sampler"] = Euler(steps=4, sigma_max=3.0)
    return Stage(resolution=SIZE, **{**kinds, "guidance": 2.0, **changes})


def trained(stage: Stage):
    """The network and its parameters after one step."""
    objective = build_objective(stage, (*SIZE, CHANNELS), CLASSES)
    optimizer = optax.adam(1e-2)
    step = make_step(
        objective,
        optimizer,
        jax.random.key(0),
        count=Count(BATCH),
        accumulate=2,
        ema_halflife=100.0,
        ema_rampup=0.0,
    )
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (BATCH, *SIZE, CHANNELS), np.uint8),
        "label": random.integers(0, CLASSES, BATCH).astype(np.int32),
        "position": np.arange(BATCH, dtype=np.int32),
    }
    before = init_state(objective.network.init(jax.random.key(1)), optimizer)
    state, metrics = jax.jit(step)(before, batch)
    assert np.isfinite(float(metrics["loss"])) and int(state.skipped) == 0
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, state.params)
    assert all(jax.tree.leaves(moved))
    return objective.network, state.params


def sampled(stage: Stage, network, params, labels) -> np.ndarray:
    sampler = StageSampler(stage, network, number=1, channels=CHANNELS, classes=CLASSES, run_seed=0)
    seeds = jnp.arange(len(labels), dtype=jnp.uint32)
    images, finite = sampler(params, None, {"label": jnp.asarray(labels, jnp.int32)}, seeds)
    assert bool(finite.all()) and images.shape == (len(labels), *SIZE, CHANNELS)
    return np.asarray(images)


def test_extended_kinds_train_and_sample(extended):
    config = Config(stages=(stage_of(),))
    validate.check_config(config)
    validate.check_classes(config, tuple("abcde"), [1])
    saved = to_dict(config)
    assert [saved["stage1"][field]["kind"] for field in FIELDS] == [
        "pixelwise",
        "flat",
        "euler",
        "binarycode",
    ]
    assert parse(saved) == config
    stage = config.stage(1)
    assert stage.nfe == 4
    network, params = trained(stage)
    images = sampled(stage, network, params, [0, 3, -1])
    others = sampled(stage, network, params, [1, 3, -1])
    assert np.any(images[0] != others[0])
    np.testing.assert_array_equal(images[1:], others[1:])


@pytest.mark.parametrize("field", FIELDS)
def test_extended_kind_works_with_package(extended, field):
    """One kind from outside with the package's own kinds, except those that depend on each
    other."""
    own = Stage(resolution=SIZE)
    kept = {"network": Pixelwise(), "condition": BinaryCode()}
    parts = {"sampler": dataclasses.replace(own.sampler, steps=3), **kept}
    parts[field] = KINDS[field]()
    if field == "sampler":
        parts[field] = Euler(steps=3)
    stage = dataclasses.replace(own, **parts)
    network, params = trained(stage)
    sampled(stage, network, params, [0, 1])


def test_extended_bounds_and_checks_apply(extended):
    for changes, says in (
        ({"process": FlatProcess(sigma_max=-1.0)}, "stage1.process.sigma_max=-1.0.*positive"),
        ({"network": Pixelwise(width=0)}, "stage1.network.width=0.*1 or more"),
        ({"network": Pixelwise(width=13)}, "stage1.network.width=13 is unlucky. Use 12"),
    ):
        with pytest.raises(InputError, match=says):
            validate.check_config(Config(stages=(stage_of(**changes),)))
    assert str(bounds_of(Pixelwise)["width"]) == "1 or more"


def test_extended_guidance_is_one_of_a_list(extended):
    kinds = Stage.__dataclass_fields__["guidance"].metadata["kinds"]
    extend("guidance", Brighter)
    try:
        stage = stage_of(guidance=(Brighter(0.25), ClassifierFree(2.0)))
        config = Config(stages=(stage,))
        saved = to_dict(config)
        assert [entry["kind"] for entry in saved["stage1"]["guidance"]] == [
            "brighter",
            "classifierfree",
        ]
        assert parse(saved) == config and stage.passes == (8,)
        validate.check_config(config)
        network, params = trained(stage)
        # Classifier-free guidance keeps what both passes have in common.
        plain = sampled(stage_of(guidance=2.0), network, params, [0, 3])
        brighter = sampled(stage, network, params, [0, 3])
        assert np.mean(brighter - plain) > 0.1
        for by, says in (
            (-1.0, r"guidance\[0\]\.by=-1.0.*0 or more"),
            (13.0, "by=13.0 is unlucky"),
        ):
            with pytest.raises(InputError, match=says):
                validate.check_config(Config(stages=(stage_of(guidance=Brighter(by)),)))
    finally:
        kinds.remove(Brighter)


def test_unknown_kind_is_refused_with_known_kinds():
    values = to_dict(Config())
    values["stage1"]["sampler"] = {"kind": "euler", "steps": 4}
    with pytest.raises(InputError, match="stage1.sampler.kind='euler'.*'heun' or 'relayheun'") as e:
        parse(values)
    assert "import the module" in e.value.fix


def test_extend_refuses_invalid_kinds(extended):
    extend("sampler", Euler)  # once more: nothing changes
    assert choices(field_types(Stage)["sampler"]).count(Euler) == 1
    other = dataclasses.make_dataclass("Euler", [], frozen=True)
    other.__module__ = "another"
    for field, cls, says in (
        ("sampler", other, "already has the kind 'euler'"),
        ("checkpoint", Euler, "cannot be extended"),
        ("guidance", Euler, "Euler has no guide, passes, .*, as Guidance does"),
        ("sampler", int, "cannot be extended"),
        ("sampler", Pixelwise, "Pixelwise has no walks, levels, .*, as Sampler does"),
    ):
        with pytest.raises(ValueError, match=says):
            extend(field, cls)


OWN = """
import dataclasses

import rdm_jax
from rdm_jax.config import extend
from rdm_jax.diffusion.samplers import Heun


@dataclasses.dataclass(frozen=True)
class Slow(Heun):
    halves: int = {halves}


extend("sampler", Slow)


def get_config():
    return rdm_jax.load_config("digits", stage1={{"sampler": Slow(steps=5)}})
"""


def test_config_file_that_extends_can_be_loaded_again(tmp_path):
    path, kinds = tmp_path / "own.py", Stage.__dataclass_fields__["sampler"].metadata["kinds"]
    before = list(kinds)
    try:
        for halves in (1, 2):
            path.write_text(OWN.format(halves=halves))
            sampler = load_config(str(path)).stages[0].sampler
            assert (sampler.steps, sampler.halves) == (5, halves)
            assert kinds == [*before, type(sampler)]
    finally:
        kinds[:] = before
