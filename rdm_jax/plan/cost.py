"""The cost of training a stage: operations, memory and communication, without compiling."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
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
    """Bytes of the residuals of a scalar function, without parameters and arguments.

    Residuals are what JAX keeps from the forward to the backward pass. The compiler may recompute
    cheap parts of them, and pads arrays.
    """
    jaxpr = jax.make_jaxpr(lambda p, *args: jax.vjp(lambda q: function(q, *args), p)[1])(
        params, *abstract_args
    ).jaxpr
    inputs = set(map(id, (*jaxpr.invars, *jaxpr.constvars)))
    kept = {id(v): v.aval for v in jaxpr.outvars if id(v) not in inputs}  # each once
    return sum(_bytes(aval) for aval in kept.values())


def block_bytes(function: Callable, *abstract_args: Any) -> int:
    """Bytes of the residuals of the largest rematerialised block; 0 without any."""
    blocks: dict[Any, Any] = {}
    _find_blocks(jax.make_jaxpr(function)(*abstract_args).jaxpr, blocks)
    return max((_block_bytes(jaxpr) for jaxpr in blocks.values()), default=0)


def _find_blocks(jaxpr: Any, found: dict[Any, Any]) -> None:
    """Finds blocks by their inputs' shapes: equal shapes count as the same block."""
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
    """Bytes of an abstract array; random keys, of which there are few, count 8 per key."""
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective operation of a step.

    Attributes:
      kind: as in `sharding.collectives`.
      size: bytes of the results per chip, as there.
      chips: number of chips in one such operation.
    """

    kind: str
    size: int
    chips: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends at least (ring algorithms)."""
        others = self.chips - 1
        shares = {
            "all-reduce": 2 * others / self.chips,
            "all-gather": others / self.chips,
            "reduce-scatter": float(others),
        }
        return self.size * shares[self.kind]


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """The cost of training one stage.

    Attributes:
      parameters: their number.
      multiply_adds: of the network, forward, per image.
      images: per chip at a time.
      flops: per step; the backward pass counts twice the forward pass, rematerialisation nothing.
      state: bytes per chip of parameters, EMA and optimizer state.
      gradients: bytes per chip.
      copies: bytes per chip of the parameters gathered and cast for the pass, where they are stored
        sharded or in another dtype.
      activations: bytes per chip of the residuals, an estimate.
      exchanges: the collectives of a step.
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
        """Bytes per chip that do not depend on the number of images."""
        return self.state + self.gradients + self.copies

    @property
    def memory(self) -> int:
        """Bytes per chip."""
        return self.fixed + self.activations

    @property
    def sent(self) -> float:
        """Bytes that a chip sends per step."""
        return sum((exchange.sent for exchange in self.exchanges), 0.0)


def training_cost(config: Config, number: int, chips: int, classes: int) -> TrainingCost:
    """The cost of training stage `number` (from 1) on so many chips, sharded as configured.

    Args:
      config: of the run.
      number: of the stage.
      chips: their number.
      classes: of the images; 0 for none.
    """
    stage, (shape, cell) = config.stage(number), records_of(config, number)
    training, jitted = stage.training, config.parallel.mode == "pjit"
    sizes = sharding.mesh_sizes(config.parallel.data, config.parallel.fsdp, chips)
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    state = sharding.by_rules(_state(_plain(stage), shape[-1], classes), mesh)
    dtypes = _dtypes(_untrained(stage), shape[-1], classes)
    images = training.batch_size // training.accumulate // chips
    forward = _forward(_plain(stage), shape[-1], classes)
    # With accumulation there are the gradients of a part, and their sum.
    gradient_copies = 1 if training.accumulate == 1 else 2
    # `pmap` averages once, at the end; for `jit` the compiler reduces each part's gradients.
    rounds = training.accumulate if jitted else 1
    return TrainingCost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        multiply_adds=forward,
        images=images,
        flops=2 * 3 * forward * training.batch_size,
        state=shard_bytes(state),
        gradients=shard_bytes(state.params) * gradient_copies,
        copies=sum(jax.tree.leaves(jax.tree.map(_copied_bytes, state.params, dtypes))),
        activations=images * _activations(_untrained(stage), shape, cell, classes),
        exchanges=_exchanges(state.params, dtypes, sizes, rounds, narrow=jitted),
    )


def _copied_bytes(leaf: Any, dtype: Any) -> int:
    """Bytes of a parameter's copy for the pass, if it is sharded or stored in another dtype."""
    if leaf.sharding.is_fully_replicated and leaf.dtype == dtype:
        return 0
    return leaf.size * dtype.itemsize


def shard_bytes(tree: Any) -> int:
    """Bytes per chip of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def records_of(config: Config, number: int) -> tuple[tuple[int, int, int], int]:
    """The shape of the records that a stage is trained on, and the side of their cells.

    They hold the sums of such cells of the last stage's images, as preparation writes them, unless
    the stage has a source of its own.
    """
    stage = config.stage(number)
    last = stage if stage.source else config.stages[-1]
    shape = (*stage.resolution, config.data.channels)
    return shape, last.resolution[0] // stage.resolution[0]


def _untrained(stage: Stage) -> Stage:
    """The stage without what changes neither network nor loss, as a cache key for traces."""
    return dataclasses.replace(
        stage, training=dataclasses.replace(stage.training, batch_size=1, accumulate=1, images=1)
    )


def _plain(stage: Stage) -> Stage:
    """The stage without what changes neither parameters nor multiply-adds.

    In float32, which `multiply_adds` needs.
    """
    return dataclasses.replace(
        _untrained(stage), network=dataclasses.replace(stage.network, dtype="float32", remat="none")
    )


@functools.lru_cache(maxsize=64)
def _state(stage: Stage, channels: int, classes: int) -> TrainState:
    """The training state, abstract."""
    optimizer = build_optimizer(stage.training, Count(stage.training.batch_size))
    return jax.eval_shape(
        lambda params: init_state(params, optimizer, stage.training.averages),
        stage.build(channels, classes).abstract,
    )


@functools.lru_cache(maxsize=64)
def _dtypes(stage: Stage, channels: int, classes: int) -> dict[str, Any]:
    """The dtype that each parameter is cast to for the pass."""
    return stage.build(channels, classes).dtypes


@functools.lru_cache(maxsize=64)
def _forward(stage: Stage, channels: int, classes: int) -> int:
    """Multiply-adds of the network per image."""
    return stage.multiply_adds(channels, classes)


@functools.lru_cache(maxsize=64)
def _activations(stage: Stage, image_shape: tuple[int, int, int], cell: int, classes: int) -> int:
    """Bytes of residuals per image, with those of one rematerialised block."""
    objective = build_objective(stage, image_shape, classes, cell)

    def cast(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    def loss(params: Any, batch: Any, keys: Any) -> jax.Array:
        return objective.loss(params, batch, keys, dropout=True).mean()

    # Parameters as they are in the pass: their copies are not residuals.
    params = jax.tree.map(cast, objective.network.abstract, objective.network.dtypes)
    batch = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct((1, *one.shape), one.dtype), objective.inputs(image_shape)
    )
    keys = jax.eval_shape(lambda: jax.random.split(root_key(0), 1))
    block = block_bytes(loss, params, batch, keys) if stage.network.remat == "block" else 0
    return residual_bytes(loss, params, batch, keys) + block


def _exchanges(
    params: Any, dtypes: Any, sizes: tuple[int, int], rounds: int, narrow: bool
) -> tuple[Exchange, ...]:
    """The collectives of a step, for gradients and for sharded parameters.

    Args:
      params: abstract, with their shardings.
      dtypes: of each parameter in the pass.
      sizes: of the mesh, (data, fsdp).
      rounds: parts of a batch that have collectives of their own.
      narrow: gradients are reduced in the dtype of the pass, not in float32.
    """
    data, fsdp = sizes
    sharded, replicated = 0, 0
    for leaf, dtype in zip(jax.tree.leaves(params), jax.tree.leaves(dtypes), strict=True):
        if leaf.sharding.is_fully_replicated:
            replicated += rounds * leaf.size * (dtype if narrow else leaf.dtype).itemsize
        else:
            sharded += rounds * leaf.size * dtype.itemsize
    found = (
        Exchange("all-reduce", replicated, data * fsdp),
        Exchange("all-gather", sharded, fsdp),
        Exchange("reduce-scatter", sharded // fsdp, fsdp),
        Exchange("all-reduce", sharded // fsdp, data),
    )
    return tuple(exchange for exchange in found if exchange.size and exchange.chips > 1)


def step_seconds(
    cost: TrainingCost, chip: Chip, chips: int, dtype: str, utilisation: float
) -> float:
    """Seconds of computation per step.

    Args:
      cost: of the stage.
      chip, chips: the hardware.
      dtype: of the network.
      utilisation: the share of the peak FLOP/s, without rematerialisation.
    """
    return cost.flops / (chips * chip.peak(dtype) * utilisation)
