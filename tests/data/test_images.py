"""Images of every kind: 8-bit conversion, crop and resize."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data import images
from rdm_jax.data.images import ImageSpec
from rdm_jax.runtime.errors import BadImage

WHITE = (255, 255, 255)


def read_back(image, tmp_path, name="image.png", channels=3, background=WHITE, **options):
    """The pixels after a round trip through a file, at the original size."""
    image.save(tmp_path / name, **options)
    return images.to_uint8(images.open_image(tmp_path / name), channels, background)


def test_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(read_back(Image.fromarray(pixels), tmp_path), pixels)


def test_grey_in_one_and_three_channels(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(
        read_back(Image.fromarray(pixels), tmp_path, channels=1), pixels[..., None]
    )
    np.testing.assert_array_equal(
        read_back(Image.fromarray(pixels), tmp_path), np.stack([pixels] * 3, -1)
    )


def test_colour_to_one_channel_is_luma(tmp_path):
    pixels = read_back(Image.new("RGB", (2, 2), (255, 0, 0)), tmp_path, channels=1)
    assert pixels.shape == (2, 2, 1) and (pixels == round(0.299 * 255)).all()


def test_one_bit_is_black_or_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(
        read_back(Image.fromarray(bits), tmp_path, channels=1)[..., 0], bits * 255
    )


def test_palette_keeps_colours_and_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    pixels = read_back(image, tmp_path, transparency=2, background=(0, 255, 0))
    np.testing.assert_array_equal(pixels, [[[10, 20, 30], [200, 100, 50], [0, 255, 0]]])


@pytest.mark.parametrize("background", [WHITE, (0, 0, 255)])
def test_alpha_is_composited_on_the_background(tmp_path, background):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 128]]], np.uint8)
    half = np.array([255, 0, 0]) * 128 / 255 + np.array(background) * 127 / 255
    pixels = read_back(Image.fromarray(rgba), tmp_path, background=background)
    np.testing.assert_array_equal(pixels[0, :2], [[255, 0, 0], background])
    np.testing.assert_allclose(pixels[0, 2], half, atol=1)


def test_hidden_colour_does_not_bleed_in(tmp_path):
    rgba = np.zeros(
        (8, 8, 4), np.uint8
    )  # Transparent black beside opaque white: white all over, at any size.
    rgba[:, 4:] = 255
    pixels = read_back(Image.fromarray(rgba), tmp_path)
    assert (images.fit(pixels, ImageSpec(3, 3)) == 255).all()


def test_grey_with_alpha_is_composited(tmp_path):
    la = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), mode="LA")
    np.testing.assert_array_equal(read_back(la, tmp_path, channels=1), [[[7], [255]]])


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 257, 128 * 257, 40000, 65535]], np.uint16)
    pixels = read_back(Image.fromarray(values), tmp_path, name, channels=1)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 1, 128, 156, 255]])


def test_sixteen_bits_keep_their_transparent_value(tmp_path):
    image = images._from_16_bits(Image.fromarray(np.array([[300, 40000]], np.uint16)))
    assert image.mode == "L"
    marked = Image.fromarray(np.array([[300, 40000]], np.uint16))
    marked.info["transparency"] = 300
    np.testing.assert_array_equal(images.to_uint8(marked, 1, WHITE), [[[255], [156]]])


def test_cmyk_is_not_inverted(tmp_path):
    image = Image.merge(
        "CMYK", [Image.new("L", (8, 8), value) for value in (0, 255, 255, 0)]
    )  # Pure red.
    np.testing.assert_allclose(
        read_back(image, tmp_path, "image.jpg", quality=100)[4, 4], [255, 0, 0], atol=3
    )


@pytest.mark.parametrize(
    "orientation, expected", [(3, [[3, 2], [1, 0]]), (6, [[2, 0], [3, 1]]), (8, [[1, 3], [0, 2]])]
)
def test_exif_rotation_is_applied(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_back(
        Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)), tmp_path, channels=1, exif=exif
    )
    np.testing.assert_array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize("name", ["image.gif", "image.webp"])
def test_animation_is_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    pixels = read_back(
        frames[0],
        tmp_path,
        name,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if "webp" in name else {}),
    )
    np.testing.assert_array_equal(pixels[0, 0], [250, 0, 0])


@pytest.mark.parametrize("mode", ["F", "La"])
def test_modes_without_8_bit_conversion_are_refused(mode):
    with pytest.raises(BadImage, match=repr(mode)):
        images.to_uint8(Image.new(mode, (2, 2)), 3, WHITE)


def test_grey_beyond_16_bits_is_refused():
    with pytest.raises(BadImage, match="70000"):
        images.to_uint8(Image.fromarray(np.full((2, 2), 70000, np.int32)), 1, WHITE)


def test_fit_is_the_identity_at_equal_size():
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(images.fit(pixels, ImageSpec(5, 7)), pixels)


def test_fit_crops_centrally_before_it_resizes():
    pixels = np.zeros((4, 12, 1), np.uint8)
    pixels[:, 4:8] = 200  # The central square; black beyond it must not be seen.
    np.testing.assert_array_equal(images.fit(pixels, ImageSpec(4, 4)), np.full((4, 4, 1), 200))
    np.testing.assert_array_equal(images.fit(pixels, ImageSpec(2, 2)), np.full((2, 2, 1), 200))


def test_fit_makes_non_square_images():
    assert images.fit(np.zeros((9, 9, 3), np.uint8), ImageSpec(2, 5)).shape == (2, 5, 3)


def png_of(pixels_per_row, rows, depth, colour, header_size=None):
    """Makes a PNG file by hand, for kinds that Pillow does not write."""
    width, height = header_size or (len(rows[0]) // pixels_per_row, len(rows))

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("colour, expected", [(2, [10, 128, 255]), (6, [10, 128, 255])])
def test_sixteen_bit_colour_is_read_at_eight(colour, expected):
    values = [10 * 257, 128 * 257, 65535] + ([65535] if colour == 6 else [])
    row = struct.pack(f">{len(values)}H", *values)
    image = images.open_image(png_of(len(row), [row], 16, colour))
    np.testing.assert_array_equal(images.to_uint8(image, 3, WHITE), [[expected]])


def test_palette_with_alpha_is_composited(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="L").convert("P")
    image.putpalette([0, 0, 0, 200, 0, 0])
    pixels = read_back(image, tmp_path, transparency=bytes([255, 0]))
    np.testing.assert_array_equal(pixels, [[[0, 0, 0], [255, 255, 255]]])


def test_open_image_refuses_too_many_pixels_undecoded():
    with pytest.raises(BadImage, match="has too many pixels .*Use at most 89,478,485 pixels"):
        images.open_image(png_of(1, [b"\0"], 8, 0, header_size=(40_000, 25_000)))
    with pytest.raises(BadImage, match=r"too many pixels \(10,000 x 9,000\)"):
        images.open_image(png_of(1, [b"\0"], 8, 0, header_size=(10_000, 9_000)))


def test_open_image_refuses_too_many_bytes_unread(tmp_path):
    with (tmp_path / "huge.webp").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(BadImage, match="bytes"):
        images.open_image(tmp_path / "huge.webp")


def test_missing_file_is_not_a_bad_image(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.open_image(tmp_path / "gone.png")


KINDS = {
    "PNG": {},
    "JPEG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_images_are_refused(kind):
    """A truncated file is refused, unless the missing part does not matter."""
    rng, whole = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(whole, kind, **KINDS[kind])
    whole = whole.getvalue()
    wanted, refused = images.to_uint8(images.open_image(whole), 3, WHITE), 0
    for length in sorted(
        {*range(0, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 12, len(whole))}
    ):
        try:
            found = images.to_uint8(images.open_image(whole[:length]), 3, WHITE)
        except BadImage:
            refused += 1
            continue
        np.testing.assert_array_equal(
            found, wanted, err_msg=f"cut to {length} of {len(whole)} bytes"
        )
    assert refused > 50


def test_adm_crop_matches_the_published_rule():
    """For squares: halve by a box filter while possible, bicubic to the shorter side, crop."""
    pixels = np.random.default_rng(3).integers(0, 256, (41, 70, 3), np.uint8)
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * 9:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    assert image.size == (17, 10)
    scale = 9 / min(image.size)
    image = np.asarray(
        image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    )
    top, left = (image.shape[0] - 9) // 2, (image.shape[1] - 9) // 2
    wanted = image[top : top + 9, left : left + 9]
    np.testing.assert_array_equal(images.fit(pixels, ImageSpec(9, 9, crop="adm")), wanted)


@pytest.mark.parametrize("size", [(30, 30), (9, 40), (100, 7), (3, 3), (64, 65)])
def test_adm_crop_fits_any_size(size):
    pixels = np.full((*size, 3), 77, np.uint8)
    np.testing.assert_array_equal(
        images.fit(pixels, ImageSpec(6, 10, crop="adm")), np.full((6, 10, 3), 77)
    )


@pytest.mark.parametrize(
    ("size", "left", "top"), [((8, 4), 2, 0), ((4, 8), 0, 2), ((1, 900), 0, 3), ((3, 3), 0, 0)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_padded_image_is_whole(size, left, top, channels):
    spec = ImageSpec(8, 8, channels=channels, background=(200, 100, 0), crop="pad")
    found = images.fit(np.full((*size, channels), 77, np.uint8), spec)
    inside = found[top : 8 - top, left : 8 - left]
    outside = np.ones((8, 8), bool)
    outside[top : 8 - top, left : 8 - left] = False
    if size == (1, 900):  # less than a row high
        inside, outside[3], outside[4:] = found[3], False, True
    assert (inside == 77).all()
    assert (found[outside] == ([118] if channels == 1 else [200, 100, 0])).all()


def test_crop_none_refuses_other_sizes():
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert images.fit(pixels, ImageSpec(4, 6, crop="none")) is pixels
    with pytest.raises(BadImage, match="4 x 6 .*Use images of 4 x 4"):
        images.fit(pixels, ImageSpec(4, 4, crop="none"))


def test_adm_crop_refuses_narrow_images():
    with pytest.raises(BadImage, match="too narrow"):
        images.fit(np.zeros((1, 2000, 3), np.uint8), ImageSpec(256, 256, crop="adm"))


def test_out_of_memory_is_not_a_bad_image(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        images.open_image(b"anything")
