"""The experiments: their configs, and tables that come from runs."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from experiments import common
from experiments.ablations.variants import GROUPS, unguided
from experiments.methods import ORDERS
from experiments.relay_vs_cascade.variants import points, variants
from experiments.transformers.variants import variants as transformers
from rdm_jax.config import validate
from rdm_jax.data.sources import open_source
from rdm_jax.diffusion.guidance import as_list
from rdm_jax.diffusion.processes import CascadeProcess, GaussianProcess, RelayProcess
from rdm_jax.evaluation import inception_weights
from rdm_jax.render.tables import cell
from rdm_jax.runtime.errors import InputError
from rdm_jax.training.count import Count
from tests.support import inception_file
from tests.support.commands import python
from tests.support.experiments import config_of, run, smallest, tables

CHAINS = {
    "8-16-32": (2, 2),
    "4-32": (8,),
    "8x6-32x24": (4,),
    "emoji-16-64-256": (4, 4),
    "emoji-16-64-256-tiny": (4, 4),
}


def test_variants_compare_methods_on_equal_terms():
    methods = variants(config_of("configs/digits.py"))
    for config in methods.values():
        validate.check_config(config)
    relay, cascade, single = (methods[name] for name in ("relay", "cascade", "single"))
    assert relay.stages[0] == cascade.stages[0]
    assert [type(config.stages[-1].process) for config in (relay, cascade, single)] == [
        RelayProcess,
        CascadeProcess,
        GaussianProcess,
    ]
    last = [config.stages[-1] for config in methods.values()]
    assert len({stage.network for stage in last}) == len({stage.guidance for stage in last}) == 1
    assert relay.stages[1].training == cascade.stages[1].training
    assert single.stages[0].training.images == sum(stage.training.images for stage in relay.stages)
    counts = [stage.build(1, 10).num_parameters for stage in last]
    stem = 9 * 2 * 4**2 * last[0].network.channels  # of two more channels, folded 4x4
    assert counts[1] - counts[0] == stem and counts[2] == counts[0]


@pytest.mark.second
@pytest.mark.parametrize(
    ("config", "of_relay"), [("digits", [200, 400, 600]), ("emoji", [10416, 20832, 31250])]
)
def test_points_are_kept_checkpoints(config, of_relay):
    methods = variants(config_of(f"configs/{config}.py"))
    relays = methods["relay"].stages[-1].training
    for changed in methods.values():
        training = changed.stages[-1].training
        compared = points(training, relays)
        offset = training.steps - relays.steps  # as many steps as one stage is trained for longer
        assert (
            np.abs(np.array(compared) - offset - of_relay).max() <= relays.steps // 12
            and len(compared) == 3
        )
        count = Count(training.batch_size)
        due = [
            step
            for step in range(1, training.steps)
            if count.is_due(step, training.checkpoint_every)
        ]
        assert {*compared} <= {*due, training.steps} and len(due) + 1 <= training.keep_newest


@pytest.mark.parametrize("wanted", [5, pytest.param(49, marks=pytest.mark.second)])
def test_with_nfe_evaluates_the_network_so_often(wanted):
    for config in variants(config_of("configs/digits.py")).values():
        last = len(config.stages)
        changed = common.with_nfe(config, last, wanted)
        validate.check_config(changed)
        assert changed.stages[-1].nfe == wanted and changed.stages[:-1] == config.stages[:-1]


@pytest.mark.second
def test_with_nfe_joins_closest_to_the_truncation():
    for wanted in (5, 9):
        stage = common.with_nfe(config_of("configs/digits.py"), 2, wanted).stages[1]
        every = [
            dataclasses.replace(stage, sampler=dataclasses.replace(stage.sampler, steps=n))
            for n in range(2, 3 * wanted)
        ]
        joined = [
            float(each.sampler.joined_level(each.process).sigma)
            for each in every
            if each.nfe == wanted
        ]
        assert (
            float(stage.sampler.joined_level(stage.process).sigma)
            == max(joined)
            <= stage.sampler.truncation_sigma
        )


def test_with_nfe_refuses_impossible_numbers():
    with pytest.raises(InputError, match=r"NFE 4 is not possible\. Use an odd number, 3 or more"):
        common.with_nfe(config_of("configs/digits.py"), 1, 4)


def test_sampling_flops():
    config = config_of("configs/digits.py")
    first, second = (stage.multiply_adds(1, 10) for stage in config.stages)
    assert config.stages[0].guidance == as_list(2) and config.stages[1].guidance == as_list(1)
    assert common.sampling_flops(config.stages, 1, 10) == 2 * (2 * 23 * first + 5 * second)


@pytest.mark.parametrize("classes", [("a", "b"), ()])
def test_write_small_pools_into_class_folders(tmp_path, classes):
    class Images:
        class_names = classes
        image_shape = (4, 4, 1)

        def __len__(self):
            return 3

        def batch(self, numbers):
            images = np.zeros((3, 4, 4, 1), np.uint8)
            images[1, :2, :2, 0] = [[10, 20], [30, 40]]
            return {
                "image": images[numbers],
                "label": np.array([0, 1, 0] if classes else [-1, -1, -1])[numbers],
            }

    common.write_small(Images(), 2, tmp_path / "small")
    source = open_source(f"folder:{tmp_path / 'small'}")
    assert source.class_names == classes and [source.label(n) for n in range(len(source))] == (
        [0, 0, 1] if classes else [-1] * 3
    )
    assert source.decode(2 if classes else 1, channels=1, background=(0, 0, 0))[
        ..., 0
    ].tolist() == [[25, 0], [0, 0]]


@pytest.mark.second
@pytest.mark.parametrize(
    "variant", [v for group in GROUPS.values() for v in group], ids=lambda v: v.name
)
def test_ablation_variants_differ_in_one_stage(variant):
    base = unguided(config_of("configs/digits.py"), 19)
    changed = variant.change(base)
    validate.check_config(changed)
    nfe = re.match(r"NFE (\d+)", variant.setting)
    assert changed.stages[1].nfe == (int(nfe[1]) if nfe else base.stages[1].nfe)
    for number, (stage, before) in enumerate(zip(changed.stages, base.stages, strict=True), 1):
        trained = [(s.network, s.process, s.training) for s in (stage, before)]
        assert trained[0] == trained[1] or number == variant.stage
    second = changed.stages[1]
    assert (
        second.process.clock.time(second.sampler.joined_level(second.process).sigma) < 1 + 1e-6
    )  # not beyond what it was trained for
    assert len({v.name for group in GROUPS.values() for v in group}) == sum(
        map(len, GROUPS.values())
    )


@pytest.mark.parametrize("chain", CHAINS)
def test_chain_is_valid(chain):
    config = config_of("experiments/chain/config.py", chain)
    validate.check_config(config)
    assert tuple(stage.factor for stage in config.stages[1:]) == CHAINS[chain]
    if not chain.startswith("emoji"):
        for stage in config.stages[1:]:
            assert (
                float(re.search("where ([0-9.]+)% ", stage.sampler.handover(stage.process))[1]) < 10
            )


@pytest.mark.second
@pytest.mark.parametrize(
    ("experiment", "argument", "said"),
    [
        ("relay_vs_cascade.compare", "--config.data.held_out=0", "config.data.held_out=0 "),
        ("relay_vs_cascade.compare", "--nfe=5,8", "NFE 8 "),
        ("transformers.compare", "--variants=unit", "--variants=unit "),
        ("handover.compare", "--methods=jumps", "--methods=jumps "),
        ("handover.compare", "--nfe=5,8", "NFE 8 "),
        ("ablations.sweep", "--groups=clocks", "--groups='clocks' "),
        (
            "ablations.sweep",
            "--config=experiments/chain/config.py:8-16-32",
            r"--config=\['gaussian', 'relay', 'relay'\] ",
        ),
    ],
)
def test_experiments_refuse_before_any_work(experiment, argument, said, tmp_path):
    done = python("-m", f"experiments.{experiment}", f"--workdir={tmp_path / 'runs'}", argument)
    assert done.returncode == 2 and re.search(rf"^error: {said}.*\.$", done.stderr, re.MULTILINE), (
        done.stderr
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.second
def test_spectrum(tmp_path):
    for number, small in enumerate(
        np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    ):  # little detail
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(
            tmp_path / "images" / f"{number}.png"
        )
    printed = run(
        "-m",
        "experiments.spectrum.spectrum",
        f"--source=folder:{tmp_path / 'images'}",
        "--size=64",
        f"--out={tmp_path}",
    )
    (rows,) = tables(printed).values()
    assert (tmp_path / "spectrum.png").is_file()
    assert [row[0] for row in rows[2:]] == [
        "white noise on small images",
        "white, 64",
        "block, 64",
        "white + 0.15 block, 64",
    ]
    for row, expected in zip(rows[3:], (12.04, 0.0, 10.71), strict=True):
        found, foretold = map(
            float, re.match(r"(.+) \((.+)\)", row[1]).groups()
        )  # of one half-period
        assert (
            abs(foretold - expected) < 0.3 and abs(found - foretold) < 0.8
        )  # the torus has no edges, images have


AS_PUBLISHED = """
import runpy
from rdm_jax.evaluation import inception_weights
inception_weights.load.__defaults__ = ({digest!r},)
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
def test_ablations(tmp_path):
    printed = run(
        "-m",
        "experiments.ablations.sweep",
        *smallest(tmp_path),
        "--groups=clock,order",
        "--nfe=5",
    )
    found = {title: rows[2:] for title, rows in tables(printed).items()}
    assert {title: [row[0] for row in rows] for title, rows in found.items()} == {
        group: [variant.setting for variant in GROUPS[group]] for group in ("clock", "order")
    }
    results = [
        json.loads(path.read_text())["results"]
        for path in (tmp_path / "runs").glob("**/evaluation.json")
    ]
    measured = {
        cell("frechet_distance", row["metrics"]["frechet_distance"])
        for rows in results
        for row in rows.values()
    }
    shown = [row[2] for rows in found.values() for row in rows]
    assert (
        measured.issuperset(shown) and len(set(shown)) > 2
    )  # a number of its own for each way to sample
    assert (tmp_path / "runs/ablations.png").stat().st_size > 1000
    joined = [float(row[1].partition(",")[0]) for row in found["clock"]]
    assert (
        joined == sorted(joined) and len(set(joined)) > 1
    )  # a longer clock goes further out, where a level is


@pytest.mark.parametrize("config", ["digits", "emoji_small"])
def test_transformer_variants_differ_in_networks(config):
    config = config_of(f"configs/{config}.py", *(["tiny"] if config == "emoji_small" else []))
    found = transformers(config)
    for relay in found.values():
        validate.check_config(relay)
        for stage, usual in zip(relay.stages, config.stages, strict=True):
            assert (stage.resolution, stage.sampler) == (usual.resolution, usual.sampler)
    others = [name for name in found if name not in ("unet", "both stages")]
    assert all(found[name].stages[0] == config.stages[0] for name in others)
    assert len({found[name].stages[1] for name in others}) == len(others)


@pytest.mark.long
def test_transformers(tmp_path):
    printed = run(
        "-m",
        "experiments.transformers.compare",
        *smallest(tmp_path),
        "--seconds=0.1",
        "--variants=mixed,both stages",
    )
    metrics, losses = re.findall(r"((?:^\|.*\|\n)+)", printed, re.MULTILINE)[-2:]
    names = ["unet", "mixed", "both stages"]
    for table, last in ((metrics, ["held-out real images"]), (losses, [])):
        rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
        assert rows == names + last
    assert (tmp_path / "runs/images.png").stat().st_size > 1000


@pytest.mark.long
@pytest.mark.parametrize("labelled", [True, False])
def test_relay_vs_cascade(labelled, tmp_path):
    program, arguments = (
        ["-m", "experiments.relay_vs_cascade.compare"],
        smallest(tmp_path, labelled),
    )
    if not labelled:  # of which Inception's features alone say something, here of random parameters
        parameters = {
            name: inception_file.draw(name, list(shape), 0)
            for name, shape in inception_weights._shapes().items()
        }
        digest = inception_file.write(tmp_path / "weights.pth", parameters)
        program = ["-c", AS_PUBLISHED.format(digest=digest, module=program[1])]
        arguments += [
            "--config.evaluation.features=inception",
            f"--config.evaluation.weights={tmp_path / 'weights.pth'}",
        ]
    printed = run(*program, *arguments, "--nfe=3,5", "--usual=3")
    found = {title.partition(",")[0]: rows[2:] for title, rows in tables(printed).items()}
    names = ["relay", "classic cascade", "one stage"]
    evaluated = found["By NFE of the last network"]
    assert [row[:2] for row in evaluated] == [
        [name, count] for name in names for count in ("3", "5")
    ]
    assert {row[0] for row in found["By training images"]} == set(names)
    assert [row[0] for row in found["Stage 2 from real small images"]] == [
        *names[:2],
        "held-out real images",
    ]
    assert all(float(row[5]) > 0 and row[4] in ORDERS.values() for row in evaluated)
    for picture in ("curves.png", "images.png"):
        assert (tmp_path / "runs" / picture).stat().st_size > 1000
