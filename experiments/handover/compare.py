"""Block noise, the exact jump, a coupling, a cascade and a single stage. See README.md.

python -m experiments.handover.compare --config configs/digits.py --seeds 0-2
"""

from absl import flags

from experiments import common, methods
from experiments.handover.variants import variants
from experiments.relay_vs_cascade.variants import points
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.ranges import parse_numbers

_CONFIG = define_config("Of a relay of two stages; configs/digits.py if it is not given.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/handover", "Of all runs; the same command resumes.")
_SEEDS = flags.DEFINE_string("seeds", "0-2", "Of the runs; everything is trained once per seed.")
_NFE = flags.DEFINE_string("nfe", "5,9,19,49", "Evaluations of the last network per image.")
_USUAL = flags.DEFINE_integer("usual", 19, "The NFE while something else is varied.")
_METHODS = flags.DEFINE_string("methods", "all", "Names besides 'relay', or 'all'.")


def compare() -> None:
    """Trains, measures, and prints the tables."""
    root, usual = local_path(_WORKDIR.value, "--workdir"), _USUAL.value
    config = configs.parse(_CONFIG.value)
    seeds, counts = parse_numbers(_SEEDS.value, "--seeds"), parse_numbers(_NFE.value, "--nfe")
    common.check_relay(config)
    methods.check(common.named(variants(config), _METHODS.value, "--methods"), {*counts, usual})
    base, held_out, floor = common.prepared(config, root)
    methods.compare(
        common.named(variants(base), _METHODS.value, "--methods"),
        root,
        seeds,
        counts,
        usual,
        points=points,
        floor=floor,
        classes=len(held_out.class_names),
    )
    real = [["held-out real images", *common.cells([floor])]]
    methods.print_table("The data itself", [""], real, floor)


if __name__ == "__main__":
    common.start()
    command(compare, lambda: _WORKDIR.value, config="configs/digits.py")
