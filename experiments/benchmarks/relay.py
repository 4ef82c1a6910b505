"""The cost of the relay's arithmetic: one update and its noise, beside an addition and the network.

    python -m experiments.benchmarks.relay                # ADM-256 on one image: minutes on a CPU
    python -m experiments.benchmarks.relay --nonetwork    # only its share by operations

The first table is of images (batch, 256, 256, 3) in float32. "addition" is x + y of two such
arrays, "addition, flat" the same of their values in one row: the cost of a pass over memory without
a short axis. An update takes the state and the denoised images to the next level (slope, transforms
in, mixing, transform out, given noise added); its rows are:

- the sampler's: `RelayHeun.step` of order 1, compiled: one product of each patch with a (p^2, p^2)
  matrix, the same for all, lifted to images by `vmap`, as u' = g u + (D' - g D) u0 is
  x' = g x + V (D' - g D) V^T x0 in pixels;
- matrix, fused: the same as one product of whole arrays;
- DCT, vmapped: a DCT of the state and one of its slope, the mixing, and one back, for a patch,
  lifted to images by `vmap`;
- DCT, fused: the same as products of whole arrays with the DCT's matrix.

"noise" draws white and block noise, with one key per image. Columns: milliseconds per call; these
relative to each addition; XLA's count of operations; and the largest difference from the sampler's.
The second table compares one update and one draw of noise with one evaluation of the stage's
network: a step of the sampler has as many of each, and guidance doubles the network's.
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

_CONFIG = define_config("Its relay stage is timed; configs/imagenet.py if it is not given.")
_STAGE = flags.DEFINE_integer("stage", 2, "Number of the stage.", 2)
_BATCH = flags.DEFINE_integer("batch", 8, "Images at a time.", 1)
_SIZE = flags.DEFINE_integer("size", 0, "Height and width; 0 for the stage's.", 0)
_FACTOR = flags.DEFINE_integer(
    "factor", 0, "Of the relay's upsampling; 0 for the stage's factor.", 0
)
_NETWORK = flags.DEFINE_bool("network", True, "Whether to time the stage's network, too.")
_NETWORK_BATCH = flags.DEFINE_integer(
    "network_batch", 1, "Images at a time through the network.", 1
)
_CLASSES = flags.DEFINE_integer("classes", 1000, "Of the network; 0 for none.", 0)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "How long to time each thing.")

# (x, denoised, noise, level, to) -> x at the level `to`.
Update = Callable[..., Float[Array, "b h w c"]]
PRECISION = jax.lax.Precision.HIGHEST


def the_samplers(sampler: samplers.RelayHeun) -> Update:
    """The step of order 1, with the network's output given."""
    first_order = dataclasses.replace(sampler, order=1)

    def update(x, denoised, noise, level, to):
        return first_order.step(
            lambda x, sigma: denoised, x, jnp.int32(0), level, to, lambda k: noise
        )

    return update


def _shrunk(level: samplers.Levels, to: samplers.Levels, eta: float) -> Float[Array, ""]:
    """g, the factor of the state's own noise."""
    return (1 - eta**2) ** 0.5 * to.sigma / level.sigma


def _dct_weights(
    level: samplers.Levels, to: samplers.Levels, eta: float
) -> tuple[Float[Array, "p p"], Float[Array, "p p"]]:
    """The factors of the DCTs of the state and of its slope."""
    g = _shrunk(level, to, eta)
    return to.blur + g * (1 - level.blur), level.sigma * (g * level.blur - to.blur)


def _matrix(level: samplers.Levels, to: samplers.Levels, eta: float) -> Float[Array, "p p p p"]:
    """V (D' - g D) V^T: from a patch's pixels (first two axes) to its pixels (last two)."""
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

    def dct(x):
        return jnp.einsum("ir,js,bhrwsc->bhiwjc", m, m, _grid(x, patch), precision=PRECISION)

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
    """All implementations of the update."""
    return {
        "the sampler's": the_samplers(sampler),
        "DCT, vmapped": functools.partial(dct_vmapped, eta=sampler.eta),
        "DCT, fused": functools.partial(dct_fused, eta=sampler.eta),
        "matrix, fused": functools.partial(matrix_fused, eta=sampler.eta),
    }


def drawing(
    process: processes.RelayProcess, shape: tuple[int, ...]
) -> Callable[[Array], Float[Array, "b h w c"]]:
    """Unit noise of each image from its key, as the sampler draws it."""
    return lambda keys: jax.vmap(lambda key: process.draw_noise(key, shape[1:]))(keys)


def relay_stage(config: configs.Config) -> configs.Stage:
    """The stage, with the size and factor of the flags."""
    stage = config.stages[_STAGE.value - 1]
    size = (_SIZE.value,) * 2 if _SIZE.value else stage.resolution
    process = dataclasses.replace(stage.process, patch=_FACTOR.value or stage.process.patch)
    return dataclasses.replace(stage, resolution=size, process=process)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The relay's arithmetic on a batch of images, compiled.

    Attributes:
      calls: functions without arguments, by name.
      flops: XLA's counts.
      results: of the updates.
    """

    calls: dict[str, Callable[[], Array]]
    flops: dict[str, float]
    results: dict[str, Array]


def arithmetic(stage: configs.Stage, shape: tuple[int, ...]) -> Arithmetic:
    """Compiles the relay's arithmetic on random images (b, h, w, c).

    The update is that in the middle of the stage's noise schedule.
    """
    levels = stage.sampler.levels(stage.process)
    middle = max(0, len(levels.sigma) // 2 - 1)
    following = min(middle + 1, len(levels.sigma) - 1)
    level = jax.tree.map(lambda a: a[middle], levels)
    to = jax.tree.map(lambda a: a[following], levels)
    random = np.random.default_rng(0)
    x, denoised, noise = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(3))
    keys = jax.random.split(root_key(0), shape[0])
    flat = (x.reshape(-1), denoised.reshape(-1))
    work = {"addition": (jnp.add, (x, denoised)), "addition, flat": (jnp.add, flat)}
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
        times = [f"{each / seconds[add]:.2f}" for add in ("addition", "addition, flat")]
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
        def apply(x, c_noise):
            return network.apply(params, x, c_noise, labels)

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
    columns = ("", "ms", "in additions", "in flat additions", "operations", "difference")
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
