"""Preconditioning: from a network F to a denoiser D = c_skip x + c_out F(c_in x, c_noise)."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdm_jax.diffusion import schedules
from rdm_jax.diffusion.protocols import Denoiser
from rdm_jax.runtime.fields import at_least, below, positive


class Coefficients(NamedTuple):
    """The four coefficients at each image's noise level."""

    c_skip: Float[Array, " b"]
    c_out: Float[Array, " b"]
    c_in: Float[Array, " b"]
    c_noise: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """Base of all kinds. A call returns the coefficients at noise levels sigma (b,).

    Attributes:
      outputs: number of images that the network returns, along the channels; the first is used.
      data_std: standard deviation that the data is assumed to have; None if none is assumed.
    """

    outputs: ClassVar[int] = 1

    @property
    def data_std(self) -> float | None:
        """None: no assumption."""
        return None

    def check(self, path: str) -> None:
        """Checks what concerns several fields; `path` names the part. Raises InputError."""

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        raise NotImplementedError

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the network knows."""
        return 0.0, math.inf

    def round(self, sigma: Float[Array, " n"]) -> Float[Array, " n"]:
        """The nearest of the levels that the network knows, for each noise level."""
        return sigma


@dataclasses.dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """EDM's (arXiv 2206.00364, table 1): inputs and targets of unit variance at every level.

    Attributes:
      sigma_data: standard deviation that the data is assumed to have.
      noise_scale: c_noise = noise_scale ln(sigma). 1/4 is the published value; a larger one spreads
        the levels further apart, which helps small networks.
    """

    sigma_data: float = positive(default=0.5)
    noise_scale: float = positive(default=0.25)

    @property
    def data_std(self) -> float:
        """`sigma_data`."""
        return self.sigma_data

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data / jnp.sqrt(total),
            c_in=1 / jnp.sqrt(total),
            c_noise=self.noise_scale * jnp.log(sigma),
        )


@dataclasses.dataclass(frozen=True)
class VPPreconditioning(Preconditioning):
    """For networks trained on the variance-preserving SDE (EDM, table 1).

    Attributes:
      schedule: maps noise levels to times t.
      times: M; c_noise = (M - 1) t.
      epsilon: smallest time of the training.
    """

    schedule: schedules.Linear = schedules.Linear()
    times: int = at_least(2, default=1000)
    epsilon: float = below(1, least=1e-6, default=1e-5)  # float32 has no smaller step below 1

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        time = (self.times - 1) * self.schedule.time(sigma)
        return Coefficients(jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), time)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the network knows."""
        return tuple(self.schedule.sigma(jnp.asarray([self.epsilon, 1.0])).tolist())


@dataclasses.dataclass(frozen=True)
class VEPreconditioning(Preconditioning):
    """For networks trained on the variance-exploding SDE (EDM, table 1).

    Attributes:
      sigma_min, sigma_max: the smallest and the largest noise level that the network knows.
    """

    sigma_min: float = positive(default=0.02)
    sigma_max: float = positive(default=100.0)

    def check(self, path: str) -> None:
        """The levels must not be empty. Raises InputError."""
        schedules.check_range(self.sigma_min, self.sigma_max, path)

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        one = jnp.ones_like(sigma)
        return Coefficients(one, sigma, one, jnp.log(sigma / 2))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the network knows."""
        return self.sigma_min, self.sigma_max


@dataclasses.dataclass(frozen=True)
class IDDPMPreconditioning(Preconditioning):
    """For iDDPM's and ADM's own networks (EDM, table 1).

    They know a finite number of levels; other levels are rounded to the nearest. They also return
    a variance, which is not used.

    Attributes:
      c1, c2: constants of the cosine schedule.
      times: M, the number of levels.
    """

    c1: float = positive(default=0.001)
    c2: float = positive(default=0.008)
    times: int = at_least(2, default=1000)
    outputs: ClassVar[int] = 2

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        time = (self.times - 1 - self._nearest(sigma)).astype(sigma.dtype)
        return Coefficients(jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), time)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the network knows."""
        return float(self.levels()[-2]), float(self.levels()[0])

    def round(self, sigma: Float[Array, " n"]) -> Float[Array, " n"]:
        """The nearest of the levels that the network knows, for each noise level."""
        return jnp.asarray(self.levels(), sigma.dtype)[self._nearest(sigma)]

    def _nearest(self, sigma: Float[Array, " b"]) -> Int[Array, " b"]:
        return jnp.argmin(jnp.abs(sigma[:, None] - jnp.asarray(self.levels(), sigma.dtype)), axis=1)

    def levels(self) -> Float[np.ndarray, " n"]:
        """The M noise levels that the network knows, decreasing, and 0; float64."""
        return schedules.iddpm_levels(self.times, c1=self.c1, c2=self.c2)


@dataclasses.dataclass(frozen=True)
class XPreconditioning(Preconditioning):
    """The network predicts the image itself, from z = t x + (1 - t) s e (arXiv 2511.13720).

    c_noise is the time t in (0, 1], 1 for clean images.

    Attributes:
      path: from noise levels to times.
    """

    path: schedules.Path = schedules.Path()

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        time = self.path.time(sigma)
        return Coefficients(jnp.zeros_like(sigma), jnp.ones_like(sigma), time, time)


def denoiser(
    network: Callable[[Array, Array], Array], precondition: Callable[[Array], Coefficients]
) -> Denoiser:
    """D from F, in x's dtype.

    Args:
      network: (x, c_noise) -> F, with parameters and condition bound.
      precondition: noise levels (b,) -> coefficients.
    """

    def denoise(x: Float[Array, "b h w c"], sigma: Float[Array, "*b"]) -> Float[Array, "b h w c"]:
        c = precondition(jnp.broadcast_to(sigma, x.shape[:1]).astype(x.dtype))
        c_skip, c_out, c_in = (a[:, None, None, None] for a in (c.c_skip, c.c_out, c.c_in))
        residual = network(c_in * x, c.c_noise)[..., : x.shape[-1]].astype(x.dtype)
        return c_skip * x + c_out * residual

    return denoise
