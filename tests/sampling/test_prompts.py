"""Prompts: read, given to the networks, kept with the samples."""

import dataclasses
import json
import weakref

import jax
import numpy as np
import pytest

import rdm_jax
from rdm_jax import modes
from rdm_jax.data.classes import Classes
from rdm_jax.data.text_table import TextSpec
from rdm_jax.diffusion.guidance import Autoguidance
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import conditions, guides, prompts
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.prompts import parse_prompts
from rdm_jax.sampling.run_captions import Captions, read_captions
from rdm_jax.sampling.stage_preview import StagePreview
from rdm_jax.sampling.write_samples import sample_to_files
from rdm_jax.text import encoders
from rdm_jax.workdir import Workdir
from tests.support import captioned_runs
from tests.support.captioned_runs import ENCODER, TEXT, captioned, config_of, write_run
from tests.support.configs import tiny_config, write_images
from tests.support.fake_encoder import FakeEncoder

APPLE, CAT = "a red apple", "a sleeping cat"
SEEDS = np.arange(11)


@pytest.fixture(scope="module")
def encoder():
    with pytest.MonkeyPatch.context() as patch:
        yield captioned_runs.open_fake(patch)


@pytest.fixture(scope="module")
def workdir(encoder, tmp_path_factory):
    captions = {"training": (APPLE, "a dog"), "held_out": (CAT,)}
    return write_run(tmp_path_factory.mktemp("run"), config_of(), **captions)


@pytest.fixture(scope="module")
def relay(workdir):
    """Compiled once."""
    return RelayPipeline(config_of(prompts=f"{APPLE}; {CAT}"), workdir)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a red apple; a sleeping cat", (APPLE, CAT)),
        (" a red apple ", (APPLE,)),
        ('["a red apple", "one; two"]', (APPLE, "one; two")),
        ("a file.txt; b.txt", ("a file.txt", "b.txt")),
        ("", ()),
        ("held_out", ()),
    ],
)
def test_prompts_are_a_list(text, prompts):
    assert parse_prompts(text) == prompts


def test_prompts_are_the_lines_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for written in (b"a red apple\na sleeping cat\n", b"\xef\xbb\xbfa red apple\r\na sleeping cat"):
        (tmp_path / "prompts.txt").write_bytes(written)
        assert parse_prompts("prompts.txt") == (APPLE, CAT)
    (tmp_path / "prompts.txt").write_text("ein Apfel\nзелёное яблоко\n", "utf-8")
    assert parse_prompts(str(tmp_path / "prompts.txt")) == ("ein Apfel", "зелёное яблоко")


@pytest.mark.parametrize(
    ("text", "written", "says"),
    [
        ("a; ; b", None, "prompts='a; ; b': prompt 2 of 3 is empty"),
        ("a;", None, "prompt 2 of 2 is empty"),
        ('["a", ""]', None, "prompt 2 of 2 is empty"),
        ("[]", None, "has no prompts"),
        ("[1]", None, "is not a JSON list of strings"),
        ('["a"', None, "is not a JSON list of strings"),
        ("prompts.txt", None, "prompts='prompts.txt' cannot be read .No such file"),
        ("prompts.txt", b"", "the file of .*prompt 1 of 1 is empty"),
        ("prompts.txt", b"a\n\nb\n", "the file of .*prompt 2 of 3 is empty"),
        ("prompts.txt", b"a\n\xff\n", "is not UTF-8 .byte 2"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, monkeypatch, text, written, says):
    monkeypatch.chdir(tmp_path)
    if written is not None:
        (tmp_path / "prompts.txt").write_bytes(written)
    with pytest.raises(InputError, match=says):
        parse_prompts(text)


def test_seeds_take_prompts_in_turn(relay):
    assert relay.prompts(np.asarray([0, 1, 2, 5])) == [APPLE, CAT, APPLE, CAT]
    assert (
        relay.listed.texts == (APPLE, CAT)
        and relay.text == TextSpec(**TEXT)
        and not len(relay.classes)
    )


def test_image_depends_on_its_prompt_only(relay):
    """Not on where in a batch, or beside which others."""
    small, images = relay.sample(SEEDS)
    assert np.abs(images.astype(int)).std() > 1
    for other in (relay.sample(SEEDS, prompts=[APPLE, CAT]), relay.finish(relay.begin(SEEDS))):
        np.testing.assert_array_equal(other[0], small)
        np.testing.assert_array_equal(other[1], images)
    swapped = relay.sample(SEEDS, prompts=[CAT, APPLE])
    same = relay.sample(SEEDS, prompts=CAT)
    odd = SEEDS % 2 == 1
    for stage, (mine, other, cats) in enumerate(zip((small, images), swapped, same, strict=True)):
        np.testing.assert_array_equal(cats[odd], mine[odd])
        np.testing.assert_array_equal(cats[~odd], other[~odd])
        assert (np.abs(mine.astype(int) - other).max((1, 2, 3)) > 0).all(), stage
    np.testing.assert_array_equal(relay.sample(SEEDS[3:4])[1], images[3:4])
    with pytest.raises(InputError, match=r"prompts=\[\] has no prompts"):
        relay.sample(SEEDS, prompts=[])


def test_long_prompts_are_refused(relay, workdir):
    """At once, if they are the config's."""
    long = "one two three four five"
    with pytest.raises(InputError, match=f"{long}' has 5 tokens"):
        relay.sample(SEEDS, prompts=[APPLE, long])
    with pytest.raises(InputError, match=f"{long}' has 5 tokens"):
        RelayPipeline(config_of(prompts=f"{APPLE}; {long}"), workdir)


def test_long_prompts_are_refused_before_training(encoder, tmp_path):
    with pytest.raises(InputError, match="one two three four five' has 5 tokens"):
        run(config_of(prompts="one two three four five"), tmp_path / "run")
    assert not (tmp_path / "run/stage1").exists()


def test_held_out_prompts_need_held_out_images(tmp_path):
    with pytest.raises(InputError, match="prompts='held_out' means .*config.data.held_out=0"):
        run(config_of(prompts="held_out"), tmp_path / "run")


def test_prompts_are_encoded_once(relay, encoder):
    encoder.calls.clear()
    for _ in range(2):
        relay.sample(SEEDS, prompts=["some words", "others"])
    assert encoder.calls == [["some words", "others"]]


def test_encoder_is_freed_while_sampling(workdir, monkeypatch):
    """Once the prompts of the config's seeds are encoded; others open it again."""
    opened = []

    def open_another(spec, tokens, field):
        encoder = FakeEncoder(tokens=4, width=6)
        opened.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(prompts, "open_encoder", open_another)
    listed = RelayPipeline(config_of(prompts=f"{APPLE}; {CAT}"), workdir)
    assert [encoder() for encoder in opened] == [None]
    *_, images = listed.sample(SEEDS)
    assert len(opened) == 1
    *_, others = listed.sample(SEEDS, prompts=["some words", CAT])
    assert len(opened) == 2 and opened[1]() is not None
    np.testing.assert_array_equal(others[1::2], images[1::2])
    own = RelayPipeline(config_of(), workdir)
    assert opened[2]() is not None  # nothing is fixed before images are asked for
    own.sample(SEEDS[:1])
    assert len(opened) == 3 and opened[2]() is None
    monkeypatch.setattr(conditions, "KEPT", 1)
    many = RelayPipeline(config_of(prompts=f"{APPLE}; {CAT}"), workdir)
    assert opened[3]() is not None and len(many._prompts._known) == 1
    np.testing.assert_array_equal(many.sample(SEEDS)[-1], images)
    assert len(opened) == 4


def test_without_prompts_seeds_take_captions_of_the_run(workdir, tmp_path):
    made = RelayPipeline(config_of(), workdir)
    assert made.prompts(SEEDS[:3]) == [APPLE, "a dog", APPLE]
    made = RelayPipeline(config_of(prompts="held_out"), workdir)
    assert made.prompts(SEEDS[:2]) == [CAT, CAT]
    assert made.are_held_out([CAT, "A  red apple", "a new one"]) == [True, False, True]
    elsewhere = RelayPipeline(config_of(), write_run(tmp_path, config_of()))
    assert elsewhere.are_held_out([CAT]) == [False]
    with pytest.raises(InputError, match="prompts='' means the captions of the run, and its workd"):
        elsewhere.prompts(SEEDS)
    assert elsewhere.sample(SEEDS[:2], prompts=CAT)[1].shape == (2, 8, 8, 3)


def test_load_and_sample(workdir):
    """As the documentation shows it."""
    pipe = rdm_jax.load(workdir)
    images = pipe.sample(np.arange(2), prompts=[APPLE, CAT])[-1]
    assert images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights_hash": "other"}, r"is fake .*weights 0{12}., .* with fake .*weights other"),
        (None, "stage1.checkpoint='newest' does not name the encoder of its text"),
    ],
)
def test_another_encoder_is_refused(tmp_path, encoder, change, says):
    folder = write_run(tmp_path, config_of(), text=change and TEXT | change)
    with pytest.raises(InputError, match=says):
        RelayPipeline(config_of(), folder)


def test_prompts_for_networks_that_know_classes_only(tmp_path):
    config = tiny_config("images")
    folder = write_run(tmp_path, config, text=None)
    asked = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, prompts=APPLE)
    )
    says = r"prompts=\[?'a red apple'\]? is of no use: no stage is conditioned on text"
    with pytest.raises(InputError, match=says):
        RelayPipeline(asked, folder)
    with pytest.raises(InputError, match=says):  # before anything is trained
        run(asked, tmp_path / "new")
    assert not (tmp_path / "new/stage1").exists()
    with pytest.raises(InputError, match=says):
        RelayPipeline(config, folder).sample(SEEDS, prompts=[APPLE])


@pytest.mark.second
@pytest.mark.parametrize("files", ["npz", "png"])
def test_files_have_the_prompts(workdir, tmp_path, files):
    def write(**sampling):
        values = {"prompts": f"{APPLE}; {CAT}", "files": files} | sampling
        sample_to_files(RelayPipeline(config_of(**values), workdir), None, tmp_path, StopOnSignal())

    write(seeds="0-2")
    write(seeds="0-4")
    folder, wanted = tmp_path / "samples", [APPLE, CAT, APPLE, CAT, APPLE]
    if files == "npz":
        with np.load(folder / "samples.npz") as file:
            assert file["prompts"].tolist() == wanted and file["seeds"].tolist() == [0, 1, 2, 3, 4]
    else:
        listed = json.loads((folder / "images/dataset.json").read_text())["captions"]
        assert listed == [[f"{seed:010d}.png", text] for seed, text in enumerate(wanted)]
    assert (folder / "grid.png").is_file()
    before = json.loads((folder / "samples.json").read_text())
    assert before["prompts"]["count"] == 2 and before["sampling"]["prompts"] == f"{APPLE}; {CAT}"
    with pytest.raises(InputError, match="has samples of other settings .*prompts"):
        write(prompts=APPLE)
    written = tmp_path / "prompts.txt"
    written.write_text(f"{APPLE}\n")
    write(prompts=str(written), name="from_file")
    written.write_text(f"{APPLE}\n{CAT}\n")
    with pytest.raises(InputError, match=r"prompts.count was 1 and is 2"):
        write(prompts=str(written), name="from_file")


@pytest.mark.second
def test_preview_has_captions_of_real_images(encoder, tmp_path):
    """Training runs no encoder: their embeddings are in the data."""
    named = [f"image {i}" for i in range(6)]
    real, config = captioned(named), config_of()
    encoder.calls.clear()
    for number in (1, 2):
        alone = StagePreview(config, number, real)
        params = alone._sampler.functions._parts[0].network.init(jax.random.key(0))
        images, labels = alone.sample(params, SEEDS)
        assert images.shape == (11, 4 * number, 4 * number, 3) and len(labels) == 11
        captions = alone.captions(SEEDS)
        assert sorted(captions[:6]) == named and captions[6:] == captions[:5]
        alone.preview(params, tmp_path / "preview.png")
        assert alone.about["begins with"] == real.fingerprint and "labels" not in alone.about
    assert encoder.calls == []


@pytest.mark.second
def test_guide_gets_the_prompts_too(workdir, tmp_path):
    """Of the same encoder, whether it knows them or not."""
    same = config_of(prompts=APPLE).with_stage(
        1, guidance=(Autoguidance(1.5, f"{tmp_path}/stage1"),)
    )
    write_run(tmp_path, config_of())
    (_, guided), (_, plain) = (
        RelayPipeline(config, workdir).sample(SEEDS[:2])
        for config in (same, config_of(prompts=APPLE))
    )
    # The guide is the network itself, but for rounding.
    np.testing.assert_allclose(guided.astype(int), plain, atol=1)
    write_run(tmp_path / "other", config_of(), text=TEXT | {"weights_hash": "other"})
    other = same.with_stage(1, guidance=(Autoguidance(1.5, f"{tmp_path}/other/stage1"),))
    with pytest.raises(InputError, match="the guide knows text of .*weights other.*, the stage of"):
        RelayPipeline(other, workdir)
    with pytest.raises(InputError, match="the guide knows text of .*, the stage none"):
        guides.check(other.stage(1), 3, Classes(("a", "b")))


def test_training_keeps_the_captions(tmp_path, monkeypatch):
    """Once its stages are conditioned on them."""
    images = [captioned(names) for names in ("abc", "cde")]
    sets = {number: modes.Split(images[0], *images) for number in (1, 2)}
    monkeypatch.setattr(modes, "Trainer", None)
    for config, wanted in (
        (tiny_config("images"), None),
        (config_of(), Captions.of([("a", "a"), ("b", "b"), ("c", "a")], [("d", "b"), ("e", "a")])),
    ):
        workdir = Workdir(tmp_path)
        job = modes.Job(config, workdir, "train", None, StopOnSignal(), False, False, ())
        with pytest.raises(TypeError):  # where training begins
            job.train(sets, None)
        assert read_captions(workdir.captions) == wanted


@pytest.mark.second
def test_captioned_folder_is_trained_and_sampled(encoder, tmp_path, monkeypatch):
    """From .txt files beside the images to samples of prompts, and of captions without any."""
    monkeypatch.setattr(encoders, "open_encoder", lambda spec, tokens: ENCODER)
    write_images(tmp_path / "images", count=12)
    for number, path in enumerate(sorted((tmp_path / "images").glob("*/*.png"))):
        path.with_suffix(".txt").write_text(f"image {number}")
    config = config_of(prompts=f"{APPLE}; image 3", seeds="0-3")
    data = {"directory": "", "captions": "txt", "text_tokens": 4, "held_out": 4}
    source = f"folder:{tmp_path / 'images'}"
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=source, **data)
    )
    workdir = tmp_path / "run"
    run(config, workdir)
    kept = read_captions(Workdir(workdir).captions)
    assert kept.complete and len(kept.training) == 8 and len(kept.held_out) == 4
    with np.load(workdir / "samples/samples.npz") as file:
        assert file["prompts"].tolist() == [APPLE, "image 3"] * 2
    for asked, taken in (("", kept.training), ("held_out", kept.held_out)):
        sampling = dataclasses.replace(config.sampling, prompts=asked, name=f"of_{asked}")
        run(dataclasses.replace(config, sampling=sampling), workdir, mode="sample")
        with np.load(workdir / f"of_{asked}/samples.npz") as file:
            assert file["prompts"].tolist() == list(taken[:4])
