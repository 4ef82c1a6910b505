"""What the relay adds to its network: the update of one step and its noise, beside the adding of
two arrays and the network.

    python -m experiments.benchmarks.relay                  # ADM-256 is timed for one image:
    minutes on a CPU python -m experiments.benchmarks.relay --nonetwork      # its share by FLOPs
    alone

The first table is of images (batch, 256, 256, 3) in float32. "Adding" is x + y of two such arrays,
"adding, flat" the same of their values in one row: what a pass over memory takes when the compiler
has no short axis to stumble over. An update takes the state and the denoised images one level
further (slope, transforms in, mixing, transform out, given noise added); its rows are:

- the sampler's: `RelayHeun.step` of order 1 as it is, compiled: one product of each patch with a
  (p^2, p^2) matrix, the same for all, lifted to images by `vmap`, as u' = g u + (D' - g D) u0 is x'
  = g x + V (D' - g D) V^T x0 in pixels;
- matrix, fused: the same as one product of whole arrays;
- DCT, vmapped: a DCT of the state and one of its slope, the mixing, and one back, for a patch,
  lifted to images by `vmap`;
- DCT, fused: the same as products of whole arrays with the DCT's matrix.

"Noise" is its drawing, white and block noise, a key an image. Columns: milliseconds of a call;
these in units of each adding's; XLA's count of operations; and the largest difference from the
sampler's. The second table sets one update and one drawing of noise beside one evaluation of the
stage's network: the sampler's step has as many of each, and guidance doubles the network's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float

from experiments.benchmarks import timing
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.diffusion import blurring, preconditioning, processes, samplers
from rdm_jax.runtime.random_streams import root_key

_CONFIG = define_config("Whose relay stage to take; configs/imagenet.py if it is not given.")
_STAGE = flags.DEFINE_integer("stage", 2, "Number of the stage.", 2)
_BATCH = flags.DEFINE_integer("batch", 8, "Images at a time.", 1)
_SIZE = flags.DEFINE_integer("size", 0, "Height and width; 0 for the stage's.", 0)
_FACTOR = flags.DEFINE_integer(
    "factor", 0, "By how much the relay enlarges; 0 for the stage's factor.", 0
)
_NETWORK = flags.DEFINE_bool("network", True, "Whether to time the stage's network, too.")
_NETWORK_BATCH = flags.DEFINE_integer(
    "network_batch", 1, "Images at a time through the network.", 1
)
_CLASSES = flags.DEFINE_integer("classes", 1000, "Of the network; 0 for none.", 0)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "How long to time each thing.")

Update = Callable[
    ..., Float[Array, "b h w c"]
]  # (x, denoised, noise, level, to) -> x at the level `to`
PRECISION = jax.lax.Precision.HIGHEST


def the_samplers(sampler: samplers.RelayHeun) -> Update:
    """The step of order 1, in which the network has said its word already."""
    first_order = dataclasses.replace(sampler, order=1)

    def update(x, denoised, noise, level, to):
        return first_order.step(
            lambda x, sigma: denoised, x, jnp.int32(0), level, to, lambda k: noise
        )

    return update


def _shrunk(level: samplers.Levels, to: samplers.Levels, eta: float) -> Float[Array, ""]:
    """g, what is left of the state's own noise."""
    return (1 - eta**2) ** 0.5 * to.sigma / level.sigma


def _dct_weights(
    level: samplers.Levels, to: samplers.Levels, eta: float
) -> tuple[Float[Array, "p p"], Float[Array, "p p"]]:
    """The factors of the DCTs of the state and of its slope."""
    g = _shrunk(level, to, eta)
    return to.blur + g * (1 - level.blur), level.sigma * (g * level.blur - to.blur)


def _matrix(level: samplers.Levels, to: samplers.Levels, eta: float) -> Float[Array, "p p p p"]:
    """V (D' - g D) V^T: from the pixels of a patch (the first two axes) to its pixels (the last
    two)."""
    m = blurring.dct_matrix(level.blur.shape[-1])
    basis = jnp.asarray(np.einsum("ik,jl->ijkl", m, m), level.blur.dtype)
    weights = to.blur - _shrunk(level, to, eta) * level.blur
    return jnp.einsum("ij,ijkl,ijrs->klrs", weights, basis, basis, precision=PRECISION)


def _grid(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 p w2 p c"]:
    b, h, w, c = x.shape
    return x.reshape(b, h // patch, patch, w // patch, patch, c)


def dct_vmapped(x, denoised, noise, level, to, *, eta: float):
    """The paper's update of one patch, lifted."""
    of_state, of_slope = _dct_weights(level, to, eta)

    def one_patch(x, slope):
        return blurring.idct2(of_state * blurring.dct2(x) + of_slope * blurring.dct2(slope))

    moved = blurring.over_patches(one_patch, level.blur.shape[-1])(
        (x, (x - denoised) / level.sigma)
    )
    return moved + eta * to.sigma * noise


def dct_fused(x, denoised, noise, level, to, *, eta: float):
    """The paper's update of whole arrays."""
    patch = level.blur.shape[-1]
    m = jnp.asarray(blurring.dct_matrix(patch), x.dtype)
    of_state, of_slope = (w[:, None, :, None] for w in _dct_weights(level, to, eta))
    dct = lambda x: jnp.einsum("ir,js,bhrwsc->bhiwjc", m, m, _grid(x, patch), precision=PRECISION)  # noqa: E731
    mixed = of_state * dct(x) + of_slope * dct((x - denoised) / level.sigma)
    moved = jnp.einsum("ir,js,bhiwjc->bhrwsc", m, m, mixed, precision=PRECISION).reshape(x.shape)
    return moved + eta * to.sigma * noise


def matrix_fused(x, denoised, noise, level, to, *, eta: float):
    """One product of whole arrays."""
    grid = _grid(denoised, level.blur.shape[-1])
    moved = jnp.einsum(
        "bhkwlc,klrs->bhrwsc", grid, _matrix(level, to, eta), precision=PRECISION
    ).reshape(x.shape)
    return _shrunk(level, to, eta) * x + moved + eta * to.sigma * noise


def updates(sampler: samplers.RelayHeun) -> dict[str, Update]:
    """All ways to the same update."""
    ways = {
        "DCT, vmapped": dct_vmapped,
        "DCT, fused": dct_fused,
        "matrix, fused": matrix_fused,
    }
    return {"the sampler's": the_samplers(sampler)} | {
        k: functools.partial(f, eta=sampler.eta) for k, f in ways.items()
    }


def drawing(
    process: processes.RelayProcess, shape: tuple[int, ...]
) -> Callable[[Array], Float[Array, "b h w c"]]:
    """Unit noise of each image from its key, as the sampler draws it."""
    return lambda keys: jax.vmap(lambda key: process.draw_noise(key, shape[1:]))(keys)


def relay_stage(config: configs.Config) -> configs.Stage:
    """The stage, at the size and with the factor that flags ask for."""
    stage = config.stages[_STAGE.value - 1]
    size = (_SIZE.value,) * 2 if _SIZE.value else stage.resolution
    process = dataclasses.replace(stage.process, patch=_FACTOR.value or stage.process.patch)
    return dataclasses.replace(stage, resolution=size, process=process)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Everything of the relay's own for a batch of images, compiled.

    Attributes:
      calls: by name, functions without arguments.
      flops: XLA's counts.
      results: of the updates.
    """

    calls: dict[str, Callable[[], Array]]
    flops: dict[str, float]
    results: dict[str, Array]


def arithmetic(stage: configs.Stage, shape: tuple[int, ...]) -> Arithmetic:
    """Compiles the relay's arithmetic on random images (b, h, w, c), in the middle of the stage's
    ladder."""
    levels = stage.sampler.levels(stage.process)
    middle = max(0, len(levels.sigma) // 2 - 1)
    level, to = (
        jax.tree.map(lambda a, i=i: a[i], levels)
        for i in (middle, min(middle + 1, len(levels.sigma) - 1))
    )
    random = np.random.default_rng(0)
    x, denoised, noise = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(3))
    keys = jax.random.split(root_key(0), shape[0])
    flat = (x.reshape(-1), denoised.reshape(-1))
    work = {"adding": (jnp.add, (x, denoised)), "adding, flat": (jnp.add, flat)}
    work |= {
        name: (update, (x, denoised, noise, level, to))
        for name, update in updates(stage.sampler).items()
    }
    work |= {"noise": (drawing(stage.process, shape), (keys,))}
    programs = {
        name: (timing.compiled(function, *args), args) for name, (function, args) in work.items()
    }
    calls = {name: functools.partial(program, *args) for name, (program, args) in programs.items()}
    counts = {name: timing.flops(program) for name, (program, _) in programs.items()}
    return Arithmetic(calls, counts, {name: calls[name]() for name in updates(stage.sampler)})


def arithmetic_rows(work: Arithmetic, seconds: dict[str, float]) -> Iterator[list[str]]:
    """Cells of the first table."""
    exact = work.results["the sampler's"]
    for name, each in seconds.items():
        times = [f"{each / seconds[add]:.2f}" for add in ("adding", "adding, flat")]
        off = (
            f"{float(jnp.abs(work.results[name] - exact).max()):.0e}"
            if name in work.results
            else "-"
        )
        yield [name, timing.milliseconds(each), *times, f"{work.flops[name] / 1e6:,.0f} M", off]


def network_call(stage: configs.Stage, shape: tuple[int, ...], classes: int) -> Callable[[], Array]:
    """One evaluation of the stage's denoiser on a batch, compiled."""
    network = stage.build(shape[-1], classes)
    labels = jax.nn.one_hot(jnp.zeros(shape[0], jnp.int32), classes) if classes else None

    def evaluate(params, x, sigma):
        apply = lambda x, c_noise: network.apply(params, x, c_noise, labels)  # noqa: E731
        return preconditioning.denoiser(apply, stage.precondition)(x, sigma)

    args = (timing.parameters(network), jnp.zeros(shape), jnp.ones(()))
    return functools.partial(timing.compiled(evaluate, *args), *args)


def share_rows(stage: configs.Stage, shape: tuple[int, ...]) -> Iterator[list[str]]:
    """Cells of the second table."""
    work = arithmetic(stage, shape)
    own = {name: work.calls[name] for name in ("the sampler's", "noise")}
    operations = float(shape[0] * timing.forward_flops(stage, shape[-1], _CLASSES.value))
    evaluation = network_call(stage, shape, _CLASSES.value) if _NETWORK.value else None
    seconds = timing.medians(own, _SECONDS.value)
    if evaluation is not None:
        seconds |= timing.medians({"network": evaluation}, _SECONDS.value)
    yield ["network", *_figures(seconds.get("network"), operations), "-", "-"]
    time, count = (sum(of[name] for name in own) for of in (seconds, work.flops))
    by_time = f"{time / (time + seconds['network']):.3%}" if "network" in seconds else "-"
    yield [
        "update and noise",
        *_figures(time, count),
        f"{count / (count + operations):.4%}",
        by_time,
    ]


def _figures(seconds: float | None, operations: float) -> list[str]:
    return ["-" if seconds is None else timing.milliseconds(seconds), f"{operations / 1e9:,.2f} G"]


def main() -> None:
    """Prints the tables."""
    config = configs.parse(_CONFIG.value)
    stage, channels = relay_stage(config), config.data.channels
    print(timing.machine())
    shape = (_BATCH.value, *stage.resolution, channels)
    work = arithmetic(stage, shape)
    columns = ("", "ms", "in addings", "in flat addings", "operations", "difference")
    timing.start_table(f"Batches of {' x '.join(map(str, shape))}, factor {stage.factor}", columns)
    for cells in arithmetic_rows(work, timing.medians(work.calls, _SECONDS.value)):
        timing.print_row(cells)
    del work
    shape = (_NETWORK_BATCH.value, *shape[1:])
    columns = ("", "ms", "operations", "share by operations", "share by time")
    timing.start_table(
        f"One evaluation of the network, batches of {' x '.join(map(str, shape))}", columns
    )
    for cells in share_rows(stage, shape):
        timing.print_row(cells)


if __name__ == "__main__":
    command(main, config="configs/imagenet.py")
