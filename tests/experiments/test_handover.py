"""The comparison of hand-overs: its configs, and its tables."""

from pathlib import Path

import pytest
from PIL import Image

from experiments import common, methods
from experiments.handover.variants import variants as handovers
from experiments.methods import ORDERS, Method, check
from experiments.relay_vs_cascade.variants import points
from tests.support.experiments import config_of, run, smallest, tables


@pytest.mark.second
@pytest.mark.parametrize("config", ["digits", "imagenet"])
def test_handovers_compare_methods_on_equal_terms(config):
    """Of the same networks, images and first stage; `check` holds that each of them can work."""
    found = handovers(config_of(f"configs/{config}.py"))
    check(found, (5, 19))
    relay = found["relay"].config
    for name in ("jump", "coupling", "cascade"):
        first, second = found[name].config.stages
        assert second.network == relay.stages[1].network
        assert second.training == relay.stages[1].training
        for field in ("network", "process", "training", "guidance"):
            assert getattr(first, field) == getattr(relay.stages[0], field)
        assert first.nfe == relay.stages[0].nfe
    jump, patch = found["jump"], relay.stages[1].process.patch
    for begin in jump.begins:
        method = Method("jump", jump, jump.config, Path()).with_sampler(**begin)
        stop = method.config.stages[0].sampler.stop
        assert stop * patch == pytest.approx(begin["sigma_max"])
        assert method.with_nfe(9).config.stages[-1].nfe == 9


@pytest.mark.long
def test_handover(tmp_path):
    printed = run(
        "-m", "experiments.handover.compare", *smallest(tmp_path), "--nfe=3,5", "--usual=3"
    )
    found = {title.partition(",")[0]: rows[2:] for title, rows in tables(printed).items()}
    names = ["block noise", "exact jump", "coupling", "classic cascade", "one stage"]
    evaluated = found["By NFE of the last network"]
    assert [row[:2] for row in evaluated] == [
        [name, count] for name in names for count in ("3", "5")
    ]
    assert {row[0] for row in found["By training images"]} == set(names)
    assert all(float(row[5]) > 0 and row[4] in ORDERS.values() for row in evaluated)
    for picture in ("curves.png", "images.png"):
        assert (tmp_path / "runs" / picture).stat().st_size > 1000


@pytest.mark.second
def test_compare_without_training(tmp_path, monkeypatch, capsys):
    """Every method is tuned, measured with the best settings, and in all tables."""
    seen = {}

    def measured(config, workdir, name):
        stage = config.stages[-1]
        assert seen.setdefault((workdir, name), config) == config  # a folder has one config
        if hasattr(stage.sampler, "joins_at"):
            stop = config.stages[0].sampler.stop
            assert stop == stage.sampler.joins_at(stage.process)
        return {"frechet_distance": 1.0 + getattr(stage.sampler, "eta", 0.0) + stage.nfe / 100}

    monkeypatch.setattr(common, "trained", lambda config, workdir, number: workdir / f"{number}")
    monkeypatch.setattr(common, "measured", measured)
    monkeypatch.setattr(common, "draw_samples", lambda *_: Image.new("RGB", (8, 8)))
    config = config_of("configs/digits.py")
    by_seed = methods.compare(
        handovers(config),
        tmp_path,
        (0, 1),
        (5, 9),
        9,
        points=points,
        floor={"frechet_distance": 0.5},
        classes=10,
    )
    found = {
        title.partition(",")[0]: rows[2:] for title, rows in tables(capsys.readouterr().out).items()
    }
    names = [variant.title for variant in handovers(config).values()]
    assert {row[0] for row in found["By training images"]} == set(names)
    assert [row[:2] for row in found["By NFE of the last network"]] == [
        [name, count] for name in names for count in ("5", "9")
    ]
    for method in by_seed[0] + by_seed[1]:
        assert getattr(method.config.stages[-1].sampler, "eta", 0.0) == 0.0  # the best one
        assert method.config.stages[-1].nfe == 9
    assert (tmp_path / "curves.png").stat().st_size > 1000
