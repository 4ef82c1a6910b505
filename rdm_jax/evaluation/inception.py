"""Inception-v3 as the Frechet inception distance uses it, as pure functions.

The network is that of Szegedy et al., "Rethinking the Inception Architecture for Computer Vision"
(2015), trained on ImageNet and published by its authors as a TensorFlow graph. A comparable FID
needs that graph's weights, resizing and pooling, which differ from the defaults of libraries. The
weights come from the common PyTorch port, and layers keep their names there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

SIZE = 299
EPSILON = 1e-3  # of batch normalisation
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
SIZES = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}

Params = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, batch normalisation and ReLU; `valid` means no padding."""

    name: str
    kernel: tuple[int, int]
    channels: int
    stride: int = 1
    valid: bool = False


# The network as data: a list is a sequence of parts, a tuple is parallel branches whose channels
# are concatenated, and a string is 3 x 3 pooling: 'halve' (maximum, stride 2), 'mean' or 'max'
# (stride 1).
Part = Conv | str | list | tuple


def _branch(
    prefix: str, *layers: tuple[str, tuple[int, int], int], halve: bool = False
) -> list[Part]:
    """A sequence of layers (name, kernel, channels); with `halve` the last has stride 2."""
    convs = [Conv(f"{prefix}.{name}", kernel, channels) for name, kernel, channels in layers]
    if halve:
        convs[-1] = Conv(convs[-1].name, convs[-1].kernel, convs[-1].channels, stride=2, valid=True)
    return convs


_1X1, _3X3, _5X5, _1X7, _7X1, _1X3, _3X1 = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)


def _block_a(prefix: str, pooled: int) -> Part:
    double = [
        ("branch3x3dbl_1", _1X1, 64),
        ("branch3x3dbl_2", _3X3, 96),
        ("branch3x3dbl_3", _3X3, 96),
    ]
    return (
        _branch(prefix, ("branch1x1", _1X1, 64)),
        _branch(prefix, ("branch5x5_1", _1X1, 48), ("branch5x5_2", _5X5, 64)),
        _branch(prefix, *double),
        ["mean", *_branch(prefix, ("branch_pool", _1X1, pooled))],
    )


def _block_b(prefix: str) -> Part:
    double = [
        ("branch3x3dbl_1", _1X1, 64),
        ("branch3x3dbl_2", _3X3, 96),
        ("branch3x3dbl_3", _3X3, 96),
    ]
    return (
        _branch(prefix, ("branch3x3", _3X3, 384), halve=True),
        _branch(prefix, *double, halve=True),
        ["halve"],
    )


def _block_c(prefix: str, inner: int) -> Part:
    single = [
        ("branch7x7_1", _1X1, inner),
        ("branch7x7_2", _1X7, inner),
        ("branch7x7_3", _7X1, 192),
    ]
    double = [
        (f"branch7x7dbl_{n}", kernel, inner) for n, kernel in enumerate((_1X1, _7X1, _1X7, _7X1), 1)
    ]
    return (
        _branch(prefix, ("branch1x1", _1X1, 192)),
        _branch(prefix, *single),
        _branch(prefix, *double, ("branch7x7dbl_5", _1X7, 192)),
        ["mean", *_branch(prefix, ("branch_pool", _1X1, 192))],
    )


def _block_d(prefix: str) -> Part:
    third = [
        (f"branch7x7x3_{n}", kernel, 192) for n, kernel in enumerate((_1X1, _1X7, _7X1, _3X3), 1)
    ]
    return (
        _branch(prefix, ("branch3x3_1", _1X1, 192), ("branch3x3_2", _3X3, 320), halve=True),
        _branch(prefix, *third, halve=True),
        ["halve"],
    )


def _block_e(prefix: str, pooling: str) -> Part:
    def fork(name: str) -> Part:
        return tuple(
            _branch(prefix, (name + side, kernel, 384))
            for side, kernel in (("a", _1X3), ("b", _3X1))
        )

    return (
        _branch(prefix, ("branch1x1", _1X1, 320)),
        [*_branch(prefix, ("branch3x3_1", _1X1, 384)), fork("branch3x3_2")],
        [
            *_branch(prefix, ("branch3x3dbl_1", _1X1, 448), ("branch3x3dbl_2", _3X3, 384)),
            fork("branch3x3dbl_3"),
        ],
        [pooling, *_branch(prefix, ("branch_pool", _1X1, 192))],
    )


NETWORK: Part = [
    Conv("Conv2d_1a_3x3", _3X3, 32, stride=2, valid=True),
    Conv("Conv2d_2a_3x3", _3X3, 32, valid=True),
    Conv("Conv2d_2b_3x3", _3X3, 64),
    "halve",
    Conv("Conv2d_3b_1x1", _1X1, 80),
    Conv("Conv2d_4a_3x3", _3X3, 192, valid=True),
    "halve",
    *(_block_a(f"Mixed_5{letter}", pooled) for letter, pooled in (("b", 32), ("c", 64), ("d", 64))),
    _block_b("Mixed_6a"),
    *(
        _block_c(f"Mixed_6{letter}", inner)
        for letter, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192))
    ),
    _block_d("Mixed_7a"),
    _block_e("Mixed_7b", "mean"),
    _block_e("Mixed_7c", "max"),  # as in the published graph
]


def _through(
    part: Part,
    x: Any,
    conv: Callable[[Conv, Any], Any],
    pool: Callable[[str, Any], Any],
    join: Callable,
) -> Any:
    """Folds a value through the network: arrays, or numbers of channels."""
    if isinstance(part, list):
        for one in part:
            x = _through(one, x, conv, pool, join)
        return x
    if isinstance(part, tuple):
        return join([_through(branch, x, conv, pool, join) for branch in part])
    return pool(part, x) if isinstance(part, str) else conv(part, x)


def _layers() -> dict[str, tuple[int, int, int, int]]:
    """(height, width, inputs, outputs) of every convolution's kernel, by name."""
    kernels = {}

    def conv(layer: Conv, channels: int) -> int:
        kernels[layer.name] = (*layer.kernel, channels, layer.channels)
        return layer.channels

    _through(NETWORK, 3, conv, lambda _, channels: channels, sum)
    return kernels


LAYERS = _layers()


def resize(images: Num[Array, "b h w c"], size: int = SIZE) -> Float[Array, "b {size} {size} c"]:
    """Bilinear resizing as in the graph: target pixel i is at source i h / size.

    Unlike in most libraries, there are no half-pixel centres.

    Args:
      images: uint8 or float (b, h, w, c), returned as float32 if they have the size.
      size: height and width of the result, which is float32.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):  # the order in which the graph rounds
        length = x.shape[axis]
        if length != size:
            # In float32 as in the graph; on the host, as it depends on the sizes only.
            source = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
            lower = np.floor(source).astype(np.int32)
            below = jnp.take(x, lower, axis, mode="clip")
            above = jnp.take(x, lower + 1, axis, mode="clip")  # clip: the last pixel repeats
            fraction = np.expand_dims(source - lower.astype(np.float32), (0, 3, 3 - axis))
            x = below + (above - below) * fraction
    return x


def preprocess(images: UInt8[Array, "b h w c"]) -> Float[Array, "b 299 299 3"]:
    """The network's input: resized, in [-1, 127/128]; grey images get three equal channels."""
    x = (resize(images) - 128) / 128
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def _sum_of_neighbours(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME")


def _pool(kind: str, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    if kind == "mean":
        ones = jnp.ones((1, *x.shape[1:3], 1))
        return _sum_of_neighbours(x) / _sum_of_neighbours(ones)  # padding is not counted
    strides, padding = ((1, 2, 2, 1), "VALID") if kind == "halve" else ((1, 1, 1, 1), "SAME")
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), strides, padding)


def apply(params: Params, images: UInt8[Array, "b h w c"]) -> dict[str, Float[Array, "b _"]]:
    """Features of images, all float32.

    Args:
      params: from `load`.
      images: of any size; RGB, or grey (c = 1).

    Returns:
      'pool': (b, 2048), the features of FID (Heusel et al. 2017).
      'spatial': (b, 2023), those of sFID (Nash et al. 2021): the first 7 channels of a layer of
        17 x 17, in row-major order.
      'logits': (b, 1008), of the inception score (Salimans et al. 2016), without the last layer's
        bias.
    """
    kept = {}

    def conv(layer: Conv, x: Array) -> Array:
        p = params[layer.name]
        x = jax.lax.conv_general_dilated(
            x,
            p["kernel"],
            (layer.stride, layer.stride),
            "VALID" if layer.valid else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x * p["scale"] + p["shift"])
        if layer.name == SPATIAL_LAYER:
            kept["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        return x

    x = _through(
        NETWORK, preprocess(images), conv, _pool, lambda branches: jnp.concatenate(branches, -1)
    )
    pool = x.mean((1, 2))
    logits = jnp.matmul(pool, params["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)
    return {"pool": pool, "logits": logits} | kept
