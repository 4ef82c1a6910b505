"""The images of each stage: means of the last one's, or its own; and the contact sheet."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rdm_jax import run
from rdm_jax.config.validate import check_config
from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data.augment import mirror
from rdm_jax.data.cell_sums import cells_in
from rdm_jax.data.prepare import prepare
from rdm_jax.models.conditions import Text
from rdm_jax.render import contact_sheet
from rdm_jax.runtime.errors import InputError
from rdm_jax.stage_datasets import ImageSpec, open_sets, set_for_pictures
from rdm_jax.text import encoders
from rdm_jax.training.program import build_objective
from tests.support.configs import tiny_config, write_images
from tests.support.fake_encoder import FakeEncoder


@pytest.fixture
def config(tmp_path):
    write_images(tmp_path / "images")
    return tiny_config(tmp_path / "images")


def change(config, stage=None, **fields):
    """The config with other fields of its data, or of a stage."""
    if stage is None:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
    return config.with_stage(stage, **fields)


def test_open_sets_shares_one_set_and_the_first_stage_sees_exact_means(config):
    sets = open_sets(config, [1, 2])
    assert sets[1] is sets[2] and sets[2].image_shape == (8, 8, 3)
    pixels = sets[1].batch(range(24))["image"]
    seen = contact_sheet._seen(config.stages[0], sets[1], np.arange(24))
    exact = pixels.reshape(24, 4, 2, 4, 2, 3).astype(np.float64).mean((2, 4)) / 127.5 - 1
    np.testing.assert_allclose(seen, exact, atol=3e-7)
    assert build_objective(config.stages[0], sets[1].image_shape, 2).pool == 2


def test_open_sets_of_a_stage_with_its_own_source(config, tmp_path):
    config = change(config, 1, source=config.data.source)
    sets = open_sets(config, [1, 2])
    assert sets[1].image_shape == (4, 4, 3) and sets[2].image_shape == (8, 8, 3)
    assert build_objective(config.stages[0], sets[1].image_shape, 2).pool == 1
    assert (tmp_path / "images_prepared_stage1" / "manifest.json").exists()
    wanted = np.asarray(
        Image.open(tmp_path / "images" / "a" / "000.png").resize((4, 4), Image.Resampling.LANCZOS)
    )
    np.testing.assert_array_equal(sets[1][0]["image"], wanted)
    assert list(open_sets(config, [1])) == [1]


def test_open_sets_refuses_other_classes(config, tmp_path):
    (tmp_path / "others").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "others" / "0.png")
    with pytest.raises(InputError, match="config.stage1.source=.* classes none, .* a, b"):
        open_sets(change(config, 1, source=f"folder:{tmp_path}/others"), [1, 2])


@pytest.mark.parametrize("numbers, opened", [([1, 2, 3], [2, 4]), ([1], [4]), ([3], [])])
def test_open_sets_writes_the_sums_of_all_stages(config, tmp_path, numbers, opened):
    """And opens those of the stages that it is asked for."""
    config = change(config, cache_gib=0.0)
    first, last = config.stages
    stages = (
        dataclasses.replace(first, resolution=(2, 2)),
        dataclasses.replace(last, resolution=(4, 4)),
        last,
    )
    images = open_sets(dataclasses.replace(config, stages=stages), numbers)[numbers[-1]]
    assert cells_in(tmp_path / "images_prepared") == [2, 4]
    for cell in (2, 4):
        assert images.of_cells(cell).cell == (cell if cell in opened else 1)


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    caplog.set_level("INFO")
    return caplog


FULL = "stage1 reads the full records, 4 times the pixels that it needs; --mode=prepare adds"


def test_open_sets_names_the_gain_of_sums(config, tmp_path, logged):
    """Of a set of an older version; not where it is in memory, nor for the last stage."""
    path = prepare(config.data.source, config.data.directory, ImageSpec(8, 8))
    for cached, number, wanted in ((0.0, 2, False), (1.0, 1, False), (0.0, 1, True)):
        logged.clear()
        images = open_sets(change(config, cache_gib=cached), [number])[number]
        assert (FULL in logged.text) == wanted and cells_in(path) == []
    assert images.of_cells(2) is images
    logged.clear()
    images = open_sets(change(config, cache_gib=0.0), [1], verify=True)[1]
    assert FULL not in logged.text and images.of_cells(2).cell == 2


def test_open_sets_adds_sums_to_prepared_data_on_request(config, tmp_path, logged, monkeypatch):
    path = prepare(config.data.source, tmp_path / "elsewhere", ImageSpec(8, 8))
    config = change(config, source=f"prepared:{path}", cache_gib=0.0)
    assert open_sets(config, [1])[1].of_cells(2).cell == 1 and FULL in logged.text

    def fail(*args):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("rdm_jax.data.write_sums.write_shards", fail)
        assert open_sets(config, [1], verify=True)[1].of_cells(2).cell == 1
    assert "elsewhere stays as it is, as it cannot be written ([Errno 30]" in logged.text
    assert open_sets(config, [1], verify=True)[1].of_cells(2).cell == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "images"]


def test_open_sets_writes_nothing_without_a_directory(config, tmp_path):
    images = open_sets(change(config, directory=""), [1, 2])[2]
    assert images.is_cached and len(images) == 24 and images.of_cells(2).is_cached
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_open_sets_of_prepared_data(config, tmp_path):
    path = prepare(config.data.source, tmp_path / "elsewhere", ImageSpec(8, 8))
    images = open_sets(change(config, source=f"prepared:{path}"), [1, 2])[2]
    assert len(images) == 24
    other = prepare(config.data.source, tmp_path / "small", ImageSpec(8, 4))
    says = "config.data.source=.*8 x 4 x 3 .*Use images of 8 x 8 x 3"
    with pytest.raises(InputError, match=says):
        open_sets(change(config, source=f"prepared:{other}"), [2])
    odd = prepare(config.data.source, tmp_path / "odd", ImageSpec(8, 7))
    with pytest.raises(InputError, match="8 x 7 x 3 .*Use images of 8 x 8 x 3"):
        open_sets(change(config, source=f"prepared:{odd}"), [1])
    with pytest.raises(InputError, match="no prepared data"):
        open_sets(change(config, source="prepared:nowhere"), [2])
    assert set_for_pictures(change(config, source=f"prepared:{path}")) is not None


def test_set_for_pictures_needs_no_data(config):
    assert set_for_pictures(config) is None
    open_sets(config, [2])
    assert len(set_for_pictures(config)) == 24


@pytest.fixture
def captions(config, tmp_path, monkeypatch):
    """A config with captions of images for two stages, and the encoder that embeds them."""
    for number, path in enumerate(sorted((tmp_path / "images").glob("*/*.png"))):
        path.with_suffix(".txt").write_text(f"picture {number}")
    encoder = FakeEncoder(tokens=4, width=6)
    monkeypatch.setattr(encoders, "open_encoder", lambda spec, tokens: encoder)
    network = {"attention_levels": (0,), "head_channels": 8}
    for number in (1, 2):
        config = change(config, number, condition=Text(tokens=4, width=6), network=network)
    return change(config, captions="txt", text_tokens=4, cache_gib=0.0), encoder


def check_captions_of(images):
    batch = images.batch([3, 20], text=True)
    assert images.caption([3, 20]) == ["picture 3", "picture 20"]
    np.testing.assert_array_equal(batch["text_length"], [2, 2])
    tokens = FakeEncoder(tokens=4, width=6)(images.caption([3, 20])).tokens
    np.testing.assert_array_equal(batch["text"], tokens)


@pytest.mark.parametrize("place", ["directory", "memory", "prepared"])
def test_open_sets_embeds_captions(captions, tmp_path, place):
    config, encoder = captions
    if place == "memory":
        config = change(config, directory="", cache_gib=1.0)
    if place == "prepared":
        path = prepare(config.data.source, tmp_path / "elsewhere", ImageSpec(8, 8), captions="txt")
        config = change(config, source=f"prepared:{path}")
    images = open_sets(config, [1, 2])[1]
    check_captions_of(images)
    check_captions_of(images.of_cells(2))
    assert images.of_cells(2).cell == (1 if place == "prepared" else 2)
    embedded = len(encoder.calls)
    check_captions_of(open_sets(config, [1, 2])[2])
    assert len(encoder.calls) == embedded + (place == "memory")


def test_open_sets_of_embedded_captions_needs_no_encoder(captions, monkeypatch):
    config, _ = captions
    open_sets(config, [1, 2])
    monkeypatch.setattr(encoders, "open_encoder", None)
    check_captions_of(open_sets(config, [1, 2])[2])


@pytest.mark.parametrize(
    ("stage", "fields", "says"),
    [
        (
            None,
            {"captions": "none"},
            r"data\.captions='none' .* config\.stage1\.condition\.kind='te",
        ),
        (None, {"text_tokens": 5}, r"stage1\.condition\.tokens=4 .*Use 5 .config.data.text_tokens"),
        (2, {"condition": Text(tokens=4, width=7)}, r"stage2\.condition\.width=7 .* Use 6,"),
    ],
)
def test_open_sets_refuses_other_captions_before_images_are_read(
    captions, tmp_path, monkeypatch, stage, fields, says
):
    config, _ = captions
    monkeypatch.setattr("rdm_jax.stage_datasets.prepare", None)
    with pytest.raises(InputError, match=says):
        open_sets(change(config, stage, **fields), [1, 2])
    assert not (tmp_path / "images_prepared").exists()


def test_open_sets_refuses_a_missing_encoder_before_images_are_read(config, tmp_path):
    config = change(config, captions="txt", text_encoder=f"t5:{tmp_path}/t5")
    with pytest.raises(InputError, match="config.data.text_encoder=t5:.*t5 is not a folder"):
        open_sets(config, [2])
    assert not (tmp_path / "images_prepared").exists()


def test_set_for_pictures_embeds_nothing(captions, monkeypatch):
    config, encoder = captions
    without = change(config, text_encoder="none")
    open_sets(config, [1, 2])
    check_captions_of(set_for_pictures(config))
    monkeypatch.setattr(encoders, "open_encoder", None)
    images = set_for_pictures(without)
    assert len(images) == 24 and images.text is None


def test_open_sets_resumes_after_a_stop_between_shards(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 8)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_sets(config, [1, 2], check_stop=stop)
    assert len(open_sets(config, [1, 2])[2]) == 24


def test_contact_sheet_statistics_of_the_pixels_a_stage_sees(config):
    config = change(config, directory="")
    sets = open_sets(config, [1, 2])
    pixels = sets[2].batch(range(24))["image"] / 127.5 - 1
    for number, seen in ((2, pixels), (1, pixels.reshape(24, 4, 2, 4, 2, 3).mean((2, 4)))):
        count, mean, std = contact_sheet.statistics(config.stage(number), sets[number])
        assert count == 24
        np.testing.assert_allclose(mean, seen.mean((0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(std, seen.std((0, 1, 2)), rtol=1e-5)


def test_contact_sheet_shows_every_stage_and_the_blur(config, tmp_path):
    config = change(config, directory="")
    sets = open_sets(config, [1, 2])
    contact_sheet.draw(config, sets, tmp_path / "sheet.png")
    rows = [
        row
        for number in (1, 2)
        for row in contact_sheet._rows(number, config.stage(number), sets[number])
    ]
    names = ["stage1: 4 x 4", "stage2: 8 x 8"] + [
        f"blurred, t = {t}" for t in ("0.25", "0.5", "0.75", "1")
    ]
    assert [name for name, _ in rows] == names
    final, small, whole = rows[1][1].astype(int), rows[0][1].astype(int), rows[-1][1].astype(int)
    np.testing.assert_array_equal(final, sets[2].batch(contact_sheet._evenly(sets[2], 8))["image"])
    assert np.abs(whole - final).mean() > 20  # blurred at all,
    assert (
        np.abs(whole - small.repeat(2, 1).repeat(2, 2)).mean() < 5
    )  # and towards what stage 1 makes
    sheet = Image.open(tmp_path / "sheet.png")
    before = (tmp_path / "sheet.png").stat().st_mtime_ns
    contact_sheet.draw(config, sets, tmp_path / "sheet.png", again=False)
    assert (
        (tmp_path / "sheet.png").stat().st_mtime_ns == before
        and sheet.width > 8 * 96
        and sheet.height > 6 * 96
    )


def test_mirror_flips_half_of_the_images_by_their_keys():
    import jax

    images, keys = (
        jnp.arange(600.0 * 2 * 3).reshape(600, 2, 3, 1),
        jax.random.split(jax.random.key(0), 600),
    )
    mirrored = np.asarray(mirror(images, keys))
    same = (mirrored == np.asarray(images)).all((1, 2, 3))
    np.testing.assert_array_equal(mirrored[~same], np.asarray(images)[~same][:, :, ::-1])
    assert 250 < same.sum() < 350
    np.testing.assert_array_equal(np.asarray(mirror(images[5:6], keys[5:6])), mirrored[5:6])


def test_open_sets_refuses_outputs_within_the_source(config, tmp_path):
    images = tmp_path / "images"
    for changed, workdir in (
        (config, images),
        (config, images / "run"),
        (change(config, directory=f"{images}/prepared"), tmp_path / "run"),
        (change(config, directory=""), images),
        (change(config, source=f"folder:{tmp_path}/run/samples/images"), tmp_path / "run"),
    ):
        (tmp_path / "run" / "samples" / "images").mkdir(parents=True, exist_ok=True)
        with pytest.raises(
            InputError,
            match="is written to, and overlaps with the source 'folder:",
        ):
            open_sets(changed, [1, 2], workdir=workdir)
    assert sorted(entry.name for entry in images.iterdir()) == ["a", "b"]
    assert (
        len(open_sets(config, [1, 2], workdir=tmp_path)[2]) == 24
    )  # what it writes lies beside the images


def test_open_sets_logs_the_table_of_classes(config, caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    with caplog.at_level("INFO"):
        open_sets(config, [2])
    assert "data: stage2: classes by number: 0 a, 1 b" in [
        record.getMessage() for record in caplog.records
    ]


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("source", "gs://bucket/images", "config.data.source='gs://bucket/images' is a URL"),
        (
            "source",
            "tar:s3://bucket/images.tar",
            "config.data.source='s3://bucket/images.tar' is a URL",
        ),
        (
            "directory",
            "gs://bucket/prepared",
            "config.data.directory='gs://bucket/prepared' is a URL",
        ),
        ("classes", "deepest", "config.data.classes='deepest' cannot be used. Use 'auto' or 'top'"),
        (
            "max_left_out",
            1.5,
            "config.data.max_left_out=1.5 cannot be used. Use a number from 0 to 1",
        ),
    ],
)
def test_check_config_names_invalid_data_fields(config, field, value, said):
    with pytest.raises(InputError, match=said):
        check_config(change(config, **{field: value}))


def test_check_config_names_url_as_a_stages_source(config):
    with pytest.raises(InputError, match="config.stage1.source='gs://bucket/images' is a URL"):
        check_config(change(config, 1, source="folder:gs://bucket/images"))


def test_run_update_prepares_a_changed_source_again(config, tmp_path):
    values, images = config.to_config_dict(), tmp_path / "images"
    with pytest.raises(
        InputError, match="--update does not go with --mode=train. Use it with --mode=prepare"
    ):
        run(values, str(tmp_path / "run"), mode="train", update=True)
    assert not (tmp_path / "run").exists()
    before = open_sets(config, [2])[2]
    (images / "a" / "000.png").unlink()
    run(values, str(tmp_path / "run"), mode="prepare", update=True)
    after = open_sets(config, [2])[2]
    assert (len(before), len(after)) == (24, 23) and before.identity != after.identity
