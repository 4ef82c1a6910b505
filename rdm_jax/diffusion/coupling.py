"""Data-dependent coupling: a straight path from the enlarged, noised small image to the large one.

Stochastic interpolants with data-dependent couplings (arXiv 2310.03725), with a = 1 - t and b = t:

    z = t x + (1 - t) (E(M x) + s0 e),    dz / dt = x - E(M x) - s0 e = (x - z) / (1 - t)

E enlarges by nearest neighbour and M takes the means of p x p cells. The network also gets E(M x)
in further channels. Samplers and preconditionings see z as they see the linear path: z / t is x
with noise of level sigma = s0 (1 - t) / t, and with (1 - t) / t E(M x) besides.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.linear_path import LinearHeun
from rdm_jax.diffusion.processes import FromNoise
from rdm_jax.diffusion.protocols import Levels, Noise, Noised, Process
from rdm_jax.runtime.fields import at_least, inside

# Training draws times above it and sampling begins there, as z / t has no value at 0. Sampling
# begins without the share of it that the path already has of the image's detail.
FIRST_TIME = 1e-3


@dataclasses.dataclass(frozen=True)
class CouplingProcess(FromNoise):
    """The coupling's process; times are uniform, and the loss is that of velocities.

    Attributes:
      path: from times to noise levels; its `noise_scale` is s0, the noise of the enlarged image.
      patch: p, factor by which this stage enlarges.
      t_eps: bound of 1 - t in the velocities' weight.
    """

    path: schedules.Path = schedules.Path(noise_scale=0.5)
    patch: int = at_least(2, default=4)
    t_eps: float = inside(0, 1, default=0.05)

    @property
    def enlarges(self) -> int:
        """`patch`."""
        return self.patch

    def conditioning_channels(self, channels: int) -> int:
        """The small image's channels."""
        return channels

    def conditioning(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """E(M x), the enlarged small images."""
        return self._flat(x)

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The noise level of a time that is uniform in [FIRST_TIME, 1)."""
        return self.path.sigma(FIRST_TIME + (1 - FIRST_TIME) * level)

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """That of velocities."""
        return self.path.velocity_weight(sigma, self.t_eps)

    def noised_at(
        self, x: Float[Array, "b h w c"], sigma: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """z / t at each image's noise level."""
        noised = super().noised_at(x, sigma, noise)
        share = (sigma / self.path.noise_scale)[:, None, None, None]  # (1 - t) / t
        return noised._replace(images=noised.images + share * self._flat(x))

    def _flat(self, x: Array) -> Array:
        return blurring.enlarge(blurring.mean_pool(x, factor=self.patch), factor=self.patch)


@dataclasses.dataclass(frozen=True)
class CouplingHeun(LinearHeun):
    """The coupling's ODE, in equal steps of time from the enlarged small image with noise."""

    def walks(self, process: Process) -> bool:
        """The coupling."""
        return isinstance(process, CouplingProcess)

    def levels(self, process: Any) -> Levels:
        """The beginnings of the N steps."""
        time = jnp.linspace(0.0, 1.0, self.steps + 1)[:-1].at[0].set(FIRST_TIME)
        return Levels(process.path.sigma(time), time=time)

    def conditioning(
        self, process: Any, low: Float[Array, "b h w c"] | None, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The enlarged small images."""
        assert low is not None
        return blurring.enlarge(low, factor=process.patch)

    def handover(self, process: Any) -> str:
        """The noise of the enlarged image."""
        return (
            f"starts from the enlarged small image with noise of sigma "
            f"{process.path.noise_scale:g}, and is conditioned on that image"
        )

    def start(
        self, low: Float[Array, "b h w c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first time: the enlarged small image with noise."""
        assert low is not None
        pure = super().start(None, level, noise)
        return blurring.enlarge(low, factor=pure.shape[1] // low.shape[1]) + pure
