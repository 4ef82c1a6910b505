"""Invertible pairs sigma <-> t, and the ladders of noise levels that samplers walk. float32
throughout."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Clock:
    """The clock of the relay process (arXiv 2309.03350): t in [0, 1] sets the noise and the blur
    together.

    Attributes:
      length: L, the share of the log-normal distribution of noise levels that the clock runs
        through ("prob_length").
      blur_sigma_max: blur level at t = 1, in pixels.
      p_mean, p_std: mean and standard deviation of log sigma.
    """

    length: float = 0.93
    blur_sigma_max: float = 3.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise level at time t: exp(p_mean + p_std Phi^-1(t L))."""
        return jnp.exp(self.p_mean + self.p_std * ndtri(t * self.length))

    def time(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `sigma`."""
        return ndtr((jnp.log(sigma) - self.p_mean) / self.p_std) / self.length

    def blur_sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Blur level at time t, in pixels: blur_sigma_max sin^2(pi t / 2)."""
        return self.blur_sigma_max * jnp.sin(jnp.pi * t / 2) ** 2


@dataclasses.dataclass(frozen=True)
class Linear:
    """The schedule of DDPM and of the variance-preserving SDE: beta rises linearly (EDM, arXiv
    2206.00364, table 1, "VP").

    Attributes:
      beta_d, beta_min: slope and start of beta.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def sigma(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Noise level at time t: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return jnp.sqrt(jnp.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def time(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `sigma`, t = (sqrt(beta_min^2 + 2 beta_d l) - beta_min) / beta_d with l =
        log(1 + sigma^2).

        It is evaluated as 2 l / (sqrt(beta_min^2 + 2 beta_d l) + beta_min), where small levels
        cancel nothing.
        """
        log = jnp.log1p(sigma**2)
        return 2 * log / (jnp.sqrt(self.beta_min**2 + 2 * self.beta_d * log) + self.beta_min)


def iddpm_ladder(steps: int, *, c1: float, c2: float) -> np.ndarray:
    """The noise levels of iDDPM's cosine schedule, decreasing, u_0 .. u_steps = 0, float64 (EDM,
    table 1, "iDDPM").

    u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1} / a_j, c1) - 1), a_j = sin^2(pi j / (2 steps (c2 + 1)))
    """
    a = np.sin(np.pi / 2 * np.arange(steps + 1) / (steps * (c2 + 1))) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(a[j - 1] / a[j], c1) - 1)
    return u


def edm_ladder(
    steps: int, *, sigma_min: float, sigma_max: float, rho: float
) -> Float[Array, " steps"]:
    """Decreasing noise levels (EDM, arXiv 2206.00364, equation 5), the final zero left out.

    sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    It is evaluated as sigma_max exp(rho log1p(r_i expm1(log(sigma_min / sigma_max) / rho))), r_i =
    i / (steps - 1): the same number, which keeps float32's full precision even at the published rho
    of 100.
    """
    if steps < 2:
        raise ValueError(f"a ladder needs at least 2 steps, not {steps}")
    ramp = jnp.linspace(0.0, 1.0, steps)
    fall = jnp.asarray(math.expm1(math.log(sigma_min / sigma_max) / rho), ramp.dtype)
    return sigma_max * jnp.exp(rho * jnp.log1p(ramp * fall))


def truncate(ladder: Float[Array, " n"], below: float) -> Float[Array, " m"]:
    """The levels under `below`: where a relay joins the ladder. The ladder must be concrete
    (outside of `jit`)."""
    return ladder[np.asarray(ladder) < below]
