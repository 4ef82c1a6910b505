"""A relay, a classic cascade and one stage alone, of the same networks, on the same data. See
README.md beside this file.

python -m experiments.relay_vs_cascade.compare --config configs/digits.py --workdir
runs/relay_vs_cascade
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image

from experiments import common
from experiments.relay_vs_cascade.variants import (
    AUGMENTS,
    ETAS,
    ORDERS,
    SIGMAS,
    TITLES,
    points,
    variants,
)
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.config import Config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.render import pictures
from rdm_jax.render.tables import markdown
from rdm_jax.run import run
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.ranges import parse_numbers
from rdm_jax.sampling.stage_sampler import stage_levels

_CONFIG = define_config("Of a relay of two stages; configs/digits.py if it is not given.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/relay_vs_cascade", "Of all runs; the same command goes on where it stopped."
)
_SEEDS = flags.DEFINE_string("seeds", "0-2", "Of the runs: everything is trained once for each.")
_EVALUATIONS = flags.DEFINE_string(
    "evaluations", "5,9,19,49,199", "Of the last network, for an image."
)
_USUAL = flags.DEFINE_integer(
    "usual", 19, "Evaluations of the last network where something else is varied."
)

SHOWN = 8  # columns of the picture


@dataclasses.dataclass
class Method:
    """One method, trained with one seed.

    Attributes:
      name: as in `TITLES`.
      config: whose last stage samples with `usual` evaluations.
      workdir: where it was trained, and where its evaluations are kept.
      ladders: fields of the last stage's sampler by the number of evaluations.
    """

    name: str
    config: Config
    workdir: Path
    ladders: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.config.stages)

    def metrics(self, name: str, config: Config | None = None) -> dict[str, float]:
        """What it makes with the config, measured."""
        return common.measured(config or self.config, self.workdir, name)

    def with_sampler(self, **fields) -> "Method":
        """The same, its last stage's sampler having other fields."""
        return dataclasses.replace(self, config=self.config.with_stage(self.last, sampler=fields))

    def with_evaluations(self, count: int) -> "Method":
        """The same with so many evaluations of the last network for an image, its ladder being what
        `ladders` says."""
        changed = self.with_sampler(**self.ladders.get(count, {}))
        return dataclasses.replace(
            changed, config=common.with_evaluations(changed.config, self.last, count)
        )

    def metrics_at(self, step: int) -> dict[str, float]:
        """The same of the last network as it was at a step of its training; at its end, what
        `by_evaluations` measures."""
        stage = self.config.stages[-1]
        if step == stage.training.steps:
            return self.metrics(f"evaluations_{stage.nfe}")
        return self.metrics(f"step_{step}", self.config.with_stage(self.last, checkpoint=str(step)))

    def from_images(self, folder: Path) -> Config:
        """The config that goes on from small images in a folder."""
        sampling = dataclasses.replace(self.config.sampling, low=f"folder:{folder}")
        return dataclasses.replace(self.config, sampling=sampling)


def trained(base: Config, root: Path, seed: int, usual: int) -> list[Method]:
    """Trains the three methods with one seed, to be sampled with `usual` evaluations; the cascade
    has the relay's stage 1."""
    config_of, methods = variants(dataclasses.replace(base, seed=seed)), []
    first = common.trained(config_of["relay"], root / f"relay-{seed}", 1)
    for name, config in config_of.items():
        if len(config.stages) > 1:
            config = config.with_stage(1, checkpoint=str(first))
        last = common.trained(config, root / f"{name}-{seed}", len(config.stages))
        config = config.with_stage(len(config.stages), checkpoint=str(last))
        methods.append(Method(name, config, root / f"{name}-{seed}").with_evaluations(usual))
    return methods


def best_settings(methods: list[Method]) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """What each sampler has of its own to set, chosen one after the other by the first seed's
    distance."""
    best, rows = {method.name: {} for method in methods}, []
    for method in methods:
        for field, values in (
            ("augment", AUGMENTS if method.name == "cascade" else ()),
            ("eta", ETAS),
        ):
            chosen = method.with_sampler(**best[method.name])
            found = {
                value: chosen.with_sampler(**{field: value}).metrics(f"{field}_{n}")
                for n, value in enumerate(values)
            }
            if found:
                best[method.name][field] = min(
                    found, key=lambda value: common.distance(found[value])
                )
            rows += [
                [TITLES[method.name], f"{field} {value:g}", *common.cells([found[value]])]
                for value in values
            ]
    return best, rows


def by_evaluations(
    methods: list[list[Method]], counts: Sequence[int], classes: int
) -> tuple[list[list[str]], dict, dict]:
    """Rows of the first table, and the distances of every method by evaluations of its last
    network, and by GFLOPs of all."""
    rows, by_count, by_cost = [], {}, {}
    for same in zip(*methods, strict=True):
        for count in counts:
            counted = [method.with_evaluations(count) for method in same]
            config = counted[0].config
            cost = common.sampling_flops(config.stages, config.data.channels, classes) / 1e9
            begin = float(stage_levels(config.stages[-1]).sigma[0])
            found = [method.metrics(f"evaluations_{count}") for method in counted]
            ladder = [f"{begin:.3g}", ORDERS[config.stages[-1].sampler.order]]
            rows.append(
                [TITLES[same[0].name], str(count), f"{cost:.2f}", *ladder, *common.cells(found)]
            )
            distances = list(map(common.distance, found))
            by_count.setdefault(same[0].name, {})[count] = by_cost.setdefault(same[0].name, {})[
                cost
            ] = distances
    return rows, by_count, by_cost


def best_ladders(
    methods: Sequence[Method], counts: Sequence[int]
) -> tuple[dict[str, dict[int, dict]], list[list[str]]]:
    """Of Euler's and Heun's method, and of the levels where those that generate from noise may
    begin, what does best with so many evaluations, by the first seed's distance.

    Returns:
      The best fields of the sampler by method and count, and rows of all distances, a column a
      count.
    """
    best, rows = {method.name: {} for method in methods}, []
    for method in methods:
        begins = [{}] if method.name == "relay" else [{"sigma_max": sigma} for sigma in SIGMAS]
        tried = [{"order": order, **begin} for order, begin in itertools.product(ORDERS, begins)]
        found = {}
        for (number, fields), count in itertools.product(enumerate(tried), counts):
            changed = dataclasses.replace(method, ladders={count: fields}).with_evaluations(count)
            name = "_".join(
                f"{field}_{value:g}".replace(".", "_") for field, value in fields.items()
            )
            found[number, count] = changed.metrics(f"ladder_{name}_{count}")
        for count in counts:
            least = min(
                range(len(tried)),
                key=lambda number, count=count: common.distance(found[number, count]),
            )
            best[method.name][count] = tried[least]
        for number, fields in enumerate(tried):
            distances = [common.cells([found[number, count]])[0] for count in counts]
            rows.append(
                [
                    TITLES[method.name],
                    ORDERS[fields["order"]],
                    f"{fields.get('sigma_max', '')}",
                    *distances,
                ]
            )
    return best, rows


def by_images(methods: list[list[Method]]) -> tuple[list[list[str]], dict]:
    """The same by images that all networks of a method have been shown."""
    rows, curves = [], {}
    relays = methods[0][0].config.stages[-1].training
    for same in zip(*methods, strict=True):
        *earlier, last = (stage.training for stage in same[0].config.stages)
        for step in points(last, relays):
            found = [method.metrics_at(step) for method in same]
            images = step * last.batch_size + sum(training.images for training in earlier)
            rows.append(
                [
                    TITLES[same[0].name],
                    f"{step * last.batch_size:,}",
                    f"{images:,}",
                    *common.cells(found),
                ]
            )
            curves.setdefault(same[0].name, {})[images] = list(map(common.distance, found))
    return rows, curves


def from_real(methods: list[list[Method]], held_out: ImageSet, folder: Path) -> list[list[str]]:
    """Stage 2 alone, from the means of real images that were held out."""
    common.write_small(held_out, methods[0][0].config.stages[-1].factor, folder)
    joined = list(zip(*methods, strict=True))[:2]
    return [
        [
            TITLES[same[0].name],
            *common.cells([m.metrics("from_real", m.from_images(folder)) for m in same]),
        ]
        for same in joined
    ]


def draw_curves(
    panels: dict[str, dict[str, dict[int, list[float]]]], floor: float, path: Path
) -> None:
    """A panel for each of what is on the horizontal axis: the mean over seeds, and a band of their
    standard deviation.

    Args:
      floor: the distance of real images that were held out.
    """
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, curve in curves.items():
            x, values = list(curve), np.array(list(curve.values()))
            mean, std = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0
            axes.plot(x, mean, "o-", markersize=3, label=TITLES[name])
            axes.fill_between(x, mean - std, mean + std, alpha=0.2)
        axes.axhline(floor, color="grey", linestyle=":", label="real images held out")
        axes.set(xlabel=title, ylabel="Frechet distance", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(
                ticker.LogLocator(subs=(1, 2, 5) if axis is axes.yaxis else (1, 2, 4, 6, 8))
            )
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def draw_images(methods: list[Method]) -> Image.Image:
    """The same small images, enlarged, as the relay and the cascade go on from them; what one stage
    makes of the same seeds."""
    rows = []
    for method in methods:
        sampling = dataclasses.replace(
            method.config.sampling, name="shown", seeds=f"0-{SHOWN - 1}", files="npz"
        )
        run(
            dataclasses.replace(method.config, sampling=sampling).to_config_dict(),
            str(method.workdir),
            mode="sample",
        )
        with np.load(method.workdir / "shown" / "samples.npz") as made:
            rows += [("stage 1", made["stage1"])] if not rows else []
            rows.append((TITLES[method.name], made["images"]))
    return pictures.labelled_rows(rows, [f"seed {n}" for n in range(SHOWN)])


def check(config: Config, counts: Iterable[int]) -> None:
    """Refuses, before anything is trained, what one of the methods cannot do. Raises InputError."""
    common.check_relay(config)
    for changed, count in itertools.product(variants(config).values(), counts):
        common.with_evaluations(changed, len(changed.stages), count)


def compare() -> None:
    """Trains, measures, and prints the tables."""
    root, usual = local_path(_WORKDIR.value, "--workdir"), _USUAL.value
    config, seeds, counts = (
        configs.parse(_CONFIG.value),
        *(parse_numbers(f.value, f"--{f.name}") for f in (_SEEDS, _EVALUATIONS)),
    )
    check(config, {*counts, usual})
    base, held_out, floor = common.prepared(config, root)
    methods = [trained(base, root, seed, usual) for seed in seeds]
    best, settings = best_settings(methods[0])
    methods = [
        [method.with_sampler(**best.get(method.name, {})) for method in same_seed]
        for same_seed in methods
    ]
    few = sorted({count for count in counts if count < usual} | {usual})
    ladders, laddered = best_ladders(methods[0], few)
    for method in itertools.chain(
        *methods
    ):  # with more evaluations it matters less, and is what it is with the usual
        found = ladders[method.name]
        method.ladders = {count: found.get(count, found[usual]) for count in {*counts, usual}}
    evaluated, by_count, by_cost = by_evaluations(methods, counts, len(held_out.class_names))
    methods = [[method.with_evaluations(usual) for method in same_seed] for same_seed in methods]
    shown, learning = by_images(methods)
    real = from_real(methods, held_out, root / "held_out_small")
    curves = {
        "evaluations of the last network": by_count,
        "GFLOPs of an image, all stages": by_cost,
        "images shown, all stages": learning,
    }
    draw_curves(curves, common.distance(floor), root / "curves.png")
    pictures.save_picture(draw_images(methods[0]), root / "images.png")
    real.append(["real images held out", *common.cells([floor])])
    tables = {
        f"Settings of the samplers, first seed, {usual} evaluations": (
            ["method", "setting"],
            settings,
        ),
        "By evaluations of the last network for an image": (
            ["method", "evaluations", "GFLOPs", "first sigma", "solver"],
            evaluated,
        ),
        f"By images shown, {usual} evaluations": (
            ["method", "to the last network", "to all"],
            shown,
        ),
        f"Stage 2 from real small images, {usual} evaluations": (["method"], real),
    }
    print(
        f"\nBy solver and the level where the ladder begins, first seed: {common.columns(floor)[0]}\n",
        markdown(
            ["method", "solver", "sigma_max", *(f"{count} evaluations" for count in few)], laddered
        ),
        *(
            f"\n{title}\n\n{markdown([*header, *common.columns(floor)], rows)}"
            for title, (header, rows) in tables.items()
        ),
        sep="\n",
    )


if __name__ == "__main__":
    common.start()
    command(compare, lambda: _WORKDIR.value, config="configs/digits.py")
