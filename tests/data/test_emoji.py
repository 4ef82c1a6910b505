"""Sources of emoji: skin tones as classes, or left out."""

import pytest
from PIL import Image

from rdm_jax.data import sources
from rdm_jax.data.images import ImageSpec
from rdm_jax.runtime.errors import InputError

FORM = ImageSpec(4, 6)

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
        image = Image.new("RGBA", (4, 4), (index * 10, 0, 0, 255))
        image.save(tmp_path / name, lossless=True)
    return tmp_path


def test_skin_tones_are_marked(emoji):
    source = sources.open_source(f"emoji:{emoji}", skin_tones="mark")
    tones = {
        name: source.class_names[label]
        for name, label in zip(source.names, source.labels, strict=True)
    }
    assert tones == dict(
        zip(EMOJI, ("none", "light", "medium", "dark", "none", "medium-light"), strict=True)
    )


def test_skin_tones_are_dropped(emoji):
    source = sources.open_source(f"emoji:{emoji}", skin_tones="drop")
    assert source.names == ["1f3f4-e0067_e0062.webp", "1f44d.webp"] and source.class_names == ()
    reds = [source.read(index, FORM)[0, 0, 0] for index in range(2)]
    assert reds == [EMOJI.index(name) * 10 for name in source.names]


@pytest.mark.parametrize(
    "spec, skin_tones", [("emoji:x", ""), ("emoji:x", "merge"), ("digits", "mark")]
)
def test_skin_tones_unsupported_by_the_source_are_refused(spec, skin_tones):
    with pytest.raises(InputError, match=f"skin_tones={skin_tones!r}"):
        sources.open_source(spec, skin_tones=skin_tones)


def test_missing_emoji_name_the_remedy(tmp_path):
    with pytest.raises(
        InputError, match="npm pack @lobehub/fluent-emoji-3d .* emoji:package/assets"
    ):
        sources.open_source(f"emoji:{tmp_path}/package", skin_tones="mark")


def test_emoji_need_names_of_code_points(emoji):
    Image.new("RGB", (2, 2)).save(emoji / "thumbs-up.webp")
    with pytest.raises(InputError, match="thumbs-up.webp"):
        sources.open_source(f"emoji:{emoji}", skin_tones="drop")
