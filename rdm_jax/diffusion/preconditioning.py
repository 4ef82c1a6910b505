"""Preconditioning, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): from a network F to a
denoiser D."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdm_jax.diffusion import schedules

Denoiser = Callable[
    [Array, Array], Array
]  # (x (b, h, w, c), sigma () or (b,)) -> the denoised images (b, h, w, c)


class Coefficients(NamedTuple):
    """The four coefficients at each image's noise level."""

    c_skip: Float[Array, " b"]
    c_out: Float[Array, " b"]
    c_in: Float[Array, " b"]
    c_noise: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """What all kinds have; calling one gives the coefficients at noise levels sigma (b,).

    Attributes:
      outputs: the network's output has so many times the channels of an image; only the first of
        them are used.
    """

    outputs: ClassVar[int] = 1

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        raise NotImplementedError

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest noise level that the network knows."""
        return 0.0, math.inf

    def round(self, sigma: Float[Array, " n"]) -> Float[Array, " n"]:
        """Each noise level's nearest one of those that the network knows."""
        return sigma


@dataclasses.dataclass(frozen=True)
class EDM(Preconditioning):
    """EDM's preconditioning (arXiv 2206.00364, table 1): inputs and targets of unit variance at
    every level.

    Attributes:
      sigma_data: standard deviation that the data is assumed to have.
      noise_scale: c_noise = noise_scale ln(sigma); 1/4 is the published value, larger tells a small
        network more of the level.
    """

    sigma_data: float = 0.5
    noise_scale: float = 0.25

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
class VP(Preconditioning):
    """The preconditioning of networks that were trained on the variance-preserving SDE (EDM, table
    1).

    Attributes:
      schedule: from noise level to time.
      times: M; the network is told (M - 1) t.
      epsilon: smallest time that it was trained at.
    """

    schedule: schedules.Linear = schedules.Linear()
    times: int = 1000
    epsilon: float = 1e-5

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        time = (self.times - 1) * self.schedule.time(sigma)
        return Coefficients(jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), time)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest noise level that the network knows."""
        return tuple(self.schedule.sigma(jnp.asarray([self.epsilon, 1.0])).tolist())


@dataclasses.dataclass(frozen=True)
class VE(Preconditioning):
    """The preconditioning of networks that were trained on the variance-exploding SDE (EDM, table
    1).

    Attributes:
      sigma_min, sigma_max: the least and the greatest noise level that the network knows.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        one = jnp.ones_like(sigma)
        return Coefficients(one, sigma, one, jnp.log(sigma / 2))

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest noise level that the network knows."""
        return self.sigma_min, self.sigma_max


@dataclasses.dataclass(frozen=True)
class IDDPM(Preconditioning):
    """The preconditioning of iDDPM's and ADM's own networks (EDM, table 1).

    They know a finite number of levels, and are told the nearest; they also return a variance,
    which is not used.

    Attributes:
      c1, c2: constants of the cosine schedule.
      times: M, its number of levels.
    """

    c1: float = 0.001
    c2: float = 0.008
    times: int = 1000
    outputs: ClassVar[int] = 2

    def __call__(self, sigma: Float[Array, " b"]) -> Coefficients:
        """The coefficients at noise levels `sigma`."""
        time = (self.times - 1 - self._nearest(sigma)).astype(sigma.dtype)
        return Coefficients(jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), time)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest noise level that the network knows."""
        return float(self.levels()[-2]), float(self.levels()[0])

    def round(self, sigma: Float[Array, " n"]) -> Float[Array, " n"]:
        """Each noise level\'s nearest one of those that the network knows."""
        return jnp.asarray(self.levels(), sigma.dtype)[self._nearest(sigma)]

    def _nearest(self, sigma: Float[Array, " b"]) -> Int[Array, " b"]:
        return jnp.argmin(jnp.abs(sigma[:, None] - jnp.asarray(self.levels(), sigma.dtype)), axis=1)

    def levels(self) -> Float[np.ndarray, " n"]:
        """The noise levels that the network knows, decreasing, and 0."""
        return schedules.iddpm_ladder(self.times, c1=self.c1, c2=self.c2)


def denoiser(
    network: Callable[[Array, Array], Array], precondition: Callable[[Array], Coefficients]
) -> Denoiser:
    """D from F; `network(x, c_noise)` is F with everything else (parameters, labels) bound. D
    computes in x's dtype."""

    def denoise(x: Float[Array, "b h w c"], sigma: Float[Array, "*b"]) -> Float[Array, "b h w c"]:
        c = precondition(jnp.broadcast_to(sigma, x.shape[:1]).astype(x.dtype))
        expand = lambda a: a[:, None, None, None]  # noqa: E731
        residual = network(expand(c.c_in) * x, c.c_noise)[..., : x.shape[-1]].astype(x.dtype)
        return expand(c.c_skip) * x + expand(c.c_out) * residual

    return denoise
