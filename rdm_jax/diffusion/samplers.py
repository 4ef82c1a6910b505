"""Samplers: a denoiser D(x, sigma), explicit levels and a state in; the state one level further
out.

Generating from noise and relaying from an enlarged image are the same walk from another state. A
sampler is a frozen record of its settings with `levels`, `start`, `step` and `finish`; `walk`
drives any of them. N levels take N - 1 steps and one last evaluation: 2 N - 1 evaluations of the
denoiser in all at second order, N at first.

Noise comes from a function `noise(k)`, the k-th unit noise of the whole batch: samplers hold no
keys.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.preconditioning import Denoiser
from rdm_jax.diffusion.processes import Cascade, FromNoise, Relay

Noise = Callable[[Int[Array, ""] | int], Array]


class Levels(NamedTuple):
    """Rungs of the ladder (leading axis n), or one of them.

    Attributes:
      sigma: noise levels, decreasing.
      blur: for a relay, the blur's weights D at each level; None where nothing is blurred.
    """

    sigma: Float[Array, "*n"]
    blur: Float[Array, "*n p p"] | None = None


@dataclasses.dataclass(frozen=True)
class Heun:
    """EDM's second-order sampler (arXiv 2206.00364, algorithms 1 and 2): an ODE, or with churn a
    stochastic one.

    Attributes:
      steps: number of levels N.
      sigma_min, sigma_max, rho: the ladder.
      churn, churn_min, churn_max, churn_noise: S_churn, S_min, S_max and S_noise of algorithm 2;
        churn 0 adds no noise so.
      eta: share of fresh noise in each step, in [0, 1], as in DDIM ("sde_scale" of the released
        CelebA-HQ sampler); 0 adds none.
      order: 2 for Heun, 1 for Euler's method (half the evaluations).
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = 1e9
    churn_noise: float = 1.0
    eta: float = 0.0
    order: int = 2

    def levels(self, process: FromNoise) -> Levels:
        """The N levels; a process without blur adds nothing to the ladder."""
        return Levels(
            schedules.edm_ladder(
                self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
            )
        )

    def start(
        self, low: Float[Array, "b h2 w2 c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h w c"]:
        """The state at the first level: pure noise."""
        return level.sigma * noise(0)

    def step(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        to: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From level i to the next: churn, an Euler step, and Heun's correction of it, each of the
        two with fresh noise if eta.

        x' = x + (sqrt(1 - eta^2) sigma' - sigma) d + eta sigma' n, which for any eta keeps the
        marginals if d is the true noise.
        """
        x, sigma = self._churned(x, level.sigma, noise(3 * i + 1))
        slope = (x - denoise(x, sigma)) / sigma
        predicted = self._moved(x, slope, sigma, to.sigma, noise(3 * i + 2))
        if self.order == 1:
            return predicted
        slope_there = (predicted - denoise(predicted, to.sigma)) / to.sigma
        return self._moved(x, (slope + slope_there) / 2, sigma, to.sigma, noise(3 * i + 3))

    def finish(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From the last level to zero: an Euler step there is the denoised image itself."""
        return denoise(*self._churned(x, level.sigma, noise(3 * i + 1)))

    def _moved(self, x: Array, slope: Array, sigma: Array, to: Array, noise: Array) -> Array:
        moved = x + ((1 - self.eta**2) ** 0.5 * to - sigma) * slope
        return moved + self.eta * to * noise if self.eta else moved

    def _churned(self, x: Array, sigma: Array, noise: Array) -> tuple[Array, Array]:
        """Raises the noise level by adding noise (algorithm 2, lines 4 to 6)."""
        if not self.churn:
            return x, sigma
        gamma = min(self.churn / self.steps, 2**0.5 - 1)
        gamma = jnp.where((sigma >= self.churn_min) & (sigma <= self.churn_max), gamma, 0.0)
        raised = sigma * (1 + gamma)
        # sigma sqrt((1 + gamma)^2 - 1), written so that it is exactly 0 where gamma is
        return x + sigma * jnp.sqrt(gamma * (2 + gamma)) * self.churn_noise * noise, raised


@dataclasses.dataclass(frozen=True)
class CascadeHeun(Heun):
    """EDM's sampler for a stage of a classic cascade: from pure noise, the network being given the
    small image.

    Attributes:
      augment: noise level of the small image, from 0 to the process's `augment_max`.
    """

    augment: float = 0.1

    def given(
        self, process: Cascade, low: Float[Array, "b h w c"], noise: Noise
    ) -> Float[Array, "b h2 w2 k"]:
        """What the network is given of the small images."""
        unit = process.patch * blurring.mean_pool(
            noise(3 * self.steps), factor=process.patch
        )  # a number that no step draws
        return process.given(low, jnp.full(low.shape[0], self.augment, low.dtype), unit)


@dataclasses.dataclass(frozen=True)
class RelayHeun:
    """The relay's sampler (arXiv 2309.03350): from an enlarged image, patch by patch in DCT space.

    Attributes:
      steps: nominal number of levels; only those under `truncation_sigma` are walked.
      sigma_min, sigma_max, rho: the ladder.
      truncation_sigma: where the relay joins the ladder.
      truncation_time: the clock's length in sampling; 0 for the one it was trained with.
      eta: share of fresh noise in each step, in [0, 1]; 0 is the deterministic sampler.
      order: 2 for Heun, 1 for the plain update (half the evaluations).
      corrector: what Heun's method averages over a step's two ends: 'slopes', as published, which
        for eta = 0 is of second order in the patch means and of first where the blur changes; or
        'images', the denoised ones, of second order in both.
      exact_start: let the first step go on from an image without any detail, which the enlarged one
        is; else, as published, from one that is blurred as the process is at this level, so that
        what the blur has left there is missing from then on. It is made up for by order 1 and the
        corrector 'images'; 'slopes' takes a part of it away again.
    """

    steps: int = 18
    sigma_min: float = 0.008
    sigma_max: float = 80.0
    rho: float = 7.0
    truncation_sigma: float = 0.9
    truncation_time: float = 0.0
    eta: float = 0.2
    order: int = 2
    corrector: str = "slopes"
    exact_start: bool = False

    def levels(self, process: Relay) -> Levels:
        """The levels that are walked, with the blur that the state has at each: the process's, but
        for an exact start."""
        ladder = schedules.edm_ladder(
            self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )
        sigma = schedules.truncate(ladder, self.truncation_sigma)
        clock = process.clock
        if self.truncation_time:
            clock = dataclasses.replace(clock, length=self.truncation_time)
        blur = process.blur_weights(clock.time(sigma))
        return Levels(sigma, blur.at[0].set(0.0).at[0, 0, 0].set(1.0) if self.exact_start else blur)

    def start(
        self, low: Float[Array, "b h w c"], level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level: the small image, enlarged so that every patch is constant,
        plus noise."""
        return blurring.enlarge(low, factor=level.blur.shape[-1]) + level.sigma * noise(0)

    def step(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        to: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From level i to the next. The corrector draws fresh noise: with the predictor's, the
        marginal would be too narrow."""
        image = denoise(x, level.sigma)
        predicted = self._update(x, image, noise(2 * i + 1), level, to)
        if self.order == 1:
            return predicted
        there = denoise(predicted, to.sigma)
        if self.corrector == "images":
            image = (image + there) / 2
        else:  # the image that the mean of the slopes (x - image) / sigma points away from
            image = (x + image - level.sigma / to.sigma * (predicted - there)) / 2
        return self._update(x, image, noise(2 * i + 2), level, to)

    def finish(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """The last step returns the denoised image itself."""
        return denoise(x, level.sigma)

    def _update(self, x: Array, image: Array, noise: Array, level: Levels, to: Levels) -> Array:
        one_patch = functools.partial(relay_update, level=level, to=to, eta=self.eta)
        moved = blurring.over_patches(one_patch, level.blur.shape[-1])((x, image))
        return moved + self.eta * to.sigma * noise if self.eta else moved


def relay_update(
    x: Float[Array, "p p"], image: Float[Array, "p p"], level: Levels, to: Levels, eta: float
) -> Float[Array, "p p"]:
    """One patch, one level further, without the fresh noise (arXiv 2309.03350).

    With u and u0 the DCTs of the state and of the denoised image:

    u' = g u + (D' - g D) u0,    g = sqrt(1 - eta^2) sigma' / sigma

    With the true u0 any eta keeps the marginals of the process; with the posterior mean in its
    place, as in sampling, eta > 0 costs up to (1 - sqrt(1 - eta^2)) / 2 of the variance.
    """
    g = (1 - eta**2) ** 0.5 * to.sigma / level.sigma
    return g * x + blurring.filter_patch(image, to.blur - g * level.blur)


def walk(
    step: Callable, finish: Callable, x: Float[Array, "b h w c"], levels: Levels, *, scan: bool
) -> Float[Array, "b h w c"]:
    """Takes the state x at levels[0] down all levels and finishes.

    Args:
      step: (x, i, level, to) -> x, a sampler's step with all else bound.
      finish: (x, i, level) -> x.
      x: the state at the first level.
      levels: n of them.
      scan: one `lax.scan` (on accelerators, inside `jit`), or a Python loop that calls `step` each
        time (on CPU, where XLA runs convolutions inside of a loop several times slower; `step`
        should then be compiled).
    """
    n = levels.sigma.shape[0]
    rung = lambda k: jax.tree.map(lambda a: a[k], levels)  # noqa: E731
    if scan:
        pairs = (jnp.arange(n - 1), rung(slice(None, -1)), rung(slice(1, None)))
        x, _ = jax.lax.scan(lambda x, pair: (step(x, *pair), None), x, pairs)
    else:
        for i in range(n - 1):
            x = step(x, jnp.int32(i), rung(i), rung(i + 1))
    return finish(x, jnp.int32(n - 1), rung(n - 1))
