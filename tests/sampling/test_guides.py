"""Autoguidance from checkpoints: guides of another architecture, their record, their cost."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import store
from rdm_jax.config import Config, to_dict
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.guidance import Autoguidance, ClassifierFree
from rdm_jax.diffusion.linear_path import LinearProcess
from rdm_jax.diffusion.preconditioning import VEPreconditioning, XPreconditioning
from rdm_jax.models.conditions import Nothing, Text
from rdm_jax.models.transformer import JiT
from rdm_jax.modes import run
from rdm_jax.plan.plan import plan
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import guides
from rdm_jax.sampling.earlier import _only_checkpoints_advanced
from rdm_jax.sampling.made_with import describe, differences
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview
from rdm_jax.sampling.stage_sampler import StageSampler
from tests.support.configs import tiny_config, write_images
from tests.support.fake_encoder import FakeEncoder

AB = Classes(("a", "b"))
SEEDS, LABELS = np.arange(4), jnp.asarray([0, 1, 0, -1])
OTHER = {
    "network": JiT(patch=2, hidden=16, depth=1, heads=2, bottleneck=8, class_tokens=0),
    "precondition": XPreconditioning(),
    "process": LinearProcess(),
}


def alone() -> Config:
    """The first of two tiny stages."""
    config = tiny_config("images")
    return dataclasses.replace(config, stages=config.stages[:1])


def of_other_family() -> Config:
    return alone().with_stage(1, **OTHER)


def params_of(config: Config, channels: int = 3, seed: int = 0, number: int = 1):
    """Random parameters, no longer the zero output of initialisation."""
    network = config.stage(number).build(channels, 2)
    leaves, tree = jax.tree.flatten(network.abstract)
    random = np.random.default_rng(seed)
    return tree.unflatten([0.2 * random.standard_normal(x.shape).astype("f4") for x in leaves])


def write(workdir, config, step=1, channels=3, names=("a", "b"), number=1, **settings):
    """A stage's checkpoint; returns the folder of the step."""
    stage = json.loads(json.dumps(to_dict(config)[f"stage{number}"]))
    stage["training"] |= settings
    folder = workdir / f"stage{number}/checkpoints"
    checkpoints = store.Checkpoints(folder)
    about = {"stage": stage, "classes": [*names], "seed": 0}
    checkpoints.save_ema(step, params_of(config, channels, step, number), about)
    checkpoints.close()
    return folder / str(step)


def guided(*entries, config=None) -> Config:
    return (config or alone()).with_stage(1, guidance=entries)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Workdirs of a run, and of a guide of another family."""
    root = tmp_path_factory.mktemp("guides")
    write(root / "run", alone())
    write(root / "other", of_other_family(), step=7)
    return root


def denoised(config: Config, params, x, sigma, loaded=(), given=None):
    """What a stage's denoiser returns for some images, conditioned on `LABELS` or `given`."""
    sampler = StageSampler(
        config.stage(1),
        config.stage(1).build(3, 2),
        number=1,
        channels=3,
        classes=2,
        run_seed=0,
        guides=loaded,
    )
    everything = sampler.with_guides(params)
    given = given or {"label": LABELS}

    def denoise(params, x):
        return sampler._denoiser(params, None, given, lambda k: jnp.zeros(x.shape))(x, sigma)

    return jax.jit(denoise)(everything, x)


@pytest.mark.parametrize(
    "named", [pytest.param("stage1", marks=pytest.mark.second), "stage1/checkpoints/7"]
)
def test_guide_of_another_family_follows_the_formula(folders, named):
    path, x = str(folders / "other" / named), jax.random.normal(jax.random.key(0), (4, 4, 4, 3))
    config = guided(Autoguidance(1.5, path, (0.1, 2.0)))
    loaded = guides.load(config.stage(1), 3, AB)
    assert [guide.checkpoint["step"] for guide in loaded] == [7]
    own, params = params_of(alone(), seed=1), loaded[0].params
    for sigma, weight in ((0.7, 1.5), (5.0, 1.0)):
        main = denoised(alone(), own, x, jnp.asarray(sigma))
        other = denoised(of_other_family(), params, x, jnp.asarray(sigma))
        assert np.abs(main - other).max() > 0.1
        out = denoised(config, own, x, jnp.asarray(sigma), loaded)
        np.testing.assert_allclose(out, weight * main - (weight - 1) * other, atol=2e-5)


@pytest.mark.parametrize("classes", [False, True], ids=["text", "text and classes"])
def test_classifier_free_guidance_leads_away_from_the_null_caption(classes):
    """Caption and class are dropped together; a null caption is not guided."""
    config = alone().with_stage(1, condition=Text(tokens=4, width=6, classes=classes))
    params, sigma = params_of(config), jnp.asarray(0.7)
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 3))
    text = FakeEncoder(tokens=4, width=6)(["a red apple", "a cat", "a b c d", "dogs"])
    mask = np.asarray([1, 1, 1, 0])
    given = {
        "label": jnp.asarray([0, 1, 0, -1]),
        "text": jnp.asarray(text.tokens),
        "text_length": jnp.asarray(text.lengths * mask),
    }
    nothing = given | {"label": jnp.full(4, -1), "text_length": jnp.zeros(4, jnp.int32)}
    guided_by_text = guided(ClassifierFree(1.5), config=config)
    plain, null = (denoised(config, params, x, sigma, given=each) for each in (given, nothing))
    assert (np.abs(plain - null).max((1, 2, 3)) > 0.01).tolist() == [True, True, True, False]
    out = denoised(guided_by_text, params, x, sigma, given=given)
    np.testing.assert_allclose(out, 1.5 * plain - 0.5 * null, atol=2e-5)


@pytest.mark.second
def test_pipeline_guided_by_its_own_checkpoint_is_unguided(folders):
    config = guided(Autoguidance(2.0, str(folders / "run/stage1")))
    by_itself = RelayPipeline(config, folders / "run")
    plain = RelayPipeline(alone(), folders / "run")
    (images,), (expected,) = by_itself.sample(SEEDS), plain.sample(SEEDS)
    assert np.abs(images.astype(int) - expected).max() <= 1 and expected.std() > 10
    sampler, params = by_itself._stages[0]
    given, seeds = {"label": jnp.asarray([0, 1])}, jnp.arange(2, dtype=jnp.uint32)
    scanned, _ = sampler._scanned(sampler.with_guides(params), None, given, seeds, False)[:2]
    walked, _ = sampler(params, None, given, seeds)  # on CPU one step after the other
    np.testing.assert_allclose(scanned, walked, atol=2e-3)
    other = guided(Autoguidance(2.0, str(folders / "other/stage1")))
    (images,) = RelayPipeline(other, folders / "run").sample(SEEDS)
    assert np.abs(images.astype(int) - expected).mean() > 2


def test_samples_name_their_guide(folders, tmp_path):
    """The folder and the step; another step of the guide makes other samples."""
    write(tmp_path, of_other_family(), step=1)
    config = guided(Autoguidance(1.5, f"{tmp_path}/stage1"))
    before = RelayPipeline(config, folders / "run")
    record = {"step": 1, "folder": str(tmp_path / "stage1/checkpoints")}
    assert before.checkpoints[0]["guides"] == [record]
    write(tmp_path, of_other_family(), step=2)
    after = RelayPipeline(config, folders / "run")
    old, new = describe(config, before), describe(config, after)
    assert [change.split(" ")[0] for change in differences(old, new)] == ["checkpoints"]
    assert not _only_checkpoints_advanced(after, old, new)
    heavier = describe(guided(Autoguidance(1.75, f"{tmp_path}/stage1")), after)
    assert differences(new, heavier) == ["stages.stage1.guidance[0].weight was 1.5 and is 1.75"]


def test_unconditional_guide(tmp_path):
    """A network without labels may guide, also where classifier-free guidance follows."""
    guide = of_other_family().with_stage(1, condition=Nothing())
    write(tmp_path, guide, names=("x",))
    config = guided(Autoguidance(1.5, f"{tmp_path}/stage1"), ClassifierFree(2.0))
    loaded, own = guides.load(config.stage(1), 3, AB), params_of(alone(), seed=1)
    x, sigma = jax.random.normal(jax.random.key(0), (4, 4, 4, 3)), jnp.asarray(0.7)
    known = denoised(alone(), own, x, sigma)
    unknown = denoised(alone(), own, x, sigma, given={"label": -jnp.ones_like(LABELS)})
    other = denoised(guide, loaded[0].params, x, sigma)
    out = denoised(config, own, x, sigma, loaded)
    expected = 2 * (1.5 * known - 0.5 * other) - (1.5 * unknown - 0.5 * other)
    np.testing.assert_allclose(out, expected, atol=5e-5)
    assert np.abs(known[:3] - unknown[:3]).max() > 0.01


@pytest.mark.second
def test_preview_is_guided(folders):
    config = guided(Autoguidance(1.5, str(folders / "other/stage1")))
    images = ImageSet([(np.zeros((4, 4, 3), np.uint8), 0)] * 2, (4, 4, 3), ("a", "b"))
    previews = [StagePreview(each, 1, images) for each in (config, alone())]
    assert [each["step"] for each in previews[0].about["guides"]] == [7]
    assert "guides" not in previews[1].about
    one, other = (each.sample(params_of(alone(), seed=1), SEEDS)[0] for each in previews)
    assert np.abs(one.astype(int) - other).mean() > 2


def test_multiply_adds_are_those_of_each_network(folders):
    own = alone().stage(1).multiply_adds(3, 2)
    other = of_other_family().stage(1).multiply_adds(3, 2)
    auto, free = Autoguidance(1.5, str(folders / "other/stage1")), ClassifierFree(2.0)
    for entries, total in (
        ((), 5 * own),
        ((free,), 10 * own),
        ((auto,), 5 * (own + other)),
        ((free, auto), 5 * (2 * own + other)),
        ((auto, free), 10 * (own + other)),
    ):
        stage = guided(*entries).stage(1)
        assert guides.multiply_adds(stage, 3, 2) == total
        assert guides.multiply_adds(stage, 3, 2, own) == total


def test_plan_counts_the_guide(folders):
    entries = ClassifierFree(2.0), Autoguidance(1.5, str(folders / "other/stage1"))
    config = guided(*entries)
    shown = plan(config, "v5e-1", utilisation=0.5, classes=2, compile=False)
    row = r"FLOPs per sampled image \(NFE 5, two passes each for guidance, 1 of guides\) +\| (\S+) (\w)"
    number, unit = re.search(row, shown).groups()
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}[unit]
    assert float(number) * scale == pytest.approx(
        2 * guides.multiply_adds(config.stage(1), 3, 2), rel=0.01
    )


REFUSED = {
    "no checkpoint": (None, r"guidance\[0\]\.checkpoint='\S+/guide/9' is not a checkpoint.* step"),
    "size": (
        lambda config: config.with_stage(1, resolution=(8, 8)),
        r"the guide makes images of \(8, 8\), and stage1 of \(4, 4\)\. Use a guide of \(4, 4\)\.",
    ),
    "channels": (1, r"the guide makes images of 1 channel.*channels=3\. Use a guide of .* 3 ch"),
    "classes": (("b", "a"), r"knows the classes b, a \(2\), the stage a, b \(2\)\. Use a guide of"),
    "no labels": (0.0, r"label_dropout=0, and guidance 2 after it .* Put autoguidance last"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_guide_that_does_not_fit_is_refused(case, tmp_path):
    changed, says = REFUSED[case]
    workdir, path = tmp_path / "guide", tmp_path / "guide/stage1"
    match changed:
        case None:
            path = tmp_path / "guide/9"
        case int():
            write(workdir, alone(), channels=changed)
        case tuple():
            write(workdir, alone(), names=changed)
        case float():
            write(workdir, alone(), label_dropout=changed)
        case _:
            write(workdir, changed(alone()))
    entries = (Autoguidance(1.5, str(path)), *([ClassifierFree(2.0)] * (case == "no labels")))
    stage = guided(*entries).stage(1)
    for refuses in (guides.check, guides.load):
        with pytest.raises(InputError, match=says) as refusal:
            refuses(stage, 3, AB)
        assert f"config.stage1.guidance[0].checkpoint={str(path)!r}" in str(refusal.value)


def test_guide_must_know_the_levels_where_it_applies(tmp_path):
    limited = alone().with_stage(1, precondition=VEPreconditioning(sigma_max=10.0))
    entry = Autoguidance(1.5, str(write(tmp_path, limited)))
    says = (
        r"knows noise levels from 0\.02 to 10, and the sampler uses 80\. Use guidance\[0\]\.inter"
    )
    with pytest.raises(InputError, match=says):
        guides.check(guided(entry).stage(1), 3, AB)
    guides.check(guided(dataclasses.replace(entry, interval=(0.02, 10.0))).stage(1), 3, AB)


def test_guide_of_another_blur_is_refused(tmp_path):
    """What a relay's stage 2 denoises depends on its process."""
    config = tiny_config("images")
    process = dataclasses.replace(config.stage(2).process, block_scale=0.3)
    path = write(tmp_path, config.with_stage(2, process=process), number=2)
    stage = config.with_stage(2, guidance=Autoguidance(1.5, str(path))).stage(2)
    with pytest.raises(InputError, match=r"process\.block_scale=0\.3, and stage2 with 0\.15\. Use"):
        guides.check(stage, 3, AB)


def test_missing_guide_is_refused_before_training(tmp_path):
    write_images(tmp_path / "images")
    config = guided(Autoguidance(1.5, f"{tmp_path}/none"), config=tiny_config(tmp_path / "images"))
    for mode in ("train", "all"):
        with pytest.raises(
            InputError, match=r"stage1\.guidance\[0\]\.checkpoint=.*/none' is not a"
        ):
            run(config.to_config_dict(), str(tmp_path / "run"), mode=mode)
    assert not (tmp_path / "images_prepared").exists()


@pytest.mark.second
def test_trained_run_is_guided_by_a_trained_network_of_another_family(tmp_path, caplog):
    """From images to samples, with previews that are guided; the guide is named throughout."""
    caplog.set_level("INFO", "rdm_jax")
    write_images(tmp_path / "images")
    settings = {"images": 80, "preview_every": 80, "checkpoint_every": 80}
    config = tiny_config(tmp_path / "images", **settings)
    run(config.with_stage(1, **OTHER), str(tmp_path / "small"), mode="train", stage=1)
    auto = Autoguidance(1.4, f"{tmp_path}/small/stage1", (0.05, 20.0))
    config = config.with_stage(1, guidance=(ClassifierFree(1.5, (0.2, 3.0)), auto))
    run(config.to_config_dict(), str(tmp_path / "run"))
    assert "guidance 1.5 at sigma 0.2 to 3, 1.4 by" in caplog.text
    assert list((tmp_path / "run/stage1/previews").glob("*.png"))
    made = json.loads((tmp_path / "run/samples/samples.json").read_text())
    folder = tmp_path / "small/stage1/checkpoints"
    assert made["checkpoints"][0]["guides"] == [{"step": 10, "folder": str(folder)}]
    assert [entry["kind"] for entry in made["stages"]["stage1"]["guidance"]] == [
        "classifierfree",
        "autoguidance",
    ]
    with np.load(tmp_path / "run/samples/samples.npz") as file:
        images = file["stage1"]
    assert len(np.unique(images)) > 10
    run(config.to_config_dict(), str(tmp_path / "run"), mode="sample")
    assert "12 images are already in" in caplog.text
    with pytest.raises(InputError, match=r"guidance\[1\]\.weight was 1\.4 and is 2\.0"):
        heavier = dataclasses.replace(auto, weight=2.0)
        other = config.with_stage(1, guidance=(config.stage(1).guidance[0], heavier))
        run(other.to_config_dict(), str(tmp_path / "run"), mode="sample")
