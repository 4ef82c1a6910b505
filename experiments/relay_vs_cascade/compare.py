"""A relay, a classic cascade and a single stage: same networks, same data. See README.md.

    python -m experiments.relay_vs_cascade.compare --config configs/digits.py \\
        --workdir runs/relay_vs_cascade
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib import ticker
from matplotlib.figure import Figure

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
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.ranges import parse_numbers
from rdm_jax.sampling.stage_sampler import stage_levels

_CONFIG = define_config("Of a relay of two stages; configs/digits.py if it is not given.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/relay_vs_cascade", "Of all runs; the same command resumes."
)
_SEEDS = flags.DEFINE_string("seeds", "0-2", "Of the runs; everything is trained once per seed.")
_NFE = flags.DEFINE_string("nfe", "5,9,19,49,199", "Evaluations of the last network per image.")
_USUAL = flags.DEFINE_integer("usual", 19, "The NFE while something else is varied.")

SHOWN = 8  # columns of the picture


@dataclasses.dataclass
class Method:
    """One method, trained with one seed.

    Attributes:
      name: as in `TITLES`.
      config: its last stage samples with `usual` NFE.
      workdir: of its training and evaluations.
      schedules: fields of the last stage's sampler by NFE.
    """

    name: str
    config: Config
    workdir: Path
    schedules: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.config.stages)

    def metrics(self, name: str, config: Config | None = None) -> dict[str, float]:
        """The metrics of its samples, with this config or its own."""
        return common.measured(config or self.config, self.workdir, name)

    def with_sampler(self, **fields) -> "Method":
        """The method with other fields of its last stage's sampler."""
        return dataclasses.replace(self, config=self.config.with_stage(self.last, sampler=fields))

    def with_nfe(self, nfe: int) -> "Method":
        """The method with another NFE of the last stage, and the noise schedule of that NFE."""
        changed = self.with_sampler(**self.schedules.get(nfe, {}))
        config = common.with_nfe(changed.config, self.last, nfe)
        return dataclasses.replace(changed, config=config)

    def metrics_at(self, step: int) -> dict[str, float]:
        """The metrics at a step of the last network's training; at its end those of `by_nfe`."""
        stage = self.config.stages[-1]
        if step == stage.training.steps:
            return self.metrics(_folder(stage.nfe))
        config = self.config.with_stage(self.last, checkpoint=str(step))
        return self.metrics(f"step_{step}", config)

    def from_images(self, folder: Path) -> Config:
        """The config that continues from small images in a folder."""
        sampling = dataclasses.replace(self.config.sampling, low=f"folder:{folder}")
        return dataclasses.replace(self.config, sampling=sampling)


def _folder(nfe: int) -> str:
    """The folder of an evaluation; evaluations of earlier versions have the same name."""
    return f"evaluations_{nfe}"


def trained(base: Config, root: Path, seed: int, usual: int) -> list[Method]:
    """Trains the three methods with one seed; they sample with `usual` NFE.

    The cascade shares the relay's stage 1.
    """
    config_of, methods = variants(dataclasses.replace(base, seed=seed)), []
    first = common.trained(config_of["relay"], root / f"relay-{seed}", 1)
    for name, config in config_of.items():
        if len(config.stages) > 1:
            config = config.with_stage(1, checkpoint=str(first))
        last = common.trained(config, root / f"{name}-{seed}", len(config.stages))
        config = config.with_stage(len(config.stages), checkpoint=str(last))
        methods.append(Method(name, config, root / f"{name}-{seed}").with_nfe(usual))
    return methods


def best_settings(methods: list[Method]) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Tunes each sampler's own settings, one at a time, by the first seed's distance.

    Returns:
      The best fields of the sampler by method, and rows of all metrics.
    """
    best, rows = {method.name: {} for method in methods}, []
    for method in methods:
        augments = AUGMENTS if method.name == "cascade" else ()
        for field, values in (("augment", augments), ("eta", ETAS)):
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


def by_nfe(
    methods: list[list[Method]], counts: Sequence[int], classes: int
) -> tuple[list[list[str]], dict, dict]:
    """Measures every method by its NFE.

    Returns:
      Rows of the first table, and the distances of every method by NFE of the last network and by
      GFLOPs of all networks.
    """
    rows, by_count, by_cost = [], {}, {}
    for same in zip(*methods, strict=True):
        name = same[0].name
        for count in counts:
            counted = [method.with_nfe(count) for method in same]
            config = counted[0].config
            cost = common.sampling_flops(config.stages, config.data.channels, classes) / 1e9
            begin = float(stage_levels(config.stages[-1]).sigma[0])
            found = [method.metrics(_folder(count)) for method in counted]
            schedule = [f"{begin:.3g}", ORDERS[config.stages[-1].sampler.order]]
            cells = common.cells(found)
            rows.append([TITLES[name], str(count), f"{cost:.2f}", *schedule, *cells])
            distances = list(map(common.distance, found))
            by_count.setdefault(name, {})[count] = distances
            by_cost.setdefault(name, {})[cost] = distances
    return rows, by_count, by_cost


def best_schedules(
    methods: Sequence[Method], counts: Sequence[int]
) -> tuple[dict[str, dict[int, dict]], list[list[str]]]:
    """Tunes the solver and the first noise level for each NFE, by the first seed's distance.

    The solvers are Euler's and Heun's methods; the first level varies for the methods that generate
    from noise.

    Returns:
      The best fields of the sampler by method and NFE, and rows of all distances, a column per NFE.
    """
    best, rows = {method.name: {} for method in methods}, []
    for method in methods:
        begins = [{}] if method.name == "relay" else [{"sigma_max": sigma} for sigma in SIGMAS]
        tried = [{"order": order, **begin} for order, begin in itertools.product(ORDERS, begins)]
        found = {}
        for (number, fields), count in itertools.product(enumerate(tried), counts):
            changed = dataclasses.replace(method, schedules={count: fields}).with_nfe(count)
            name = "_".join(
                f"{field}_{value:g}".replace(".", "_") for field, value in fields.items()
            )
            # The folder's name is that of earlier versions.
            found[number, count] = changed.metrics(f"ladder_{name}_{count}")
        for count in counts:
            of_count = [common.distance(found[number, count]) for number in range(len(tried))]
            best[method.name][count] = tried[of_count.index(min(of_count))]
        for number, fields in enumerate(tried):
            distances = [common.cells([found[number, count]])[0] for count in counts]
            solver, begin = ORDERS[fields["order"]], f"{fields.get('sigma_max', '')}"
            rows.append([TITLES[method.name], solver, begin, *distances])
    return best, rows


def by_images(methods: list[list[Method]]) -> tuple[list[list[str]], dict]:
    """The same by the number of training images of all networks of a method."""
    rows, curves = [], {}
    relays = methods[0][0].config.stages[-1].training
    for same in zip(*methods, strict=True):
        *earlier, last = (stage.training for stage in same[0].config.stages)
        for step in points(last, relays):
            found = [method.metrics_at(step) for method in same]
            images = step * last.batch_size + sum(training.images for training in earlier)
            counts = [f"{step * last.batch_size:,}", f"{images:,}"]
            rows.append([TITLES[same[0].name], *counts, *common.cells(found)])
            curves.setdefault(same[0].name, {})[images] = list(map(common.distance, found))
    return rows, curves


def from_real(methods: list[list[Method]], held_out: ImageSet, folder: Path) -> list[list[str]]:
    """Rows of stage 2 alone, from pooled real images that were held out."""
    common.write_small(held_out, methods[0][0].config.stages[-1].factor, folder)
    rows = []
    for same in list(zip(*methods, strict=True))[:2]:  # the relay and the cascade
        found = [method.metrics("from_real", method.from_images(folder)) for method in same]
        rows.append([TITLES[same[0].name], *common.cells(found)])
    return rows


def draw_curves(
    panels: dict[str, dict[str, dict[int, list[float]]]], floor: float, path: Path
) -> None:
    """Draws the mean over seeds, with a band of one standard deviation.

    Args:
      panels: the curve of each method, by the label of the horizontal axis.
      floor: the distance of the held-out real images.
      path: of the PNG.
    """
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for name, curve in curves.items():
            x, values = list(curve), np.array(list(curve.values()))
            mean = values.mean(1)
            std = values.std(1, ddof=1) if values.shape[1] > 1 else 0
            axes.plot(x, mean, "o-", markersize=3, label=TITLES[name])
            axes.fill_between(x, mean - std, mean + std, alpha=0.2)
        axes.axhline(floor, color="grey", linestyle=":", label="held-out real images")
        axes.set(xlabel=title, ylabel="Frechet distance", xscale="log", yscale="log")
        for axis, ticks in ((axes.xaxis, (1, 2, 4, 6, 8)), (axes.yaxis, (1, 2, 5))):
            axis.set_major_locator(ticker.LogLocator(subs=ticks))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def check(config: Config, counts: Iterable[int]) -> None:
    """Refuses what one of the methods cannot do, before training. Raises InputError."""
    common.check_relay(config)
    for changed, count in itertools.product(variants(config).values(), counts):
        common.with_nfe(changed, len(changed.stages), count)


def compare() -> None:
    """Trains, measures, and prints the tables."""
    root, usual = local_path(_WORKDIR.value, "--workdir"), _USUAL.value
    config = configs.parse(_CONFIG.value)
    seeds, counts = parse_numbers(_SEEDS.value, "--seeds"), parse_numbers(_NFE.value, "--nfe")
    check(config, {*counts, usual})

    # Training, and tuning with the first seed.
    base, held_out, floor = common.prepared(config, root)
    methods = [trained(base, root, seed, usual) for seed in seeds]
    best, settings = best_settings(methods[0])
    methods = [
        [method.with_sampler(**best.get(method.name, {})) for method in same_seed]
        for same_seed in methods
    ]
    few = sorted({count for count in counts if count < usual} | {usual})
    schedules, tuning = best_schedules(methods[0], few)
    for method in itertools.chain(*methods):
        # Above the usual NFE the schedule matters less, and stays that of the usual NFE.
        found = schedules[method.name]
        method.schedules = {count: found.get(count, found[usual]) for count in {*counts, usual}}

    # Measuring, with all seeds.
    evaluated, by_count, by_cost = by_nfe(methods, counts, len(held_out.class_names))
    methods = [[method.with_nfe(usual) for method in same_seed] for same_seed in methods]
    shown, learning = by_images(methods)
    real = from_real(methods, held_out, root / "held_out_small")
    real.append(["held-out real images", *common.cells([floor])])

    # Pictures and tables.
    curves = {
        "NFE of the last network": by_count,
        "GFLOPs per image, all stages": by_cost,
        "training images, all stages": learning,
    }
    draw_curves(curves, common.distance(floor), root / "curves.png")
    picture = common.draw_samples(
        ((TITLES[method.name], method.config, method.workdir) for method in methods[0]), SHOWN
    )
    pictures.save_picture(picture, root / "images.png")
    header = ["method", "solver", "sigma_max", *(f"NFE {count}" for count in few)]
    title = f"By solver and first noise level, first seed: {common.columns(floor)[0]}"
    print(f"\n{title}\n\n{markdown(header, tuning)}")
    tables = {
        f"Settings of the samplers, first seed, NFE {usual}": (["method", "setting"], settings),
        "By NFE of the last network": (
            ["method", "NFE", "GFLOPs", "first sigma", "solver"],
            evaluated,
        ),
        f"By training images, NFE {usual}": (["method", "of the last network", "of all"], shown),
        f"Stage 2 from real small images, NFE {usual}": (["method"], real),
    }
    for title, (header, rows) in tables.items():
        print(f"\n{title}\n\n{markdown([*header, *common.columns(floor)], rows)}")


if __name__ == "__main__":
    common.start()
    command(compare, lambda: _WORKDIR.value, config="configs/digits.py")
