"""The autoencoder that a run can train for itself."""

import dataclasses

from rdm_jax.config.stage import Training
from rdm_jax.models.autoencoder import AutoencoderKL
from rdm_jax.runtime.fields import at_least, one_of

SMALL = AutoencoderKL(widths=(16, 32, 64), blocks=1, groups=8)
SHORT = Training(
    images=20_000,
    batch_size=16,
    learning_rate=1e-3,
    warmup=1_000,
    schedule="cosine",
    clip_norm=1.0,
    ema_halflife=1_000.0,
    label_dropout=0.0,
    checkpoint_every=4_000,
    preview_every=4_000,
    log_every=400,
    validation=64,
)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder, trained by --mode=autoencoder on the last stage's images.

    The loss is the error of the reconstruction plus the KL divergence of the latents from unit
    noise; there is no adversary and no perceptual loss.

    Attributes:
      network: its sizes. What is written has the scale and shift of its latents, measured on images
        that it was validated on.
      error: 'l1', the mean absolute error, or 'l2', the mean squared error, of values in [-1, 1].
      kl_weight: of the KL divergence, a mean over the values of latents.
      training: as of a stage; without augmentation, averages, `start_from`, `dct_quality` and
        evaluation.
    """

    network: AutoencoderKL = SMALL
    error: str = one_of("l1", "l2", default="l1")
    kl_weight: float = at_least(0, default=1e-4)
    training: Training = SHORT

    @property
    def name(self) -> str:
        """'autoencoder': its section in a config, and its folder in a workdir."""
        return "autoencoder"
