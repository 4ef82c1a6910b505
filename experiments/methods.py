"""Methods that are compared: trained with several seeds, tuned in the same way, measured."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from experiments import common
from rdm_jax.config import Config, Training, validate
from rdm_jax.diffusion.protocols import Joins
from rdm_jax.render import pictures
from rdm_jax.render.tables import markdown
from rdm_jax.runtime.files import atomic_write
from rdm_jax.sampling.stage_functions import stage_levels

ORDERS = {1: "Euler", 2: "Heun"}
SHOWN = 8  # columns of the picture


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method before its training.

    Attributes:
      title: in tables and pictures.
      config: two-stage methods share the first one's stage 1.
      settings: values of fields of the last stage's sampler that are tuned one after the other.
      begins: fields that are tuned for each NFE, together with the solver.
    """

    title: str
    config: Config
    settings: dict[str, Sequence[float]]
    begins: Sequence[dict[str, float]] = ({},)


@dataclasses.dataclass
class Method:
    """One method, trained with one seed.

    Attributes:
      name: of its folder.
      variant: what it is.
      config: its last stage samples with the usual NFE.
      workdir: of its training and evaluations.
      schedules: fields of the last stage's sampler by NFE.
    """

    name: str
    variant: Variant
    config: Config
    workdir: Path
    schedules: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """In tables and pictures."""
        return self.variant.title

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.config.stages)

    def metrics(self, name: str, config: Config | None = None) -> dict[str, float]:
        """The metrics of its samples, with this config or its own."""
        return common.measured(config or self.config, self.workdir, name)

    def with_sampler(self, **fields) -> "Method":
        """The method with other fields of its last stage's sampler.

        If that joins, the stage before stops where it does.
        """
        config = self.config.with_stage(self.last, sampler=fields)
        last = config.stages[-1]
        if isinstance(last.sampler, Joins):
            stop = {"stop": last.sampler.joins_at(last.process)}
            config = config.with_stage(self.last - 1, sampler=stop)
        return dataclasses.replace(self, config=config)

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


def check(variants: dict[str, Variant], counts: Iterable[int]) -> None:
    """Refuses what one of the methods cannot do, before training. Raises InputError."""
    for variant, count in itertools.product(variants.values(), counts):
        method = Method("", variant, variant.config, Path())
        for begin in variant.begins:
            validate.check_config(method.with_sampler(**begin).with_nfe(count).config)


def trained(variants: dict[str, Variant], root: Path, seed: int, usual: int) -> list[Method]:
    """Trains the methods with one seed; they sample with `usual` NFE.

    Those of two stages share the stage 1 of the first method.
    """
    first, methods = None, []
    for name, variant in variants.items():
        config, workdir = dataclasses.replace(variant.config, seed=seed), root / f"{name}-{seed}"
        if len(config.stages) > 1:
            first = first or common.trained(config, workdir, 1)
            config = config.with_stage(1, checkpoint=str(first))
        last = common.trained(config, workdir, len(config.stages))
        config = config.with_stage(len(config.stages), checkpoint=str(last))
        methods.append(Method(name, variant, config, workdir).with_sampler().with_nfe(usual))
    return methods


def tuned(
    methods: list[list[Method]], counts: Sequence[int], usual: int
) -> tuple[list[list[Method]], list[list[str]], list[list[str]], list[int]]:
    """Tunes every method with the first seed.

    Args:
      methods: by seed.
      counts: NFE of the last network.
      usual: the NFE while something else is varied.

    Returns:
      The methods, rows of `best_settings` and of `best_schedules`, and the latter's NFE.
    """
    best, settings = best_settings(methods[0])
    methods = [
        [method.with_sampler(**best[method.name]) for method in same_seed] for same_seed in methods
    ]
    few = sorted({count for count in counts if count < usual} | {usual})
    schedules, tuning = best_schedules(methods[0], few)
    for method in itertools.chain(*methods):
        # Above the usual NFE the schedule matters less, and stays that of the usual NFE.
        found = schedules[method.name]
        method.schedules = {count: found.get(count, found[usual]) for count in {*counts, usual}}
    return methods, settings, tuning, few


def best_settings(methods: list[Method]) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Tunes each sampler's own settings, one at a time, by the first seed's distance.

    Returns:
      The best fields of the sampler by method, and rows of all metrics.
    """
    best, rows = {method.name: {} for method in methods}, []
    for method in methods:
        for field, values in method.variant.settings.items():
            chosen = method.with_sampler(**best[method.name])
            found = {
                value: chosen.with_sampler(**{field: value}).metrics(f"{field}_{n}")
                for n, value in enumerate(values)
            }
            best[method.name][field] = min(found, key=lambda value: common.distance(found[value]))
            rows += [
                [method.title, f"{field} {value:g}", *common.cells([found[value]])]
                for value in values
            ]
    return best, rows


def best_schedules(
    methods: Sequence[Method], counts: Sequence[int]
) -> tuple[dict[str, dict[int, dict]], list[list[str]]]:
    """Tunes the solver and the first noise level for each NFE, by the first seed's distance.

    Returns:
      The best fields of the sampler by method and NFE, and rows of all distances, a column per NFE.
    """
    best, rows = {method.name: {} for method in methods}, []
    for method in methods:
        pairs = itertools.product(ORDERS, method.variant.begins)
        tried = [{"order": order, **begin} for order, begin in pairs]
        found = {}
        for (number, fields), count in itertools.product(enumerate(tried), counts):
            changed = dataclasses.replace(method, schedules={count: fields}).with_nfe(count)
            # The folder's name is that of earlier versions.
            name = "_".join(f"{field}_{value:g}" for field, value in fields.items())
            found[number, count] = changed.metrics(f"ladder_{name}_{count}".replace(".", "_"))
        for count in counts:
            of_count = [common.distance(found[number, count]) for number in range(len(tried))]
            best[method.name][count] = tried[of_count.index(min(of_count))]
        for number, fields in enumerate(tried):
            distances = [common.cells([found[number, count]])[0] for count in counts]
            solver, begin = ORDERS[fields["order"]], f"{fields.get('sigma_max', '')}"
            rows.append([method.title, solver, begin, *distances])
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
        title = same[0].title
        for count in counts:
            counted = [method.with_nfe(count) for method in same]
            config = counted[0].config
            cost = common.sampling_flops(config.stages, config.data.channels, classes) / 1e9
            begin = float(stage_levels(config.stages[-1]).sigma[0])
            found = [method.metrics(_folder(count)) for method in counted]
            schedule = [f"{begin:.3g}", ORDERS[config.stages[-1].sampler.order]]
            cells = common.cells(found)
            rows.append([title, str(count), f"{cost:.2f}", *schedule, *cells])
            distances = list(map(common.distance, found))
            by_count.setdefault(title, {})[count] = distances
            by_cost.setdefault(title, {})[cost] = distances
    return rows, by_count, by_cost


def by_images(
    methods: list[list[Method]], points: Callable[[Training, Training], list[int]]
) -> tuple[list[list[str]], dict]:
    """The same by the number of training images of all networks of a method.

    Args:
      methods: by seed, with the usual NFE.
      points: steps of a last network's training, by its settings and those of the first method.
    """
    rows, curves = [], {}
    of_first = methods[0][0].config.stages[-1].training
    for same in zip(*methods, strict=True):
        *earlier, last = (stage.training for stage in same[0].config.stages)
        for step in points(last, of_first):
            found = [method.metrics_at(step) for method in same]
            images = step * last.batch_size + sum(training.images for training in earlier)
            counts = [f"{step * last.batch_size:,}", f"{images:,}"]
            rows.append([same[0].title, *counts, *common.cells(found)])
            curves.setdefault(same[0].title, {})[images] = list(map(common.distance, found))
    return rows, curves


def compare(
    variants: dict[str, Variant],
    root: Path,
    seeds: Sequence[int],
    counts: Sequence[int],
    usual: int,
    *,
    points: Callable[[Training, Training], list[int]],
    floor: dict[str, float],
    classes: int,
) -> list[list[Method]]:
    """Trains, tunes and measures the methods, draws curves and samples, and prints the tables.

    Args:
      variants: by name; the first is a relay.
      root: folder of all runs.
      seeds: of the runs.
      counts: NFE of the last network.
      usual: the NFE while something else is varied.
      points: as for `by_images`.
      floor: metrics of the held-out images.
      classes: of the data.

    Returns:
      The methods by seed, with the usual NFE.
    """
    methods = [trained(variants, root, seed, usual) for seed in seeds]
    methods, settings, tuning, few = tuned(methods, counts, usual)
    evaluated, by_count, by_cost = by_nfe(methods, counts, classes)
    methods = [[method.with_nfe(usual) for method in same_seed] for same_seed in methods]
    shown, learning = by_images(methods, points)
    curves = {
        "NFE of the last network": by_count,
        "GFLOPs per image, all stages": by_cost,
        "training images, all stages": learning,
    }
    draw_curves(curves, common.distance(floor), root / "curves.png")
    rows = ((method.title, method.config, method.workdir) for method in methods[0])
    pictures.save_picture(common.draw_samples(rows, SHOWN), root / "images.png")
    header = ["method", "solver", "sigma_max", *(f"NFE {count}" for count in few)]
    title = f"By solver and first noise level, first seed: {common.columns(floor)[0]}"
    print(f"\n{title}\n\n{markdown(header, tuning)}")
    solver = ["method", "NFE", "GFLOPs", "first sigma", "solver"]
    images = ["method", "of the last network", "of all"]
    for title, header, rows in (
        (f"Settings of the samplers, first seed, NFE {usual}", ["method", "setting"], settings),
        ("By NFE of the last network", solver, evaluated),
        (f"By training images, NFE {usual}", images, shown),
    ):
        print_table(title, header, rows, floor)
    return methods


def print_table(
    title: str, header: list[str], rows: list[list[str]], metrics: dict[str, float]
) -> None:
    """Prints a table whose last columns are metrics."""
    print(f"\n{title}\n\n{markdown([*header, *common.columns(metrics)], rows)}")


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
            axes.plot(x, mean, "o-", markersize=3, label=name)
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
