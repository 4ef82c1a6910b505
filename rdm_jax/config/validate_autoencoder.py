"""The checks of a run that trains an autoencoder."""

from rdm_jax.config.rules import require
from rdm_jax.config.schema import Config

# Fields of `Training` that an autoencoder does not have, and the values that mean so.
UNUSED = {
    "augment": 0.0,
    "averages": (),
    "start_from": "",
    "dct_quality": 0,
    "evaluate_every": 0,
    "label_dropout": 0.0,
}


def check(config: Config, devices: int) -> None:
    """Refuses an autoencoder that cannot be trained on the last stage's images.

    Args:
      config: of the run, whose fields are within their bounds.
      devices: of all processes.

    Raises:
      InputError: names the field, its value and the remedy.
    """
    ours, path = config.autoencoder, "config.autoencoder"
    ours.network.check(f"{path}.network")
    last, channels = config.stages[-1], config.data.channels
    height, width = last.resolution
    ours.network.check_images(height, width, channels, f"config.{last.name}.resolution")
    for field, value in UNUSED.items():
        given = getattr(ours.training, field)
        require(given == value, f"{path}.training.{field}", given, f"Use {value!r}.")
    training = ours.training
    require(
        training.batch_size % (training.accumulate * devices) == 0,
        f"{path}.training.batch_size",
        training.batch_size,
        f"Use a multiple of {devices * training.accumulate} ({devices} devices, "
        f"accumulate={training.accumulate}).",
    )
