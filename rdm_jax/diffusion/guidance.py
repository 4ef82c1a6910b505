"""Guidance: denoiser in, denoiser out. No sampler knows of it."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.diffusion.preconditioning import Denoiser

Conditional = Callable[
    [Array, Array, Array], Array
]  # (x, sigma, labels (b, classes)) -> denoised images


def classifier_free(
    conditional: Conditional, labels: Float[Array, "b classes"], weight: float
) -> Denoiser:
    """D = w D(x | c) - (w - 1) D(x | null) (arXiv 2207.12598), both passes as one call on a batch
    of 2 b.

    The two of an image are neighbours in that batch, so that they are on the device where the image
    is, and nothing has to move. `weight` 1 is plain conditional denoising at the cost of one pass.
    The null label is the all-zero vector.
    """
    if weight == 1:
        return lambda x, sigma: conditional(x, sigma, labels)
    both = jnp.stack([labels, jnp.zeros_like(labels)], axis=1).reshape(-1, labels.shape[1])

    def denoise(x: Float[Array, "b h w c"], sigma: Float[Array, "*b"]) -> Float[Array, "b h w c"]:
        twice_sigma = jnp.repeat(jnp.broadcast_to(sigma, x.shape[:1]), 2)
        passes = conditional(jnp.repeat(x, 2, axis=0), twice_sigma, both).reshape(
            len(x), 2, *x.shape[1:]
        )
        return weight * passes[:, 0] - (weight - 1) * passes[:, 1]

    return denoise
