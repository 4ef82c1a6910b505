"""Signal-to-noise ratio of images by frequency, per kind of noise, at two resolutions: README.md.

python -m experiments.spectrum.spectrum --source emoji:package/assets --source folder:photographs
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from experiments import common
from rdm_jax.cli.command import command
from rdm_jax.data.image_sets import ImageSet, open_direct
from rdm_jax.data.images import ImageSpec
from rdm_jax.diffusion import blurring
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.render.tables import markdown
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.random_streams import root_key

_SOURCES = flags.DEFINE_multi_string(
    "source", [], "Of images, as config.data.source; may be given several times."
)
_SIZE = flags.DEFINE_integer("size", 256, "Side of the large images.")
_FACTOR = flags.DEFINE_integer(
    "factor", 4, "By which the small ones are smaller: p, and the side s of the blocks."
)
_SIGMA = flags.DEFINE_float("sigma", 1.0, "Noise level, per pixel the same everywhere.")
_COUNT = flags.DEFINE_integer(
    "count", 256, "Images of each source, evenly chosen, and draws of each noise."
)
_OUT = flags.DEFINE_string("out", "experiments/spectrum", "Folder for the pictures.")

# Frequencies of the table, in half-periods over an image's side.
SHOWN = (1, 2, 4, 8, 16, 31, 48, 63)
BATCH = 16
MIXTURE = RelayProcess().block_scale


def power(images: Float[Array, "b h w c"]) -> Float[Array, "h w"]:
    """Mean square of the coefficients of the orthonormal two-dimensional DCT-II of whole images."""
    return jnp.mean(jax.scipy.fft.dctn(images, axes=(1, 2), norm="ortho") ** 2, (0, 3))


def signal_power(images: ImageSet, factor: int) -> np.ndarray:
    """The power of real images, which are pooled by the factor first."""
    numbers = np.unique(np.linspace(0, len(images) - 1, min(_COUNT.value, len(images))).astype(int))
    parts = np.array_split(numbers, -(-len(numbers) // BATCH))
    found = [
        power(Pixels().encode(jnp.asarray(images.batch(part)["image"]), factor)) * len(part)
        for part in parts
    ]
    return np.asarray(sum(found)) / len(numbers)


def noise_power(block_scale: float, white_scale: float, size: int, block: int) -> np.ndarray:
    """The power of white_scale e + block_scale Block[s](e'), estimated with unit white noise."""

    @jax.jit
    def draw(key: Array) -> Array:
        white, block_white = jax.random.normal(key, (2, BATCH, size, size, 1))
        return power(
            white_scale * white + block_scale * blurring.block_noise(block_white, block=block)
        )

    draws = -(-_COUNT.value // BATCH)
    return np.asarray(sum(draw(root_key(n)) for n in range(draws))) / draws


def predicted_noise_power(
    block_scale: float, white_scale: float, size: int, block: int
) -> np.ndarray:
    """The same from the covariance of block noise on a large torus.

    A moving sum has the power (sin(s w / 2) / sin(w / 2))^2 per axis.
    """
    omega = np.pi * np.arange(1, size) / size
    axis = (
        np.concatenate([[block**2], (np.sin(block * omega / 2) / np.sin(omega / 2)) ** 2]) / block
    )
    return white_scale**2 + block_scale**2 * np.outer(axis, axis)


def radial(values: np.ndarray) -> np.ndarray:
    """Means over rings: entry k is of coefficients (i, j) with round(sqrt(i^2 + j^2)) = k."""
    i, j = np.indices(values.shape)
    ring = np.rint(np.hypot(i, j)).astype(int)
    return (np.bincount(ring.ravel(), values.ravel()) / np.bincount(ring.ravel()))[: len(values)]


def decibels(ratio: np.ndarray) -> np.ndarray:
    """A ratio in dB: 10 log10."""
    return 10 * np.log10(ratio)


def ratios(images: ImageSet) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields a name and the signal-to-noise ratio by frequency in dB, measured and predicted.

    The prediction starts from white noise on small images. For large images: the same waves as in
    the pooled images, over factor^2 times as many pixels, before pooling damped them as a moving
    sum does; aliasing from higher frequencies is left out.
    """
    size, p, sigma = _SIZE.value, _FACTOR.value, _SIGMA.value
    small = radial(signal_power(images, p))
    large = radial(signal_power(images, 1))[: len(small)]
    unfolded = p**4 * small / radial(predicted_noise_power(1.0, 0.0, size, p))[: len(small)]
    kinds = {"white": (0.0, 1.0), "block": (1.0, 0.0), f"white + {MIXTURE:g} block": (MIXTURE, 1.0)}
    white = decibels(small / (sigma**2 * radial(noise_power(0.0, 1.0, size // p, p))))
    yield f"white, {size // p}", white, decibels(small / sigma**2)
    for name, (block_scale, white_scale) in kinds.items():
        measured = radial(noise_power(block_scale, white_scale, size, p))[: len(small)]
        predicted = radial(predicted_noise_power(block_scale, white_scale, size, p))[: len(small)]
        yield (
            f"{name}, {size}",
            decibels(large / (sigma**2 * measured)),
            decibels(unfolded / (sigma**2 * predicted)),
        )


def draw(curves: dict[str, list[tuple[str, np.ndarray, np.ndarray]]], path: Path) -> None:
    """Draws one panel per source: measured ratios as lines, predicted ones as dots."""
    figure = Figure(figsize=(6 * len(curves), 4.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, curves.items(), strict=True):
        for name, measured, predicted in rows:
            frequency = np.arange(1, len(measured))
            (line,) = axes.plot(frequency, measured[1:], label=name)
            axes.plot(frequency[::3], predicted[1::3], "o", markersize=3, color=line.get_color())
        title = f"{title}: signal-to-noise ratio at sigma {_SIGMA.value:g}"
        axes.set(
            title=title, xlabel="half-periods over the image's side", ylabel="dB", xscale="log"
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(title="noise, side of the image (dots: predicted)")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def table(rows: list[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """Each noise's difference from white noise on small images, measured (predicted)."""
    (_, base, base_predicted), *others = rows
    shown = [k for k in SHOWN if k < len(base)]
    cells = [["white noise on small images", *(f"{base[k]:.1f} dB" for k in shown)]]
    for name, measured, predicted in others:
        differences = [(measured[k] - base[k], predicted[k] - base_predicted[k]) for k in shown]
        cells.append(
            [name, *(f"{found:+.1f} ({foretold:+.1f})" for found, foretold in differences)]
        )
    return markdown(["half-periods over the image's side", *map(str, shown)], cells)


def main() -> None:
    """Prints a table for every source, and draws them."""
    common.start()
    out = local_path(_OUT.value, "--out")
    spec, curves = ImageSpec(_SIZE.value, _SIZE.value, 3), {}
    for source in _SOURCES.value:
        is_emoji = source.startswith("emoji:")
        skin_tones = "drop" if is_emoji else ""
        images = open_direct(source, spec, cache_bytes=2**32, skin_tones=skin_tones)
        title = "emoji" if is_emoji else Path(source.partition(":")[2]).name
        name = f"{title} ({min(_COUNT.value, len(images)):,} images)"
        curves[name] = list(ratios(images))
        print(f"\n{name}\n\n{table(curves[name])}")
    draw(curves, out / "spectrum.png")


if __name__ == "__main__":
    command(main)
