"""Positions of tokens on a grid: a fixed embedding that is added, and rotations of channels."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sine_cosine(height: int, width: int, channels: int) -> Float[np.ndarray, "n c"]:
    """The fixed embedding of MAE (arXiv 2111.06377) for each token of a grid, row by row; float32.

    The first half of the channels belongs to the column, the second to the row; each half is
    [sin, cos] of the position times 10000^(-i / (channels / 4)).
    """
    frequencies = 10000.0 ** -(np.arange(channels // 4) / (channels / 4))

    def of(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.mgrid[:height, :width]
    return np.concatenate([of(column), of(row)], axis=1).astype(np.float32)


class Rotary(NamedTuple):
    """Two-dimensional rotary embedding (arXiv 2104.09864; by rows and columns as in arXiv
    2303.11331).

    Pairs of neighbouring channels turn by position times frequency: the first half of the pairs
    with the row, the second with the column. Here the channels are in the order of `halves`, so
    that a pair's members lie half a head apart, and are not shuffled within vector registers.

    Attributes:
      cos, sin: (n, d / 2) float32, of each token and pair; d channels in a head.
    """

    cos: np.ndarray
    sin: np.ndarray

    @classmethod
    def of(
        cls, height: int, width: int, channels: int, *, before: int = 0, after: int = 0
    ) -> "Rotary":
        """For a grid of tokens, row by row, between others that do not turn.

        Args:
          height, width: of the grid.
          channels: of a head, a multiple of 4.
          before, after: numbers of tokens without a position.
        """
        frequencies = 10000.0 ** -(np.arange(channels // 4) / (channels / 4))
        angles = [axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:height, :width]]
        angle = np.concatenate(angles, axis=1)
        without = [np.zeros((count, channels // 2)) for count in (before, after)]
        angle = np.concatenate([without[0], angle, without[1]])
        return cls(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))

    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """cos and signed sin, (n, d) float32, of the published order of channels, in which the
        members of a pair are neighbours: x cos + x_neighbour sin is x turned."""
        return np.repeat(self.cos, 2, 1), np.stack([-self.sin, self.sin], 2).reshape(
            len(self.sin), -1
        )

    def __call__(self, x: Float[Array, "b n k d"]) -> Float[Array, "b n k d"]:
        """Turns x, of the channel order of `halves`; float32."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def halves(x: Float[Array, "*k c"], heads: int = 1) -> Float[Array, "*k c"]:
    """Puts the channels of each head in the order: all with even number, then all with odd."""
    *lead, c = x.shape
    x = jnp.moveaxis(x.reshape(*lead, heads, c // heads // 2, 2), -1, -2)
    return x.reshape(*lead, c)
