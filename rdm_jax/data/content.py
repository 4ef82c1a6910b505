"""A hash of the images of a set (names, labels and decoded pixels), independent of their storage.

Names are unique and decide the order, so that images can be hashed one by one, in any order and in
any partition.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8

_RANGE = 2**256


def image_hash(name: str, label: int, pixels: UInt8[np.ndarray, "h w c"], caption: str = "") -> str:
    """The hash of an image, in hexadecimal; `label` is -1 without classes, `caption` '' without."""
    about = [name, label, caption] if caption else [name, label]
    digest = hashlib.sha256(json.dumps(about).encode() + b"\n")
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def total(hashes: Iterable[str]) -> str:
    """The combined hash of images or of parts of a set; zeros for none."""
    return f"{sum(int(found, 16) for found in hashes) % _RANGE:064x}"


def set_hash(images: str, image_shape: Sequence[int], class_names: Sequence[str]) -> str:
    """The hash of a set, from the `total` of its images and what they have in common."""
    return hashlib.sha256(
        json.dumps([images, list(image_shape), list(class_names)]).encode()
    ).hexdigest()
