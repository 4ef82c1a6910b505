"""A published autoencoder between pixels and latents."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.interop import autoencoder_files
from rdm_jax.models.codec import Codec
from rdm_jax.runtime import sharding


class PixelCodec:
    """Encodes uint8 images as moments for `data.latents.add_latents`, and decodes latents.

    Args:
      folder: of the autoencoder; see `autoencoder_files.load`, whose errors are raised.
      dtype: 'float32' or 'bfloat16', of its computation.

    Attributes:
      config: the autoencoder's sizes.
      digest: SHA-256 of its weights.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        published = autoencoder_files.load(folder, dtype)
        self.config, self.digest = published.config, published.digest
        self._codec = Codec(self.config.build(), published.params, sharding.local_mesh())

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raises InputError for images (h, w, c) that the autoencoder does not take."""
        self.config.check_images(*image_shape, "the prepared data")

    def __call__(self, images: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b h2 w2 k"]:
        """Means, then log-variances of the latents, along the last axis; float32."""
        encoded = self._codec.encode(np.asarray(Pixels().encode(jnp.asarray(images))))
        return np.concatenate(encoded, -1)

    def decoded(self, latents: Float[Array, "b h w c"]) -> UInt8[Array, "b h2 w2 c2"]:
        """As `decode`, of whole images on the devices; they divide the batch."""
        return Pixels().decode(self._codec.decoded(latents))

    def decode(self, latents: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h2 w2 c2"]:
        """The images of latents, which are not normalised (`Latents.decode`)."""
        return np.asarray(Pixels().decode(jnp.asarray(self._codec.decode(latents))))
