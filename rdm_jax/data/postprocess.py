"""Enhancement that the released RDM samplers apply to samples before FID is measured.

It is undocumented there, and an option that is off by default here.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

# In the order of application; factor 1 leaves an image unchanged.
PRESETS = {
    "none": (),
    "rdm_imagenet": ((ImageEnhance.Brightness, 1.06),),
    "rdm_celebahq": (
        (ImageEnhance.Contrast, 0.9),
        (ImageEnhance.Brightness, 1.05),
        (ImageEnhance.Color, 0.99),
    ),
}


def postprocess(images: UInt8[np.ndarray, "b h w c"], preset: str) -> UInt8[np.ndarray, "b h w c"]:
    """Applies one of PRESETS to every image, of 1 or 3 channels."""
    if not PRESETS[preset] or not len(images):
        return images
    return np.stack([_enhanced(image, PRESETS[preset]) for image in images])


def _enhanced(image: UInt8[np.ndarray, "h w c"], steps: tuple) -> UInt8[np.ndarray, "h w c"]:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    for enhance, factor in steps:
        picture = enhance(picture).enhance(factor)
    return np.asarray(picture).reshape(image.shape)
