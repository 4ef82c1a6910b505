"""What the training of a stage takes: operations, memory and communication, counted without
compiling."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from rdm_jax.config import Config, Stage
from rdm_jax.models.functional import has_equations
from rdm_jax.plan.chips import Chip
from rdm_jax.runtime import sharding
from rdm_jax.runtime.random_streams import root_key
from rdm_jax.training.count import Count
from rdm_jax.training.program import build_objective, build_optimizer
from rdm_jax.training.step import TrainState, init_state


def residual_bytes(function: Callable, params: Any, *abstract_args: Any) -> int:
    """Bytes of what is kept from the forward to the backward pass of a scalar function, parameters
    and arguments left out.

    It is what JAX keeps. The compiler is free to compute cheap parts of it again, and pads what it
    lays out.
    """
    jaxpr = jax.make_jaxpr(lambda p, *args: jax.vjp(lambda q: function(q, *args), p)[1])(
        params, *abstract_args
    ).jaxpr
    given = set(map(id, (*jaxpr.invars, *jaxpr.constvars)))
    kept = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given}  # some more than once
    return sum(_bytes(aval) for aval in kept.values())


def block_bytes(function: Callable, *abstract_args: Any) -> int:
    """Bytes that the largest of the blocks that are rematerialised keeps while its backward pass
    runs; 0 without any."""
    blocks: dict[Any, Any] = {}
    _find_blocks(jax.make_jaxpr(function)(*abstract_args).jaxpr, blocks)
    return max((_block_bytes(jaxpr) for jaxpr in blocks.values()), default=0)


def _find_blocks(jaxpr: Any, found: dict[Any, Any]) -> None:
    """Blocks by their inputs' shapes: those of the same shapes are taken for the same."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("checkpoint", "remat", "remat2"):
            found[tuple(str(v.aval) for v in equation.invars)] = equation.params["jaxpr"]
            continue
        for value in filter(has_equations, equation.params.values()):
            _find_blocks(getattr(value, "jaxpr", value), found)


def _block_bytes(jaxpr: Any) -> int:
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, ()))
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
    return residual_bytes(lambda inputs: run(*inputs), inputs)


def _bytes(leaf: Any) -> int:
    """Of an abstract array; random keys, of which there are few, count for what they hide."""
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective operation of a step.

    Attributes:
      kind: as in `sharding.collectives`.
      size: bytes of the results on a chip, as there.
      chips: that take part in one such operation.
    """

    kind: str
    size: int
    chips: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, at least."""
        others = self.chips - 1
        shares = {
            "all-reduce": 2 * others / self.chips,
            "all-gather": others / self.chips,
            "reduce-scatter": float(others),
        }
        return self.size * shares[self.kind]


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """What the training of one stage takes.

    Attributes:
      parameters: their number.
      multiply_adds: of the network, forward, for an image.
      images: that a chip works on at a time.
      flops: a step; forward and twice that backward, what is computed again left out.
      state: bytes a chip of parameters, their average, the optimizer's state.
      gradients: bytes a chip.
      copies: bytes a chip of the parameters once more, whole and as computed with, where they are
        kept in another way.
      activations: bytes a chip that the backward pass waits for, an estimate.
      exchanges: what chips tell each other in a step.
    """

    parameters: int
    multiply_adds: int
    images: int
    flops: int
    state: int
    gradients: int
    copies: int
    activations: int
    exchanges: tuple[Exchange, ...]

    @property
    def fixed(self) -> int:
        """Bytes a chip, however many images it works on."""
        return self.state + self.gradients + self.copies

    @property
    def memory(self) -> int:
        """Bytes a chip."""
        return self.fixed + self.activations

    @property
    def sent(self) -> float:
        """Bytes a chip and step."""
        return sum((exchange.sent for exchange in self.exchanges), 0.0)


def training_cost(config: Config, number: int, chips: int, classes: int) -> TrainingCost:
    """What stage `number` (from 1) takes on so many chips, in the config's way of sharing them."""
    stage, shape = config.stage(number), image_shape(config, number)
    training, sizes = (
        stage.training,
        sharding.mesh_sizes(config.parallel.data, config.parallel.fsdp, chips),
    )
    state = _state(_plain(stage), shape[-1], classes)
    state = sharding.by_rules(
        state, AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    )
    images = training.batch_size // training.accumulate // chips
    forward = _forward(_plain(stage), shape[-1], classes)
    dtypes, jitted = _dtypes(_untrained(stage), shape[-1], classes), config.parallel.mode == "pjit"
    copied = lambda leaf, dtype: not leaf.sharding.is_fully_replicated or leaf.dtype != dtype  # noqa: E731
    copies = jax.tree.map(
        lambda leaf, dtype: leaf.size * dtype.itemsize * copied(leaf, dtype), state.params, dtypes
    )
    return TrainingCost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        multiply_adds=forward,
        images=images,
        flops=2 * 3 * forward * training.batch_size,
        state=shard_bytes(state),
        gradients=shard_bytes(state.params)
        * (1 if training.accumulate == 1 else 2),  # of the part, and their sum
        copies=sum(jax.tree.leaves(copies)),
        activations=images * _activations(_untrained(stage), shape, classes),
        # `pmap` averages once, at the end; what the compiler adds for `jit` is where a part's
        # gradients are made.
        exchanges=_exchanges(
            state.params, dtypes, sizes, training.accumulate if jitted else 1, narrow=jitted
        ),
    )


def shard_bytes(tree: Any) -> int:
    """Bytes a chip of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def image_shape(config: Config, number: int) -> tuple[int, int, int]:
    """Of the records that a stage is trained on: the last stage's, or its own where it has a source
    of its own."""
    stage = config.stage(number)
    return (*(stage if stage.source else config.stages[-1]).resolution, config.data.channels)


def _untrained(stage: Stage) -> Stage:
    """The stage without what changes neither the network nor the loss, so that what was traced is
    found again."""
    return dataclasses.replace(
        stage, training=dataclasses.replace(stage.training, batch_size=1, accumulate=1, images=1)
    )


def _plain(stage: Stage) -> Stage:
    """The same without what changes neither parameters nor multiply-adds; float32 also for
    `multiply_adds`' sake."""
    return dataclasses.replace(
        _untrained(stage), network=dataclasses.replace(stage.network, dtype="float32", remat="none")
    )


@functools.lru_cache(maxsize=64)
def _state(stage: Stage, channels: int, classes: int) -> TrainState:
    """Shapes of the training state."""
    optimizer = build_optimizer(stage.training, Count(stage.training.batch_size))
    return jax.eval_shape(
        lambda params: init_state(params, optimizer), stage.build(channels, classes).abstract
    )


@functools.lru_cache(maxsize=64)
def _dtypes(stage: Stage, channels: int, classes: int) -> dict[str, Any]:
    """What each parameter is computed with."""
    return stage.build(channels, classes).dtypes


@functools.lru_cache(maxsize=64)
def _forward(stage: Stage, channels: int, classes: int) -> int:
    """Multiply-adds of the network for an image."""
    return stage.multiply_adds(channels, classes)


@functools.lru_cache(maxsize=64)
def _activations(stage: Stage, image_shape: tuple[int, int, int], classes: int) -> int:
    """Bytes kept for the backward pass, an image; with those of the one block that is being
    computed again."""
    objective = build_objective(stage, image_shape, classes)
    # Parameters as they are computed with: their copies are no activations.
    as_computed = lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype)  # noqa: E731
    params = jax.tree.map(as_computed, objective.network.abstract, objective.network.dtypes)
    batch = {
        "image": jax.ShapeDtypeStruct((1, *image_shape), stage.representation.dtype),
        "label": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    keys = jax.eval_shape(lambda: jax.random.split(root_key(0), 1))
    loss = lambda params, batch, keys: objective.loss(params, batch, keys, dropout=True).mean()  # noqa: E731
    again = block_bytes(loss, params, batch, keys) if stage.network.remat == "block" else 0
    return residual_bytes(loss, params, batch, keys) + again


def _exchanges(
    params: Any, dtypes: Any, sizes: tuple[int, int], rounds: int, narrow: bool
) -> tuple[Exchange, ...]:
    """A step's, for gradients and for parameters that are cut.

    Args:
      params: abstract, with their shardings.
      dtypes: what each is computed with.
      rounds: parts of a batch, each of which has its own.
      narrow: gradients travel as what they are computed with, and not as float32.
    """
    data, fsdp = sizes
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(dtypes), strict=True))
    cut = rounds * sum(
        leaf.size * dtype.itemsize for leaf, dtype in pairs if not leaf.sharding.is_fully_replicated
    )
    whole = [
        (leaf.size, dtype if narrow else leaf.dtype)
        for leaf, dtype in pairs
        if leaf.sharding.is_fully_replicated
    ]
    uncut = rounds * sum(size * dtype.itemsize for size, dtype in whole)
    found = (
        Exchange("all-reduce", uncut, data * fsdp),
        Exchange("all-gather", cut, fsdp),
        Exchange("reduce-scatter", cut // fsdp, fsdp),
        Exchange("all-reduce", cut // fsdp, data),
    )
    return tuple(exchange for exchange in found if exchange.size and exchange.chips > 1)


def step_seconds(
    needs: TrainingCost, chip: Chip, chips: int, dtype: str, utilisation: float
) -> float:
    """Seconds a step computes, at a share `utilisation` of the chips' peak, what is computed again
    left out."""
    return needs.flops / (chips * chip.peak(dtype) * utilisation)
