"""The representation of images as normalised latents of an autoencoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Key

# Folded into an image's key for its posterior's noise; the loss splits the same key into 0 to 3.
POSTERIOR = 4


@dataclasses.dataclass(frozen=True)
class Latents:
    """Records hold means and log-variances of latents; networks see normalised latents.

    A channel is normalised by its mean and standard deviation over the data set (EDM2, arXiv
    2312.02696), not by the one scale of latent diffusion (arXiv 2112.10752).

    Attributes:
      mean, deviation: of each channel.
      sampled: training draws from the posterior; False for its mean.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    sampled: bool = True

    @property
    def dtype(self) -> np.dtype:
        """Of records."""
        return np.dtype(np.float16)

    def encode(
        self, records: Float16[Array, "b h w k"], pool: int = 1
    ) -> Float[Array, "b h2 w2 c"]:
        """The normalised means of posteriors: means of pool x pool of them, float32."""
        return self._normalised(self._moments(records)[0], pool)

    def draw(
        self, records: Float16[Array, "b h w k"], pool: int, keys: Key[Array, " b"]
    ) -> Float[Array, "b h2 w2 c"]:
        """What training sees: as `encode`, of a draw from each posterior if it is `sampled`.

        Args:
          records: means, then log-variances, along the last axis.
          pool: the network sees the means of pool x pool latents.
          keys: one per image, on which alone its draw depends.
        """
        mean, log_variance = self._moments(records)
        if not self.sampled:
            return self._normalised(mean, pool)

        def noise(key: Key[Array, ""]) -> Array:
            return jax.random.normal(jax.random.fold_in(key, POSTERIOR), mean.shape[1:])

        return self._normalised(mean + jnp.exp(log_variance / 2) * jax.vmap(noise)(keys), pool)

    def decode(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """From normalised latents to those that the autoencoder decodes."""
        return x * jnp.asarray(self.deviation) + jnp.asarray(self.mean)

    def clip(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Latents have no bounds: they stay as they are."""
        return x

    def _moments(self, records: Array) -> tuple[Array, Array]:
        mean, log_variance = jnp.split(records.astype(jnp.float32), 2, axis=-1)
        return mean, log_variance

    def _normalised(self, z: Array, pool: int) -> Array:
        z = (z - jnp.asarray(self.mean)) / jnp.asarray(self.deviation)
        b, h, w, c = z.shape
        return z.reshape(b, h // pool, pool, w // pool, pool, c).mean((2, 4))
