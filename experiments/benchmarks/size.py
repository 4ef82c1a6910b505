"""Parameters and multiply-adds of every stage's network, counted abstractly, as a Markdown table.

python -m experiments.benchmarks.size --config configs/imagenet.py --classes 1000
"""

from absl import flags

from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config

_CONFIG = define_config()
_CLASSES = flags.DEFINE_integer("classes", 0, "Number of classes; 0 for unconditional networks.")


def main() -> None:
    """Prints the table."""
    config = configs.parse(_CONFIG.value)
    channels, classes = config.data.channels, _CLASSES.value
    print("| stage | resolution | parameters | multiply-adds per forward pass |\n|---|---|---|---|")
    for number, stage in enumerate(config.stages, 1):
        (height, width), parameters = (
            stage.resolution,
            stage.build(channels, classes).num_parameters,
        )
        giga = stage.multiply_adds(channels, classes) / 1e9
        print(f"| {number} | {height} x {width} | {parameters:,} | {giga:,.2f} G |")


if __name__ == "__main__":
    command(main)
