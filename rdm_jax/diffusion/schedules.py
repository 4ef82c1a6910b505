"""Invertible pairs sigma <-> t, and the ladders of noise levels that samplers walk. float32 throughout."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Clock:
    """The clock of the relay process (arXiv 2309.03350): t in [0, 1] sets the noise and the blur together.

    Attributes:
      length: L, the share of the log-normal distribution of noise levels that the clock runs through ("prob_length").
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


def edm_ladder(steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> Float[Array, " steps"]:
    """Decreasing noise levels (EDM, arXiv 2206.00364, equation 5), the final zero left out.

    sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    It is evaluated as sigma_max exp(rho log1p(r_i expm1(log(sigma_min / sigma_max) / rho))), r_i = i / (steps - 1): the same
    number, which keeps float32's full precision even at the published rho of 100.
    """
    if steps < 2:
        raise ValueError(f"a ladder needs at least 2 steps, not {steps}")
    ramp = jnp.linspace(0.0, 1.0, steps)
    fall = jnp.asarray(math.expm1(math.log(sigma_min / sigma_max) / rho), ramp.dtype)
    return sigma_max * jnp.exp(rho * jnp.log1p(ramp * fall))


def truncate(ladder: Float[Array, " n"], below: float) -> Float[Array, " m"]:
    """The levels under `below`: where a relay joins the ladder. The ladder must be concrete (outside of `jit`)."""
    return ladder[np.asarray(ladder) < below]
