"""The forward processes: clean images in, noised images with their level and loss weight out.

A process draws its randomness for one image from that image's key (`draw_level`, `draw_noise`) and
is otherwise deterministic (`noised`). An image's noise thus does not depend on its batch, and tests
can pass any draws. `protocols.Process` is the interface.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Key

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.protocols import Noised, Process
from rdm_jax.runtime.fields import at_least, below, between, one_of, positive


def edm_weight(sigma: Float[Array, "*b"], sigma_data: float) -> Float[Array, "*b"]:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM's weight (arXiv 2206.00364, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sigmoid_weight(sigma: Float[Array, "*b"], bias: float) -> Float[Array, "*b"]:
    """1 / (sigma^2 + exp(-bias)), a sigmoid in log SNR (SiD2, arXiv 2410.19324; 2303.00848).

    These papers weight the squared error of the noise by sigmoid(bias - l) at the log SNR
    l = -2 log sigma. The noise is (x - D) / sigma, so its squared error is that of D times exp(l),
    and exp(l) sigmoid(bias - l) = 1 / (exp(-l) + exp(-bias)).

    They also integrate over l evenly. Here the expectation stays that over a process's own levels.
    """
    return 1 / (sigma**2 + math.exp(-bias))


class Unconditioned:
    """For processes whose network gets the noised image alone."""

    @property
    def data_std(self) -> float | None:
        """None: no assumption."""
        return None

    def conditioning_channels(self, channels: int) -> int:
        """None."""
        return 0

    def conditioning(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w k"] | None:
        """None: no conditioning."""
        return None

    def check(self, path: str) -> None:
        """No check concerns several fields."""


@dataclasses.dataclass(frozen=True)
class FromNoise(Unconditioned):
    """Processes that end in pure white noise: x + sigma noise.

    They differ in `sigma` and `published_weight`.

    Attributes:
      weighting: of the squared error: as 'published', or a 'sigmoid' in log SNR
        (`sigmoid_weight`).
      weight_bias: of the sigmoid; a larger one emphasises details.
    """

    _: dataclasses.KW_ONLY
    weighting: str = one_of("published", "sigmoid", default="published")
    weight_bias: float = between(-50, 50, default=0.0)
    blurs: ClassVar[bool] = False

    @property
    def enlarges(self) -> int:
        """1: generation starts from noise alone."""
        return 1

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The noise level of a draw of `draw_level`."""
        raise NotImplementedError

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """The published weight of the squared error at a noise level."""
        raise NotImplementedError

    def weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """The weight of the squared error at a noise level."""
        if self.weighting == "sigmoid":
            return sigmoid_weight(sigma, self.weight_bias)
        return self.published_weight(sigma)

    def blurred(self, x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Float[Array, "b h w c"]:
        """The images themselves: nothing is blurred."""
        return x

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
class GaussianProcess(FromNoise):
    """EDM's process: log sigma ~ N(p_mean, p_std^2) (arXiv 2206.00364, table 1)."""

    p_mean: float = -1.2
    p_std: float = positive(default=1.2)
    sigma_data: float = positive(default=0.5)

    @property
    def data_std(self) -> float:
        """`sigma_data`."""
        return self.sigma_data

    def draw_level(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """The draw that `sigma` turns into a noise level: N(0, 1)."""
        return jax.random.normal(key)

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """exp(p_mean + p_std level)."""
        return jnp.exp(self.p_mean + self.p_std * level)

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """EDM's weight."""
        return edm_weight(sigma, self.sigma_data)


@dataclasses.dataclass(frozen=True)
class CascadeProcess(GaussianProcess):
    """EDM's process, conditioned on the enlarged small image (CDM, arXiv 2106.15282).

    The small image has noise of its own, in training of a level uniform in [0, augment_max]
    (Gaussian conditioning augmentation), and the network is conditioned on that level too.

    Attributes:
      patch: factor by which this stage enlarges.
      augment_max: largest noise level of the small image.
    """

    patch: int = at_least(2, default=4)
    augment_max: float = at_least(0, default=0.5)

    @property
    def enlarges(self) -> int:
        """`patch`."""
        return self.patch

    def conditioning_channels(self, channels: int) -> int:
        """The small image's channels and one for its noise level."""
        return channels + 1

    def conditioning_at(
        self,
        low: Float[Array, "b h w c"],
        level: Float[Array, " b"],
        noise: Float[Array, "b h w c"],
    ) -> Float[Array, "b h2 w2 k"]:
        """The small images, noised and enlarged, and their noise level in one more channel.

        Args:
          low: small images.
          level: of their noise.
          noise: unit noise of their size.
        """
        level = jnp.broadcast_to(level[:, None, None, None], (*low.shape[:3], 1))
        return blurring.enlarge(
            jnp.concatenate([low + level * noise, level], -1), factor=self.patch
        )

    def conditioning(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w k"]:
        """The same for the means of large images, each at a random level from its own key."""
        low = blurring.mean_pool(x, factor=self.patch)
        level_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        level = self.augment_max * jax.vmap(jax.random.uniform)(level_keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, low.shape[1:]))(noise_keys)
        return self.conditioning_at(low, level, noise)


@dataclasses.dataclass(frozen=True)
class VPProcess(FromNoise):
    """The variance-preserving SDE in EDM's terms (arXiv 2206.00364, table 1).

    Attributes:
      schedule: from times to noise levels; times are uniform in (epsilon, 1].
      epsilon: smallest time.
    """

    schedule: schedules.Linear = schedules.Linear()
    epsilon: float = below(1, least=1e-6, default=1e-5)  # float32 has no smaller step below 1

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The noise level of the time 1 - (1 - epsilon) level."""
        t = 1 + level * (self.epsilon - 1)
        # Not `schedule.sigma`, which is exact: the published implementation rounds 1 + sigma^2 to
        # float32, which shows at small times, where the weight of the loss is largest.
        return jnp.sqrt(jnp.exp(self.schedule.beta_d * t**2 / 2 + self.schedule.beta_min * t) - 1)

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """1 / sigma^2."""
        return 1 / sigma**2


@dataclasses.dataclass(frozen=True)
class VEProcess(FromNoise):
    """The variance-exploding SDE in EDM's terms (arXiv 2206.00364, table 1).

    Attributes:
      sigma_min, sigma_max: range of sigma; its logarithm is uniform.
    """

    sigma_min: float = positive(default=0.02)
    sigma_max: float = positive(default=100.0)

    def check(self, path: str) -> None:
        """The range must not be empty. Raises InputError."""
        schedules.check_range(self.sigma_min, self.sigma_max, path)

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """sigma_min (sigma_max / sigma_min)^level."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** level

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """1 / sigma^2."""
        return 1 / sigma**2


@dataclasses.dataclass(frozen=True)
class RelayProcess(Unconditioned):
    """The relay's process: patch-wise blur and block noise (arXiv 2309.03350).

    `q(x_t | x_0) = N(V D_t V^T x_0, sigma_t^2 Cov(noise))` in every patch, with
    `noise = e + a Block[s](e')`.

    Attributes:
      patch: p, factor by which this stage enlarges, and size of the patches of its blur.
      clock: RDM's time -> (sigma, blur).
      block_scale: a, strength of the block noise; 0 for white noise alone.
      block_size: s; 0 for s = p.
      normalize_noise: divide the noise by sqrt(1 + a^2), as in the paper; the released code does
        not.
      min_scale: floor of the blur's weights.
      sigma_floor: times are clipped from below near that of this noise level.
      exact_floor: clip exactly there; the released code multiplies the bound by the clock's length
        once more.
      weighting: of the squared error: 'edm' with `sigma_data`, as published; 'velocity', that of
        the linear path with noise scale 1; or 'sigmoid' in log SNR (`sigmoid_weight`).
      sigma_data: of EDM's weight.
      max_weight: largest weight.
      weight_bias: of the sigmoid; a larger one emphasises details.
    """

    patch: int = at_least(2, default=4)
    clock: schedules.Clock = schedules.Clock()
    block_scale: float = at_least(0, default=0.15)
    block_size: int = at_least(0, default=0)
    normalize_noise: bool = False
    min_scale: float = 1e-3
    sigma_floor: float = positive(default=0.0075)
    exact_floor: bool = False
    weighting: str = one_of("edm", "velocity", "sigmoid", default="edm")
    sigma_data: float = positive(default=0.5)
    max_weight: float = 1e5
    weight_bias: float = between(-50, 50, default=0.0)
    blurs: ClassVar[bool] = True

    @property
    def enlarges(self) -> int:
        """`patch`."""
        return self.patch

    @property
    def data_std(self) -> float:
        """`sigma_data`."""
        return self.sigma_data

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
        """`e + a Block[s](e')` from two white arrays (the second may be None where a = 0)."""
        if not self.block_scale:
            return white
        mixed = white + self.block_scale * blurring.block_noise(
            block_white, block=self.block_size or self.patch
        )
        return mixed / (1 + self.block_scale**2) ** 0.5 if self.normalize_noise else mixed

    def time(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The time of a draw from U(0, 1), clipped from below."""
        bound = ndtr(
            (jnp.log(jnp.asarray(self.sigma_floor, level.dtype)) - self.clock.p_mean)
            / self.clock.p_std
        )
        bound = bound / self.clock.length if self.exact_floor else bound * self.clock.length
        return jnp.maximum(level, bound)

    def blur_weights(self, t: Float[Array, " b"]) -> Float[Array, "b p p"]:
        """D_t, the factor of each DCT coefficient at time t."""
        return blurring.blur_weights(
            self.clock.blur_sigma(t), patch=self.patch, min_scale=self.min_scale
        )

    def blurred(self, x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Float[Array, "b h w c"]:
        """Blurs each image as at its time t."""
        return blurring.blur(
            x, self.clock.blur_sigma(t), patch=self.patch, min_scale=self.min_scale
        )

    def weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """The weight of the squared error at a noise level."""
        if self.weighting == "velocity":
            weight = schedules.Path().velocity_weight(sigma, 0.0)
        elif self.weighting == "sigmoid":
            weight = sigmoid_weight(sigma, self.weight_bias)
        else:
            weight = edm_weight(sigma, self.sigma_data)
        return jnp.minimum(weight, self.max_weight)

    def noised(
        self, x: Float[Array, "b h w c"], level: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """Blurs and noises each image at the time of its `level`."""
        t = self.time(level)
        sigma = self.clock.sigma(t)
        return Noised(
            self.blurred(x, t) + sigma[:, None, None, None] * noise, sigma, self.weight(sigma)
        )


def diffuse(
    process: Process, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
) -> tuple[Noised, Float[Array, "b h w k"] | None]:
    """Noises each image at a random level, both from its own key.

    Returns:
      The noised images, and what the network gets besides (`Process.conditioning`).
    """
    level_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    level = jax.vmap(process.draw_level)(level_keys)
    _, height, width, channels = x.shape
    noise = jax.vmap(lambda key: process.draw_noise(key, (height, width, channels)))(noise_keys)
    # 0 and 1 would give the two keys of `split`.
    own_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
    return process.noised(x, level, noise), process.conditioning(x, own_keys)
