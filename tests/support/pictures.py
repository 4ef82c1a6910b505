"""What tests ask of pictures: that they show what they are of, and not only a frame around it."""

import numpy as np
from PIL import Image

CURVES = ((31, 119, 180), (255, 127, 14))  # matplotlib's first two colours


def pixels(picture) -> np.ndarray:
    """Of a file or an array, int (h, w, 3)."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)
    return np.asarray(image.convert("RGB"), int)


def shows_images(picture) -> bool:
    """Whether much of it is of many colours; a frame with a caption is neither."""
    values = pixels(picture).reshape(-1, 3)
    inked = (values.min(1) < 240).mean()
    return inked > 0.05 and len(np.unique(values[values.min(1) < 240], axis=0)) > 30


def shows_a_curve(picture) -> bool:
    """Whether matplotlib has drawn a curve, across a tenth of the width at least."""
    values = pixels(picture)
    found = [(np.abs(values - colour).max(2) < 40).any(0).mean() for colour in CURVES]
    return max(found) > 0.1


def are_samples(images: np.ndarray) -> bool:
    """Whether no image is of one colour, and no two are the same."""
    return all(image.std() > 1 for image in images) and len(
        {image.tobytes() for image in images}
    ) == len(images)
