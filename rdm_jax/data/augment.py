"""EDM's geometric augmentation (arXiv 2206.00364, appendix F.2): flips, then one affine map.

The network is conditioned on nine labels that describe the augmentation of its image, so that
augmentations do not leak into samples: sampling uses zeros, the labels of an unchanged image.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Key

LABELS = 9

# The low-pass filter of the wavelet sym6. Its shifts by even numbers are orthonormal, so `halve`
# inverts `double` exactly. The sixth tap is by far the largest: with it in the middle, pixel i of
# an image is at index 2 i of the doubled one.
_SYM6 = np.asarray([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
_BEFORE, _AFTER = 5, 6  # taps on either side of the middle one


class Transformation(NamedTuple):
    """The augmentation of one image, or of a batch; applied in this order, zeros for the identity.

    Attributes:
      x_flip, y_flip: 1 for a horizontal or a vertical flip, else 0.
      scale: log2 of the magnification, in units of `scale_std`.
      rotation: radians counterclockwise.
      anisotropy: log2 of the stretching along the axis and of the shrinking across it, in units of
        `anisotropy_std`.
      axis: direction of the stretching, radians counterclockwise from the horizontal.
      shift_x, shift_y: to the right and down, in units of `shift_std` of the width and of the
        height.
    """

    x_flip: Float[Array, "*b"]
    y_flip: Float[Array, "*b"]
    scale: Float[Array, "*b"]
    rotation: Float[Array, "*b"]
    anisotropy: Float[Array, "*b"]
    axis: Float[Array, "*b"]
    shift_x: Float[Array, "*b"]
    shift_y: Float[Array, "*b"]


def mirror(images: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
    """Flips half of the images horizontally, each by its own key."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The distribution of transformations; the defaults are those of the published commands.

    Attributes:
      probability: of each transformation except the horizontal flip, which always has 1/2; 0.2 for
        CelebA-HQ.
      scale_std, anisotropy_std: standard deviations of log2 of the magnification and of the
        stretching.
      shift_std: standard deviation of the shifts, as a fraction of the width and of the height.
    """

    probability: float = 0.12
    scale_std: float = 0.2
    anisotropy_std: float = 0.2
    shift_std: float = 0.125

    def draw(self, key: Key[Array, ""]) -> Transformation:
        """The transformation of one image; 0 where a gate is closed. Both shifts share a gate."""
        gate_key, coin_key, normal_key, angle_key = jax.random.split(key, 4)
        flip, scale, rotate, stretch, shift = jax.random.uniform(gate_key, (5,)) < self.probability
        x_flip, y_flip, turn_axis = jax.random.bernoulli(coin_key, 0.5, (3,))
        normal = jax.random.normal(normal_key, (4,))
        rotation, axis = jax.random.uniform(angle_key, (2,), minval=-jnp.pi, maxval=jnp.pi)
        return Transformation(
            x_flip=x_flip.astype(normal.dtype),
            y_flip=(flip & y_flip).astype(normal.dtype),
            scale=scale * normal[0],
            rotation=rotate * rotation,
            anisotropy=stretch * normal[1],
            axis=(stretch & turn_axis) * axis,
            shift_x=shift * normal[2],
            shift_y=shift * normal[3],
        )

    def labels(self, t: Transformation) -> Float[Array, "*b 9"]:
        """The labels that the network is conditioned on."""
        return jnp.stack(
            [
                t.x_flip,
                t.y_flip,
                t.scale,
                jnp.cos(t.rotation) - 1,
                jnp.sin(t.rotation),
                t.anisotropy * jnp.cos(t.axis),
                t.anisotropy * jnp.sin(t.axis),
                t.shift_x,
                t.shift_y,
            ],
            -1,
        )

    def transform(
        self, images: Float[Array, "b h w c"], t: Transformation
    ) -> Float[Array, "b h w c"]:
        """Transforms each image about its centre, padded by its reflection and then by zeros."""
        t = jax.tree.map(lambda a: a.astype(images.dtype), t)
        return jax.vmap(self._transform_one)(images, t)

    def _transform_one(
        self, image: Float[Array, "h w c"], t: Transformation
    ) -> Float[Array, "h w c"]:
        """Transforms at twice the resolution, where bilinear interpolation loses little."""
        h, w, _ = image.shape
        image = jnp.where(t.x_flip > 0, image[:, ::-1], image)
        image = jnp.where(t.y_flip > 0, image[::-1], image)
        # The widest reflection possible; one draw in a million needs more.
        padded = jnp.pad(image, ((h - 1, h - 1), (w - 1, w - 1), (0, 0)), "reflect")
        doubled = double(double(padded, 0), 1)

        def coordinates(size: int) -> Float[Array, " n"]:
            """The coordinates that `halve` needs, relative to the centre at `size - 1`."""
            return jnp.arange(-_BEFORE, 2 * size - 1 + _AFTER, dtype=image.dtype) - (size - 1)

        x = coordinates(w)[None, :] - 2 * w * self.shift_std * t.shift_x
        y = coordinates(h)[:, None] - 2 * h * self.shift_std * t.shift_y
        m = self._inverse(t)
        # From the centre to the corner of the padding: size - 1, plus twice the margin.
        rows = m[1, 0] * x + m[1, 1] * y + 3 * (h - 1)
        columns = m[0, 0] * x + m[0, 1] * y + 3 * (w - 1)

        def resample(channel: Float[Array, "h2 w2"]) -> Float[Array, "h3 w3"]:
            return map_coordinates(channel, [rows, columns], order=1, mode="constant")

        return halve(halve(jax.vmap(resample, -1, -1)(doubled), 0), 1)

    def _inverse(self, t: Transformation) -> Float[Array, "2 2"]:
        """The matrix from (x, y) of the output, shifted back, to that of the input.

        y points down, so that `_rotation` turns clockwise.
        S(scale)^-1 R(rotation) R(-axis) S(stretch, 1 / stretch)^-1 R(axis), the two rotations in
        the middle being one.
        """
        stretch = jnp.exp2(self.anisotropy_std * t.anisotropy)
        parts = (
            _rotation(t.rotation - t.axis),
            jnp.diag(jnp.stack([1 / stretch, stretch])),
            _rotation(t.axis),
        )
        return jnp.linalg.multi_dot(parts, precision=jax.lax.Precision.HIGHEST) / jnp.exp2(
            self.scale_std * t.scale
        )

    def __call__(
        self, images: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b 9"]]:
        """Transforms each image as drawn by its own key; returns the images and their labels."""
        t = jax.vmap(self.draw)(keys)
        return self.transform(images, t), self.labels(t)


def _rotation(angle: Float[Array, ""]) -> Float[Array, "2 2"]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])


def double(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Upsamples an axis by 2: interleaves zeros and convolves with sym6; zeros outside.

    y_m = sqrt(2) sum_i f_{m - 2 i + 5} x_i, which uses the odd taps for even m, and the even taps
    for odd m.
    """
    x = jnp.moveaxis(x, axis, 0)
    n, taps = len(x), jnp.asarray(np.sqrt(2) * _SYM6, x.dtype)
    x = jnp.pad(x, [(3, 3)] + [(0, 0)] * (x.ndim - 1))
    even = sum(taps[2 * j + 1] * x[5 - j : 5 - j + n] for j in range(6))
    odd = sum(taps[2 * j] * x[6 - j : 6 - j + n] for j in range(6))
    return jnp.moveaxis(jnp.stack([even, odd], 1).reshape(2 * n, *x.shape[1:]), 0, axis)


def halve(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Downsamples an axis by 2; half the transpose of `double`, and its inverse.

    y_i = sum_m f_{m - 2 i + 5} x_m / sqrt(2); `x` begins at m = -5 and ends at m = 2 n + 4, n being
    the length of y.
    """
    n, taps = x.shape[axis] // 2 - 5, jnp.asarray(_SYM6 / np.sqrt(2), x.dtype)
    return sum(taps[k] * jax.lax.slice_in_dim(x, k, k + 2 * n - 1, 2, axis) for k in range(12))
