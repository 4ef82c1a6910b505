"""Modelled time of a config's blocks on a TPU that need not exist here, as a Markdown table.

    python -m experiments.benchmarks.tpu                  # ADM-64 and ADM-256, bfloat16, v5e
    python -m experiments.benchmarks.tpu --stage 1 --only '192 64 x 64'
    python -m experiments.benchmarks.tpu --config configs/imagenet_jit.py:B16 --batches 32

It needs libtpu (`pip install 'jax[tpu]'`) and no TPU: the compiler compiles each block, forward and
backward, for one chip, and tells the cycles that it expects of every operation. Their sum over the
clock is the modelled time; "utilisation" is the block's FLOPs (two per multiply-add, times three
for forward and backward) over that time, as a share of the chip's peak. An estimate, not a
measurement: `rdm_jax.plan.modelled_time` says what it leaves out. The other columns are the shares
of the time by kind of work, and the costliest operation.

Every distinct block of the networks is a row, with how many times the network has it. A U-Net's has
channels in and out, the side of its image, heads of attention, "up" or "down" where it resamples; a
transformer's has channels, tokens of the image (and of the class), heads. "sampler step" is one
step of the stage's sampler without the network: its noise and its arithmetic, for each evaluation
of the network the forward pass alone comes on top. What stands before and
after a network's blocks is part of whole steps alone: `--mode plan --compile`. Images may lie
in memory as the compiler likes, as they do between the blocks of a network. A block takes half a
minute to two to compile.
"""

import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.experimental.layout import Format, Layout

from experiments.benchmarks import timing, tpu_blocks
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.diffusion import preconditioning
from rdm_jax.models import target
from rdm_jax.models.functional import multiply_adds
from rdm_jax.plan import modelled_time
from rdm_jax.plan.chips import Chip
from rdm_jax.plan.tpu_compile import one_chip
from rdm_jax.runtime import sharding
from rdm_jax.runtime.random_streams import root_key
from rdm_jax.sampling.stage_functions import stage_levels

_CONFIG = define_config("Whose networks' blocks; configs/imagenet.py if it is not given.")
_CHIP = flags.DEFINE_string("chip", "v5e", "A TPU: v4, v5e, v5p or v6e.")
_STAGE = flags.DEFINE_multi_integer("stage", [], "Numbers of the stages; all if not given.", 1)
_BATCHES = flags.DEFINE_list("batches", ["8", "16"], "Images on the chip at a time.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of the networks.")
_ONLY = flags.DEFINE_string("only", "", "Pattern of the blocks to show, such as '512.*heads'.")
_TOP = flags.DEFINE_integer("top", 0, "Costliest operations to print below each row.", 0)

COLUMNS = (
    "stage",
    "block",
    "times",
    "batch",
    "ms",
    "utilisation",
    "by kind",
    "costliest",
    "compile",
)
STEP = "sampler step"
SHOWN = 0.03  # share of the time from which a kind of work is shown


def compiled(
    block: tpu_blocks.Block, batch: int, dtype: jnp.dtype, device: Any
) -> jax.stages.Compiled:
    """The block's output and gradients for a batch, compiled for a device."""
    graph, state = nnx.split(nnx.eval_shape(lambda: block.build(dtype)))
    key = jax.eval_shape(lambda: jax.random.key_data(root_key(0)))

    def both(state, x, emb, keys, cotangent):
        def run(state, x, emb):
            return block.run(nnx.merge(graph, state), x, emb, jax.random.wrap_key_data(keys))

        out, backward = jax.vjp(run, state, x, emb)
        return out, backward(cotangent)

    arguments = (
        state,
        jax.ShapeDtypeStruct((batch, *block.shape), dtype),
        jax.ShapeDtypeStruct((batch, block.emb), jnp.float32),
        jax.ShapeDtypeStruct((batch, *key.shape), key.dtype),
        jax.ShapeDtypeStruct((batch, *block.shape_out), dtype),
    )
    mesh = sharding.make_mesh(devices=[device])
    fixed = sharding.replicated(mesh)
    free = Format(Layout.AUTO, fixed)
    with target.compiling_for(mesh):
        return (
            jax.jit(
                both,
                in_shardings=(fixed, free, fixed, fixed, free),
                out_shardings=(free, (fixed, free, fixed)),
            )
            .lower(*arguments)
            .compile()
        )


def compiled_step(
    stage: configs.Stage, channels: int, batch: int, device: Any
) -> jax.stages.Compiled:
    """A step of the stage's sampler with a network that takes no time, compiled for a device."""
    process, sampler, shape = stage.process, stage.sampler, (*stage.resolution, channels)
    key = jax.eval_shape(lambda: jax.random.key_data(root_key(0)))
    levels = stage_levels(stage)
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), levels)

    def network(x, c_noise):
        return jnp.tile(x, stage.precondition.outputs)

    def step(keys, x, i, level, to):
        def noise(k):
            draw = functools.partial(process.draw_noise, shape=shape)
            return jax.vmap(lambda key: draw(jax.random.fold_in(key, k)))(
                jax.random.wrap_key_data(keys)
            )

        denoise = preconditioning.denoiser(network, stage.precondition)
        return sampler.step(denoise, x, i, level, to, noise)

    arguments = (
        jax.ShapeDtypeStruct((batch, *key.shape), key.dtype),
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
        first,
        first,
    )
    fixed = sharding.replicated(sharding.make_mesh(devices=[device]))
    return jax.jit(step, in_shardings=fixed, out_shardings=fixed).lower(*arguments).compile()


def flops(block: tpu_blocks.Block, batch: int) -> int:
    """FLOPs forward and backward, counted as in a float32 network without fused kernels."""
    graph, state = nnx.split(nnx.eval_shape(lambda: block.build(jnp.dtype("float32"))))
    return 6 * multiply_adds(
        lambda state, x, emb: block.run(nnx.merge(graph, state), x, emb, None),
        state,
        jax.ShapeDtypeStruct((batch, *block.shape), jnp.float32),
        jax.ShapeDtypeStruct((batch, block.emb), jnp.float32),
    )


def row(
    block: tpu_blocks.Block, batch: int, dtype: jnp.dtype, device: Any, chip: Chip
) -> tuple[list[str], list[modelled_time.Operation]]:
    """The cells of a block at a batch size, and its operations."""
    began = time.monotonic()
    text = compiled(block, batch, dtype, device).as_text()
    found = modelled_time.operations(text, chip)
    rate = flops(block, batch) / modelled_time.seconds(found, chip)
    return cells_of(found, f"{rate / chip.peak(dtype.name):.2g}", began, chip), found


def cells_of(
    found: list[modelled_time.Operation], utilisation: str, began: float, chip: Chip
) -> list[str]:
    """The cells of a program's operations, whose compilation has `began` at that time."""
    compiling = f"{time.monotonic() - began:.0f} s"
    seconds = modelled_time.seconds(found, chip)
    shares = ", ".join(
        f"{kind} {share:.0%}"
        for kind, share in modelled_time.by_kind(found).items()
        if share >= SHOWN
    )
    worst = found[0]
    costliest = f"{worst.line or worst.name} {worst.cycles / chip.clock / seconds:.0%}"
    return [timing.milliseconds(seconds), utilisation, shares, costliest, compiling]


def print_stage(stage: configs.Stage, channels: int, batch: int, device: Any, chip: Chip) -> None:
    """Prints the rows of a stage's blocks, and of all that are shown together."""
    dtype, total, work = jnp.dtype(_DTYPE.value), 0.0, 0.0
    for block, count in tpu_blocks.of_stage(stage, channels, 0).items():
        if not re.search(_ONLY.value, str(block)):
            continue
        cells, found = row(block, batch, dtype, device, chip)
        timing.print_row([f"{stage.number}", str(block), f"{count}", f"{batch}", *cells])
        total += count * modelled_time.seconds(found, chip)
        work += count * flops(block, batch)
        for worst in found[: _TOP.value]:
            print(f"    {worst.cycles / chip.clock * 1e3:.3f} ms", worst)
    if re.search(_ONLY.value, STEP):
        began = time.monotonic()
        text = compiled_step(stage, channels, batch, device).as_text()
        cells = cells_of(modelled_time.operations(text, chip), "-", began, chip)
        steps = len(stage_levels(stage).sigma) - 1
        timing.print_row([f"{stage.number}", STEP, f"{steps}", f"{batch}", *cells])
    if total:
        share = f"{work / total / chip.peak(dtype.name):.2g}"
        together = [f"{stage.number}", "all of these", "", f"{batch}", timing.milliseconds(total)]
        timing.print_row([*together, share, "", "", ""])


def main() -> None:
    """Prints the table."""
    config = configs.parse(_CONFIG.value)
    chip, device = one_chip(_CHIP.value)
    print(f"Modelled for {chip.name}, {_DTYPE.value}, jax {jax.__version__}")
    timing.start_table("Blocks, forward and backward", COLUMNS)
    for number in _STAGE.value or range(1, len(config.stages) + 1):
        for batch in map(int, _BATCHES.value):
            print_stage(config.stage(number), config.data.channels, batch, device, chip)


if __name__ == "__main__":
    command(main, config="configs/imagenet.py")
