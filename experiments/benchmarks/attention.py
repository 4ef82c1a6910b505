"""Implementations of attention, at the sizes of a config's networks, as a Markdown table.

    python -m experiments.benchmarks.attention                    # ADM-64 and ADM-256
    python -m experiments.benchmarks.attention --batch 64 --dtypes bfloat16    # on an accelerator

Rows, for each size of the levels that attend: "the library's" is `rdm_jax.models.layers.attend`;
"xla" and "cudnn" are `jax.nn.dot_product_attention` with that implementation (cudnn on GPUs only,
and not in float32); "einsum" is two products of whole arrays with a float32 softmax between them.
Columns: pixels that attend, heads x channels per head, milliseconds forward, milliseconds forward
and backward together, FLOP/s forward (4 n^2 d per head, n pixels, d channels), and the largest
differences of the output, and of the gradients, from einsum in float32 on the same (rounded)
values, at full precision.
"""

import functools
import itertools
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
from rdm_jax.models import layers

_CONFIG = define_config("Whose networks' sizes to take; configs/imagenet.py if it is not given.")
_BATCH = flags.DEFINE_integer("batch", 2, "Images at a time.", 1)
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of queries, keys and values.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "How long to time each thing.")

COLUMNS = (
    "stage",
    "pixels",
    "heads",
    "dtype",
    "",
    "forward, ms",
    "and backward, ms",
    "FLOP/s",
    "difference",
    "of gradients",
)

Heads = Float[Array, "b n k d"]


def einsum(q: Heads, k: Heads, v: Heads, precision: jax.lax.Precision | None = None) -> Heads:
    """Plain attention; the softmax is float32's."""
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(product("bnkd,bmkd->bknm", q, k) / q.shape[-1] ** 0.5)
    return product("bknm,bmkd->bnkd", weights.astype(q.dtype), v).astype(q.dtype)


def variants(dtype: jnp.dtype) -> dict[str, Callable[[Heads, Heads, Heads], Heads]]:
    """The implementations that this device can run."""
    xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    found = {"the library's": layers.attend, "xla": xla}
    if jax.default_backend() == "gpu" and dtype != jnp.float32:
        found["cudnn"] = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return {**found, "einsum": einsum}


def sizes(config: configs.Config) -> Iterator[tuple[int, int, int, int, int]]:
    """(stage, height, width, heads, channels per head) of every level that attends."""
    for number, stage in enumerate(config.stages, 1):
        network = stage.network
        for level in sorted({*network.attention_levels, len(network.channel_mult) - 1}):
            channels = network.channels * network.channel_mult[level]
            shrunk = network.patch * 2**level
            head = getattr(network, "head_channels", channels)
            yield number, *(side // shrunk for side in stage.resolution), channels // head, head


def with_gradients(
    attend: Callable[..., Heads],
) -> Callable[..., tuple[Heads, tuple[Heads, Heads, Heads]]]:
    """(q, k, v, cotangent) -> the output, and the gradients of its product with the cotangent."""

    def both(q, k, v, cotangent):
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(cotangent)

    return both


def rows(shape: tuple[int, int, int, int], dtype: jnp.dtype, seconds: float) -> Iterator[list[str]]:
    """Cells of every variant for arrays of shape (b, n, k, d): name, times, FLOP/s, differences."""
    random = np.random.default_rng(0)
    arrays = [
        jnp.asarray(random.standard_normal(shape, np.float32)).astype(dtype) for _ in range(4)
    ]
    exact = functools.partial(einsum, precision=jax.lax.Precision.HIGHEST)
    exact_out, exact_gradients = jax.jit(with_gradients(exact))(
        *(a.astype(jnp.float32) for a in arrays)
    )
    calls, results = {}, {}
    for name, attend in variants(dtype).items():
        both = functools.partial(timing.compiled(with_gradients(attend), *arrays), *arrays)
        forward = functools.partial(timing.compiled(attend, *arrays[:3]), *arrays[:3])
        calls |= {(name, "forward"): forward, (name, "both"): both}
        results[name] = both()
    times = timing.medians(calls, seconds)
    b, n, k, d = shape
    for name, (out, gradients) in results.items():
        forward, both = times[name, "forward"], times[name, "both"]
        off = max(_difference(g, e) for g, e in zip(gradients, exact_gradients, strict=True))
        rate = f"{4 * b * k * n**2 * d / forward / 1e9:,.3g} G"
        differences = f"{_difference(out, exact_out):.0e}", f"{off:.0e}"
        yield [name, timing.milliseconds(forward), timing.milliseconds(both), rate, *differences]


def _difference(x: Array, exact: Array) -> float:
    return float(jnp.abs(x.astype(jnp.float32) - exact).max())


def main() -> None:
    """Prints the table."""
    print(timing.machine())
    timing.start_table(f"Batches of {_BATCH.value}", COLUMNS)
    for size, dtype in itertools.product(
        sizes(configs.parse(_CONFIG.value)), map(jnp.dtype, _DTYPES.value)
    ):
        number, h, w, heads, channels = size
        about = [f"{number}", f"{h} x {w}", f"{heads} x {channels}", f"{dtype}"]
        for cells in rows((_BATCH.value, h * w, heads, channels), dtype, _SECONDS.value):
            timing.print_row([*about, *cells])


if __name__ == "__main__":
    command(main, config="configs/imagenet.py")
