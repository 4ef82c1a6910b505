"""Noise schedules: invertible pairs sigma <-> t, and the levels that samplers use. All float32."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import below, inside, positive


@dataclasses.dataclass(frozen=True)
class Clock:
    """RDM's time t in [0, 1] -> (noise level sigma, blur) (arXiv 2309.03350).

    Attributes:
      length: L, the share of the log-normal distribution of noise levels that t covers
        ("prob_length").
      blur_sigma_max: blur level at t = 1, in pixels.
      p_mean, p_std: mean and standard deviation of log sigma.
      blur_from: time below which nothing is blurred; 0 as published. Above it, a stage can hand
        over its state to a jump (`jump.JumpHeun`).
    """

    length: float = inside(0, 1, default=0.93)
    blur_sigma_max: float = 3.0
    p_mean: float = -1.2
    p_std: float = positive(default=1.2)
    blur_from: float = below(1, default=0.0)

    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise level at time t: exp(p_mean + p_std Phi^-1(t L))."""
        return jnp.exp(self.p_mean + self.p_std * ndtri(t * self.length))

    def time(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `sigma`."""
        return ndtr((jnp.log(sigma) - self.p_mean) / self.p_std) / self.length

    def blur_sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Blur level at time t, in pixels: blur_sigma_max sin^2(pi t / 2).

        With `blur_from` b the share max(t - b, 0) / (1 - b) of the time after it replaces t.
        """
        if self.blur_from:
            t = jnp.maximum(t - self.blur_from, 0) / (1 - self.blur_from)
        return self.blur_sigma_max * jnp.sin(jnp.pi * t / 2) ** 2


@dataclasses.dataclass(frozen=True)
class Linear:
    """DDPM's and the variance-preserving SDE's: linear beta (EDM, arXiv 2206.00364, table 1, "VP").

    Attributes:
      beta_d, beta_min: slope and start of beta.
    """

    beta_d: float = positive(default=19.9)
    beta_min: float = positive(default=0.1)

    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise level at time t: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return jnp.sqrt(jnp.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def time(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `sigma`.

        t = (sqrt(beta_min^2 + 2 beta_d l) - beta_min) / beta_d with l = log(1 + sigma^2), evaluated
        as 2 l / (sqrt(beta_min^2 + 2 beta_d l) + beta_min), without cancellation at small levels.
        """
        log = jnp.log1p(sigma**2)
        return 2 * log / (jnp.sqrt(self.beta_min**2 + 2 * self.beta_d * log) + self.beta_min)


@dataclasses.dataclass(frozen=True)
class Path:
    """The linear path z = t x + (1 - t) s e from noise at t = 0 to images at t = 1.

    z / t is x with noise of level sigma = s (1 - t) / t (arXiv 2511.13720; flow matching, arXiv
    2210.02747).

    Attributes:
      noise_scale: s, standard deviation of the noise at t = 0.
    """

    noise_scale: float = positive(default=1.0)

    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise level at time t > 0."""
        return self.noise_scale * (1 - t) / t

    def time(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `sigma`."""
        return self.noise_scale / (self.noise_scale + sigma)

    def velocity_weight(self, sigma: Float[Array, "*b"], t_eps: float) -> Float[Array, "*b"]:
        """The weight that makes the squared error of x that of the velocity dz / dt.

        1 / max(1 - t, t_eps)^2, from v = (x - z) / max(1 - t, t_eps).
        """
        return 1 / jnp.maximum(sigma / (self.noise_scale + sigma), t_eps) ** 2


def check_range(sigma_min: float, sigma_max: float, path: str) -> None:
    """Refuses an empty range of noise levels. Raises InputError; `path` names its owner."""
    if sigma_max <= sigma_min:
        raise InputError(
            f"{path}.sigma_max={sigma_max} is not above sigma_min={sigma_min}",
            f"Use more than {sigma_min}.",
        )


def iddpm_levels(steps: int, *, c1: float, c2: float) -> np.ndarray:
    """Noise levels of iDDPM's cosine schedule, u_0 > ... > u_steps = 0, float64 (EDM, table 1).

    u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1} / a_j, c1) - 1), a_j = sin^2(pi j / (2 steps (c2 + 1)))
    """
    a = np.sin(np.pi / 2 * np.arange(steps + 1) / (steps * (c2 + 1))) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(a[j - 1] / a[j], c1) - 1)
    return u


def edm_levels(
    steps: int, *, sigma_min: float, sigma_max: float, rho: float
) -> Float[Array, " steps"]:
    """Decreasing noise levels (EDM, arXiv 2206.00364, equation 5), without the final zero.

    sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    It is evaluated as sigma_max exp(rho log1p(r_i expm1(log(sigma_min / sigma_max) / rho))) with
    r_i = i / (steps - 1), which keeps float32's full precision even at the published rho of 100.

    Raises:
      ValueError: fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"a noise schedule needs at least 2 steps, not {steps}")
    ramp = jnp.linspace(0.0, 1.0, steps)
    fall = jnp.asarray(math.expm1(math.log(sigma_min / sigma_max) / rho), ramp.dtype)
    return sigma_max * jnp.exp(rho * jnp.log1p(ramp * fall))


def truncate(sigma: Float[Array, " n"], below: float) -> Float[Array, " m"]:
    """The levels below `below`, at which a relay joins the schedule; `sigma` must be concrete."""
    return sigma[np.asarray(sigma) < below]
