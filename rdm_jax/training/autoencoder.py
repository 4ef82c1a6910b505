"""The training of an autoencoder: the objective, and the trainer of stages with it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rdm_jax.config import Config
from rdm_jax.config.autoencoder import Autoencoder
from rdm_jax.data.augment import mirror
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.models.autoencoder import AutoencoderKL, Moments
from rdm_jax.models.codec import Codec
from rdm_jax.models.functional import Network
from rdm_jax.render import pictures
from rdm_jax.runtime import sharding
from rdm_jax.training.loop import Trainer

NUMBER = 255  # in the place of a stage's, for the random streams
COLUMNS = 8  # images in a preview


def kl_divergence(moments: Moments) -> Float[Array, "b h w c"]:
    """KL(N(mean, variance) || N(0, 1)) of each value."""
    mean, log_variance = moments
    return (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The objective of an autoencoder; see `step.Loss`.

    Attributes:
      settings: of the autoencoder.
      flip: mirror half of all images.
    """

    settings: Autoencoder
    flip: bool = False
    representation: Pixels = Pixels()

    @property
    def network(self) -> Network:
        """Its parameters; it is not applied as the network of a stage is."""
        parts = self.settings.network.build().parts
        return Network(parts.init, parts.merge, parts.abstract, parts.dtypes)

    def plain(self) -> "Reconstruction":
        """The same without mirrored images."""
        return dataclasses.replace(self, flip=False)

    def inputs(self, image_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """The images, uint8."""
        return {"image": jax.ShapeDtypeStruct(image_shape, self.representation.dtype)}

    def loss(
        self, params: dict, batch: dict[str, Array], keys: Key[Array, " b"], *, dropout: bool
    ) -> Float[Array, " b"]:
        """The error of each image's reconstruction from a random latent, plus the weighted KL."""
        images = self.representation.encode(batch["image"])
        images = mirror(images, keys) if self.flip else images
        model = self.settings.network.build()
        moments = model.encode(params, images)
        noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, moments.mean.shape[1:]))(noise_keys)
        error = model.decode(params, moments.sample(noise)) - images
        size = jnp.abs(error) if self.settings.error == "l1" else error**2
        axes = (1, 2, 3)
        return size.mean(axes) + self.settings.kl_weight * kl_divergence(moments).mean(axes)


@dataclasses.dataclass(frozen=True)
class Subject(Autoencoder):
    """An autoencoder as what `Trainer` trains.

    Attributes:
      resolution: of the images.
    """

    resolution: tuple[int, ...] = ()


class AutoencoderTrainer(Trainer):
    """The training of `config.autoencoder`; see `Trainer`."""

    def __init__(
        self,
        config: Config,
        source: ImageSet,
        directory: Path,
        held_out: ImageSet | None = None,
        allow_changes: Sequence[str] = (),
    ):
        super().__init__(config, NUMBER, source, directory, held_out, allow_changes)
        self._about["autoencoder"] = True  # "stage" is then no stage

    def _subject(self, config: Config, number: int, source: ImageSet) -> Subject:
        given = config.autoencoder
        fields = {each.name: getattr(given, each.name) for each in dataclasses.fields(given)}
        return Subject(**fields, resolution=source.image_shape[:2])

    def _objective(self) -> Reconstruction:
        return Reconstruction(self.stage, self.training.flip)


class ReconstructionProbe:
    """Draws images above their reconstructions; see `probe.Probe`.

    Args:
      network: the autoencoder.
      images: to reconstruct, evenly over the set.
    """

    evaluates = False

    def __init__(self, network: AutoencoderKL, images: ImageSet):
        self._network = network
        self._indices = np.linspace(0, len(images) - 1, COLUMNS).astype(int)
        self._images = images

    def preview(self, params: Any, path: Path) -> None:
        """Draws the reconstructions from the latents' means."""
        real = self._images.batch(self._indices)["image"]
        codec = Codec(self._network.build(), params, sharding.local_mesh())
        made = codec.decode(codec.encode(_encoded(real)).mean)
        both = np.concatenate([real, np.asarray(Pixels().decode(jnp.asarray(made)))])
        pictures.save_picture(pictures.plain_grid(both, columns=COLUMNS), path)

    def evaluate(self, params: Any, images_seen: int, folder: Path) -> dict[str, float]:
        """Nothing is evaluated."""
        return {}


def _encoded(images: np.ndarray) -> np.ndarray:
    return np.asarray(Pixels().encode(jnp.asarray(images)))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an autoencoder does to images.

    Attributes:
      network: with the scale and shift that give its latents mean 0 and standard deviation 1.
      psnr: of reconstructions from the latents' means, in dB, of values in [0, 255].
    """

    network: AutoencoderKL
    psnr: float


def measure(network: AutoencoderKL, params: Any, images: ImageSet, count: int) -> Measured:
    """Measures latents and reconstructions of `count` images, evenly over a set."""
    codec = Codec(network.build(), params, sharding.local_mesh())
    squared, latents = [], []
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    for first in range(0, len(indices), COLUMNS):
        chosen = np.resize(indices[first : first + COLUMNS], COLUMNS)  # one shape is compiled
        real = images.batch(chosen)["image"]
        z = codec.encode(_encoded(real)).mean
        error = np.asarray(Pixels().decode(jnp.asarray(codec.decode(z))), np.float64) - real
        size = len(indices[first : first + COLUMNS])
        squared.append((error**2).mean((1, 2, 3))[:size])
        latents.append(z[:size])
    z = np.concatenate(latents)
    scaled = dataclasses.replace(network, shift=float(z.mean()), scale=1 / float(z.std()))
    return Measured(scaled, float(10 * np.log10(255**2 / np.concatenate(squared).mean())))
