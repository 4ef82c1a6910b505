import numpy as np
import pytest
from PIL import Image, ImageEnhance

from rdm_jax.data.postprocess import PRESETS, postprocess

# The weights of PIL's grey.
LUMA = (0.299, 0.587, 0.114)


def images(batch=3, channels=3):
    """Smooth coloured images of levels from 0 to 255, all different."""
    ramp = np.linspace(0, 1, 16 * 12 * channels).reshape(16, 12, channels)
    return np.stack([np.uint8(np.round(255 * ramp ** (k + 1))) for k in range(batch)])


def blended(x, towards, factor):
    return np.clip(towards + factor * (x - towards), 0, 255)


def test_none_is_the_identity():
    x = images()
    assert postprocess(x, "none") is x


@pytest.mark.parametrize("channels", [1, 3])
def test_imagenet_changes_brightness_only(channels):
    x = images(channels=channels)
    out = postprocess(x, "rdm_imagenet")
    assert out.shape == x.shape and out.dtype == np.uint8
    # One rounding.
    np.testing.assert_allclose(out.astype(float), np.clip(np.round(1.06 * x), 0, 255), atol=1)
    assert (out[x > 241] == 255).all() and (out > x).any()


def test_celebahq_changes_contrast_brightness_colour():
    x = images()
    out = postprocess(x, "rdm_celebahq")
    for image, result in zip(x, out, strict=True):
        picture = ImageEnhance.Contrast(Image.fromarray(image)).enhance(0.9)
        picture = ImageEnhance.Color(ImageEnhance.Brightness(picture).enhance(1.05)).enhance(0.99)
        np.testing.assert_array_equal(result, np.asarray(picture))
        # The same in real numbers: contrast is about the mean grey, colour about each pixel's own.
        expected = blended(image.astype(float), np.mean(image @ LUMA), 0.9)
        expected = blended(expected, 0, 1.05)
        expected = blended(expected, (expected @ LUMA)[..., None], 0.99)
        np.testing.assert_allclose(
            result.astype(float), expected, atol=3
        )  # three roundings and the mean's


def test_order_of_steps_matters():
    x = images()
    other = []
    for image in x:
        picture = Image.fromarray(image)
        for enhance, factor in PRESETS["rdm_celebahq"][::-1]:
            picture = enhance(picture).enhance(factor)
        other.append(np.asarray(picture))
    assert np.max(np.abs(postprocess(x, "rdm_celebahq").astype(int) - np.stack(other))) > 2


@pytest.mark.parametrize("preset", PRESETS)
def test_grey_images_equal_grey_rgb_images(preset):
    grey = images(channels=1)
    out = postprocess(grey, preset)
    assert out.shape == grey.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(
        np.repeat(out, 3, axis=-1), postprocess(np.repeat(grey, 3, axis=-1), preset)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_images_are_independent_and_not_modified(preset):
    x = images()
    kept = x.copy()
    together = postprocess(x, preset)
    np.testing.assert_array_equal(postprocess(x[1:2], preset), together[1:2])
    np.testing.assert_array_equal(x, kept)


def test_unknown_presets_raise():
    with pytest.raises(KeyError, match="sharp"):
        postprocess(images(), "sharp")
