"""EfficientNet-Lite0 as a feature extractor, as pure functions.

The network is that of Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks" (2019), in the variant that its authors published without squeeze-and-excitation and with
ReLU6, trained on ImageNet. The weights come from a PyTorch port, and layers keep their names there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

SIZE = 224
EPSILON = 1e-3  # of batch normalisation
SIZES = {"features": 1280, "logits": 1000}

Params = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, batch normalisation and, with `relu`, ReLU6.

    Attributes:
      name, norm: of the two in the file.
      depthwise: whether every channel has a kernel of its own.
    """

    name: str
    norm: str
    kernel: int
    inputs: int
    channels: int
    stride: int = 1
    depthwise: bool = False
    relu: bool = True


# Inverted bottlenecks: repetitions, kernel, stride of the first one, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = Conv("_conv_stem", "_bn0", 3, 3, 32, stride=2)
HEAD = Conv("_conv_head", "_bn1", 1, STAGES[-1][-1], SIZES["features"])


def _blocks() -> Iterator[list[Conv]]:
    """The layers of each inverted bottleneck."""
    number, inputs = 0, STEM.channels
    for repetitions, kernel, first_stride, expansion, channels in STAGES:
        for stride in (first_stride, *[1] * (repetitions - 1)):
            prefix, inner = f"_blocks.{number}", inputs * expansion

            def conv(name: str, norm: str, *sizes: int, prefix: str = prefix, **more: bool) -> Conv:
                return Conv(f"{prefix}.{name}", f"{prefix}.{norm}", *sizes, **more)

            expand = [conv("_expand_conv", "_bn0", 1, inputs, inner)] if expansion > 1 else []
            yield [
                *expand,
                conv("_depthwise_conv", "_bn1", kernel, inner, inner, stride, depthwise=True),
                conv("_project_conv", "_bn2", 1, inner, channels, relu=False),
            ]
            number, inputs = number + 1, channels


BLOCKS = tuple(_blocks())
LAYERS = (STEM, *(layer for block in BLOCKS for layer in block), HEAD)


def preprocess(images: UInt8[Array, "b h w c"]) -> Float[Array, "b 224 224 3"]:
    """The network's input: (x - 127) / 128 of the resized images; grey ones get three channels.

    Resizing is bilinear with half-pixel centres, clamped edges and no antialiasing, so that grain
    is not averaged out. The scale is the one that the network was trained with, by its authors'
    code and by the stored variances of its first layers; the PyTorch port's example has another.
    """
    b, _, _, c = images.shape
    x = jax.image.resize(
        images.astype(jnp.float32),
        (b, SIZE, SIZE, c),
        "linear",
        antialias=False,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.broadcast_to((x - 127) / 128, (b, SIZE, SIZE, 3))


def _conv(params: Params, layer: Conv, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    p = params[layer.name]
    convolved = _depthwise if layer.depthwise else _dense
    x = convolved(x, p["kernel"], layer.stride) * p["scale"] + p["shift"]
    return jnp.clip(x, 0, 6) if layer.relu else x


# Padding is as in TensorFlow: with stride 2, the odd row of it is the last one.
def _dense(x: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """A convolution of each channel, as a sum of shifted images: on CPUs three times as fast."""
    steps = (stride, stride)
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], steps, "SAME")
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return sum(
        x[:, i : i + stride * height : stride, j : j + stride * width : stride] * kernel[i, j, 0]
        for i, j in np.ndindex(kernel.shape[:2])
    )


def apply(params: Params, images: UInt8[Array, "b h w c"]) -> dict[str, Float[Array, "b _"]]:
    """Features of images, all float32.

    Args:
      params: from `efficientnet_weights.load`.
      images: of any size; RGB, or grey (c = 1).

    Returns:
      'features': (b, 1280), the mean over all places of the last convolution.
      'logits': (b, 1000), of ImageNet's classes.
    """
    x = _conv(params, STEM, preprocess(images))
    for block in BLOCKS:
        y = x
        for layer in block:
            y = _conv(params, layer, y)
        x = x + y if x.shape == y.shape else y
    features = _conv(params, HEAD, x).mean((1, 2))
    fc = params["_fc"]
    logits = jnp.matmul(features, fc["kernel"], precision=jax.lax.Precision.HIGHEST) + fc["bias"]
    return {"features": features, "logits": logits}
