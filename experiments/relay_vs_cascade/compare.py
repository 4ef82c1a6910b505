"""A relay, a classic cascade and a single stage: same networks, same data. See README.md.

    python -m experiments.relay_vs_cascade.compare --config configs/digits.py \\
        --workdir runs/relay_vs_cascade
"""

from pathlib import Path

from absl import flags

from experiments import common, methods
from experiments.methods import Method
from experiments.relay_vs_cascade.variants import points, tuned_variants
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.ranges import parse_numbers

_CONFIG = define_config("Of a relay of two stages; configs/digits.py if it is not given.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/relay_vs_cascade", "Of all runs; the same command resumes."
)
_SEEDS = flags.DEFINE_string("seeds", "0-2", "Of the runs; everything is trained once per seed.")
_NFE = flags.DEFINE_string("nfe", "5,9,19,49,199", "Evaluations of the last network per image.")
_USUAL = flags.DEFINE_integer("usual", 19, "The NFE while something else is varied.")


def from_real(by_seed: list[list[Method]], held_out: ImageSet, folder: Path) -> list[list[str]]:
    """Rows of stage 2 alone, from pooled real images that were held out."""
    common.write_small(held_out, by_seed[0][0].config.stages[-1].factor, folder)
    rows = []
    for same in list(zip(*by_seed, strict=True))[:2]:  # the relay and the cascade
        found = [method.metrics("from_real", method.from_images(folder)) for method in same]
        rows.append([same[0].title, *common.cells(found)])
    return rows


def compare() -> None:
    """Trains, measures, and prints the tables."""
    root, usual = local_path(_WORKDIR.value, "--workdir"), _USUAL.value
    config = configs.parse(_CONFIG.value)
    seeds, counts = parse_numbers(_SEEDS.value, "--seeds"), parse_numbers(_NFE.value, "--nfe")
    common.check_relay(config)
    methods.check(tuned_variants(config), {*counts, usual})
    base, held_out, floor = common.prepared(config, root)
    by_seed = methods.compare(
        tuned_variants(base),
        root,
        seeds,
        counts,
        usual,
        points=points,
        floor=floor,
        classes=len(held_out.class_names),
    )
    real = from_real(by_seed, held_out, root / "held_out_small")
    real.append(["held-out real images", *common.cells([floor])])
    methods.print_table(f"Stage 2 from real small images, NFE {usual}", ["method"], real, floor)


if __name__ == "__main__":
    common.start()
    command(compare, lambda: _WORKDIR.value, config="configs/digits.py")
