"""Preconditioning, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): from a network F to a denoiser D."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Denoiser = Callable[[Array, Array], Array]  # (x (b, h, w, c), sigma () or (b,)) -> the denoised images (b, h, w, c)


class Coefficients(NamedTuple):
    """The four coefficients at each image's noise level."""

    c_skip: Float[Array, " b"]
    c_out: Float[Array, " b"]
    c_in: Float[Array, " b"]
    c_noise: Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class EDM:
    """EDM's preconditioning (arXiv 2206.00364, table 1): inputs and targets of unit variance at every level.

    Attributes:
      sigma_data: standard deviation that the data is assumed to have.
      noise_scale: c_noise = noise_scale ln(sigma); 1/4 is the published value, larger tells a small network more of the level.
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


def denoiser(network: Callable[[Array, Array], Array], precondition: Callable[[Array], Coefficients]) -> Denoiser:
    """D from F; `network(x, c_noise)` is F with everything else (parameters, labels) bound. D computes in x's dtype."""

    def denoise(x: Float[Array, "b h w c"], sigma: Float[Array, "*b"]) -> Float[Array, "b h w c"]:
        c = precondition(jnp.broadcast_to(sigma, x.shape[:1]).astype(x.dtype))
        expand = lambda a: a[:, None, None, None]  # noqa: E731
        residual = network(expand(c.c_in) * x, c.c_noise).astype(x.dtype)
        return expand(c.c_skip) * x + expand(c.c_out) * residual

    return denoise
