"""The forward processes: clean images in, noised images with their level and loss weight out.

A process draws its randomness for one image from that image's key (`draw_level`, `draw_noise`) and
is otherwise deterministic (`noised`), so a test can hand it any draws, and an image's noise does
not depend on its batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Key

from rdm_jax.diffusion import blurring, schedules


class Noised(NamedTuple):
    """What a denoiser is trained on: its input, noise level, the weight of its squared error, and
    what it is given besides."""

    images: Float[Array, "b h w c"]
    sigma: Float[Array, " b"]
    weight: Float[Array, " b"]
    given: Float[Array, "b h w k"] | None = None


def edm_weight(sigma: Float[Array, "*b"], sigma_data: float) -> Float[Array, "*b"]:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM's weight (arXiv 2206.00364, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@dataclasses.dataclass(frozen=True)
class FromNoise:
    """What all processes that end in pure white noise share: x + sigma noise. They differ in
    `sigma` and `weight`."""

    def draw_level(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """The draw that `sigma` turns into a noise level: U(0, 1)."""
        return jax.random.uniform(key)

    def draw_noise(self, key: Key[Array, ""], shape: tuple[int, int, int]) -> Float[Array, "h w c"]:
        """Unit noise of one image."""
        return jax.random.normal(key, shape)

    def noised(
        self, x: Float[Array, "b h w c"], level: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """Noises each image at its level."""
        return self.noised_at(x, self.sigma(level), noise)

    def noised_at(
        self, x: Float[Array, "b h w c"], sigma: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """Noises each image at its noise level."""
        return Noised(x + sigma[:, None, None, None] * noise, sigma, self.weight(sigma))


@dataclasses.dataclass(frozen=True)
class Gaussian(FromNoise):
    """EDM's process: log sigma ~ N(p_mean, p_std^2) (arXiv 2206.00364, table 1)."""

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5

    def draw_level(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """The draw that `sigma` turns into a noise level: N(0, 1)."""
        return jax.random.normal(key)

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """exp(p_mean + p_std level)."""
        return jnp.exp(self.p_mean + self.p_std * level)

    def weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """EDM's."""
        return edm_weight(sigma, self.sigma_data)


@dataclasses.dataclass(frozen=True)
class Cascade(Gaussian):
    """A classic cascade's (CDM, arXiv 2106.15282): EDM's process, for a network that is given the
    small image, enlarged.

    The small image is noised by itself, in training at a level that is uniform in [0, augment_max]
    (Gaussian conditioning augmentation), and the network is told that level.

    Attributes:
      patch: the factor by which this stage enlarges.
      augment_max: the greatest noise level of the small image.
    """

    patch: int = 4
    augment_max: float = 0.5

    def given(
        self,
        low: Float[Array, "b h w c"],
        level: Float[Array, " b"],
        noise: Float[Array, "b h w c"],
    ) -> Float[Array, "b h2 w2 k"]:
        """What the network is given of small images: them, noised and enlarged, and the level of
        their noise in one channel."""
        level = jnp.broadcast_to(level[:, None, None, None], (*low.shape[:3], 1))
        return blurring.enlarge(
            jnp.concatenate([low + level * noise, level], -1), factor=self.patch
        )

    def given_in_training(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w k"]:
        """The same of the means of large images, each at a random level from its own key."""
        low = blurring.mean_pool(x, factor=self.patch)
        level_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        level = self.augment_max * jax.vmap(jax.random.uniform)(level_keys)
        return self.given(
            low, level, jax.vmap(lambda key: jax.random.normal(key, low.shape[1:]))(noise_keys)
        )


@dataclasses.dataclass(frozen=True)
class VP(FromNoise):
    """Training on the variance-preserving SDE, in EDM's terms (arXiv 2206.00364, table 1): times
    uniform in (epsilon, 1]."""

    schedule: schedules.Linear = schedules.Linear()
    epsilon: float = 1e-5

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The noise level of the time 1 - (1 - epsilon) level."""
        t = 1 + level * (self.epsilon - 1)
        # Not `schedule.sigma`, which is exact: the published implementation rounds 1 + sigma^2 to
        # float32, and at small times, where the loss's weight is largest, this rounding is seen in
        # its numbers.
        return jnp.sqrt(jnp.exp(self.schedule.beta_d * t**2 / 2 + self.schedule.beta_min * t) - 1)

    def weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """1 / sigma^2."""
        return 1 / sigma**2


@dataclasses.dataclass(frozen=True)
class VE(FromNoise):
    """Training on the variance-exploding SDE, in EDM's terms (arXiv 2206.00364, table 1): log sigma
    uniform in a range."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """sigma_min (sigma_max / sigma_min)^level."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** level

    def weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """1 / sigma^2."""
        return 1 / sigma**2


@dataclasses.dataclass(frozen=True)
class Relay:
    """Stage 2's process: patch-wise blur under block noise (arXiv 2309.03350).

    q(x_t | x_0) = N(V D_t V^T x_0, sigma_t^2 Cov(noise)) in every patch, noise = e + a
    Block[s](e').

    Attributes:
      patch: p, the factor by which this stage enlarges, also the size of its blur's patches.
      clock: what t in [0, 1] means.
      block_scale: a, strength of the block noise; 0 for white noise alone.
      block_size: s; 0 for s = p.
      normalize_noise: divide the noise by sqrt(1 + a^2), as the paper writes and the released code
        does not.
      min_scale: floor of the blur's weights.
      sigma_floor: the clock's draw is clipped from below near the time of this noise level.
      exact_floor: clip exactly there; the released code multiplies the bound by the clock's length
        once more.
      sigma_data, max_weight: EDM's weight of the loss, and its cap.
    """

    patch: int = 4
    clock: schedules.Clock = schedules.Clock()
    block_scale: float = 0.15
    block_size: int = 0
    normalize_noise: bool = False
    min_scale: float = 1e-3
    sigma_floor: float = 0.0075
    exact_floor: bool = False
    sigma_data: float = 0.5
    max_weight: float = 1e5

    def draw_level(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """The draw that `noised` turns into a time: U(0, 1)."""
        return jax.random.uniform(key)

    def draw_noise(self, key: Key[Array, ""], shape: tuple[int, int, int]) -> Float[Array, "h w c"]:
        """The mixture of white and block noise of one image."""
        white_key, block_key = jax.random.split(key)
        white = jax.random.normal(white_key, shape)
        return self.mixture(
            white, jax.random.normal(block_key, shape) if self.block_scale else None
        )

    def mixture(
        self, white: Float[Array, "*b h w c"], block_white: Float[Array, "*b h w c"] | None
    ) -> Float[Array, "*b h w c"]:
        """e + a Block[s](e') from two white arrays (the second may be None where a = 0)."""
        if not self.block_scale:
            return white
        mixed = white + self.block_scale * blurring.block_noise(
            block_white, block=self.block_size or self.patch
        )
        return mixed / (1 + self.block_scale**2) ** 0.5 if self.normalize_noise else mixed

    def time(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The clock's time of a draw from U(0, 1), clipped from below."""
        bound = ndtr(
            (jnp.log(jnp.asarray(self.sigma_floor, level.dtype)) - self.clock.p_mean)
            / self.clock.p_std
        )
        bound = bound / self.clock.length if self.exact_floor else bound * self.clock.length
        return jnp.maximum(level, bound)

    def blur_weights(self, t: Float[Array, " b"]) -> Float[Array, "b p p"]:
        """D_t, what is left of each DCT coefficient at time t."""
        return blurring.blur_weights(
            self.clock.blur_sigma(t), patch=self.patch, min_scale=self.min_scale
        )

    def noised(
        self, x: Float[Array, "b h w c"], level: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """Blurs and noises each image at the time of its `level`."""
        t = self.time(level)
        sigma = self.clock.sigma(t)
        blurred = blurring.blur(
            x, self.clock.blur_sigma(t), patch=self.patch, min_scale=self.min_scale
        )
        weight = jnp.minimum(edm_weight(sigma, self.sigma_data), self.max_weight)
        return Noised(blurred + sigma[:, None, None, None] * noise, sigma, weight)


def diffuse(
    process: FromNoise | Relay, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
) -> Noised:
    """Noises each image at a random level, both from its own key."""
    level_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    level = jax.vmap(process.draw_level)(level_keys)
    noise = jax.vmap(lambda key: process.draw_noise(key, x.shape[1:]))(noise_keys)
    noised = process.noised(x, level, noise)
    if isinstance(process, Cascade):
        own_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(
            keys
        )  # 0 and 1 would be the two that `split` has made
        return noised._replace(given=process.given_in_training(x, own_keys))
    return noised
