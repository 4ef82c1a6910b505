"""One setting of the relay at a time, all else as in the config. README.md explains it.

python -m experiments.ablations.sweep --config configs/digits.py --workdir runs/ablations
"""

import dataclasses
import statistics
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common
from experiments.ablations.variants import GROUPS, SEVERAL, Variant, unguided
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.config import Config, Stage
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion import blurring
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.render.tables import markdown
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.ranges import parse_numbers

_CONFIG = define_config("Of a relay of two stages; configs/digits.py if it is not given.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/ablations", "Of all runs; the same command resumes."
)
_SEEDS = flags.DEFINE_string("seeds", "0-2", "Of the runs; most groups use the first only.")
_NFE = flags.DEFINE_integer(
    "nfe", 19, "Evaluations of stage 2's network per image; many, so that discretisation is small."
)
_GROUPS = flags.DEFINE_list("groups", [], "Groups of variants to run; all if it is not given.")


def handover_error(stage: Stage, images: ImageSet) -> str:
    """Where the relay joins, and what it takes to be zero there.

    Returns:
      sigma, the share of the lowest frequency's blur weight, and the RMS of the detail that the
      blur leaves in units of the noise, as text.
    """
    first = stage.sampler.joined_level(stage.process)
    pixels = jnp.asarray(images.batch(np.arange(len(images)))["image"])
    x = Pixels().encode(pixels, images.image_shape[0] // stage.resolution[0])
    detail = x - blurring.enlarge(blurring.mean_pool(x, factor=stage.factor), factor=stage.factor)

    def blurred(patch):
        return blurring.filter_patch(patch, first.blur)

    left = blurring.over_patches(blurred, stage.factor)((detail,))
    in_noise = jnp.sqrt(jnp.mean(left**2)) / first.sigma
    return f"{first.sigma:.3f}, {first.blur[0, 1]:.1%}, {in_noise:.3f}"


def measured(
    base: Config, variant: Variant, root: Path, seed: int, small: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Trains a variant, and measures stage 2 from stage 1's images and from real ones."""
    base = dataclasses.replace(base, seed=seed)
    usual = root / f"base-{seed}"
    for number in (1, 2):
        base = base.with_stage(number, checkpoint=str(common.trained(base, usual, number)))
    config = variant.change(base)
    same_training = _training_settings(config) == _training_settings(base)
    workdir = usual if same_training else root / f"{variant.name}-{seed}"
    if workdir != usual:
        config = config.with_stage(
            variant.stage, checkpoint=str(common.trained(config, workdir, variant.stage))
        )
    name = "relay_" + "".join(c if c.isalnum() else "_" for c in variant.name)
    from_real = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, low=f"folder:{small}")
    )
    relayed = common.measured(config, workdir, name)
    return relayed, common.measured(from_real, workdir, name.replace("relay", "real"))


def _training_settings(config: Config) -> list[tuple]:
    return [(stage.network, stage.process, stage.training) for stage in config.stages]


# Of a group's settings: distances of the relay, and from real small images.
Distances = dict[str, tuple[list[float], list[float]]]


def draw(groups: dict[str, Distances], floor: float, path: Path) -> None:
    """Draws one panel per group: means over seeds with their standard deviation, and the floor."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.4 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, (title, distances) in zip(panels, groups.items(), strict=False):
        for number, label in enumerate(("the relay", "from real small images")):
            values = [found[number] for found in distances.values()]
            spread = [statistics.stdev(each) if len(each) > 1 else 0 for each in values]
            heights = list(range(len(values)))
            axes.errorbar(
                list(map(statistics.mean, values)),
                heights,
                xerr=spread,
                fmt="os"[number],
                markersize=4,
                label=label,
            )
        axes.axvline(floor, color="0.5", linestyle=":", label="held-out real images")
        axes.set(title=title, yticks=heights, yticklabels=list(distances))
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    panels[0].set_xlim(left=0)  # shared by all panels
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.supxlabel("Frechet distance")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=90)


def sweep() -> None:
    """Prints a table for every group, and draws all of them."""
    root, config = local_path(_WORKDIR.value, "--workdir"), configs.parse(_CONFIG.value)
    seeds = parse_numbers(_SEEDS.value, "--seeds")
    for group in _GROUPS.value:
        if group not in GROUPS:
            raise InputError(f"--groups={group!r} is not a group", f"Use {', '.join(GROUPS)}.")
    common.check_relay(config)
    base, held_out, floor = common.prepared(unguided(config, _NFE.value), root)
    small = root / "held_out_small"
    common.write_small(held_out, base.stages[1].factor, small)
    columns = [
        *common.columns(floor),
        *(f"{name}, from real small images" for name in common.columns(floor)[:1]),
    ]
    drawn: dict[str, Distances] = {}
    for group in _GROUPS.value or GROUPS:
        rows, drawn[group] = [], {}
        for variant in GROUPS[group]:
            of_group = seeds if group in SEVERAL else seeds[:1]
            relayed, real = zip(
                *(measured(base, variant, root, seed, small) for seed in of_group), strict=True
            )
            changed = variant.change(base)
            joined = handover_error(changed.stages[1], held_out)
            rows.append([variant.setting, joined, *common.cells(relayed), common.cells(real)[0]])
            as_in_config = " (config)" if changed == base else ""
            drawn[group][variant.setting + as_in_config] = (
                list(map(common.distance, relayed)),
                list(map(common.distance, real)),
            )
        header = ["", "hand-over: sigma, blur left, detail left", *columns]
        print(f"\n{group}\n\n{markdown(header, rows)}", flush=True)
    draw(drawn, common.distance(floor), root / "ablations.png")


if __name__ == "__main__":
    common.start()
    command(sweep, lambda: _WORKDIR.value, config="configs/digits.py")
