"""Samplers: a denoiser, explicit noise levels and a state in; the state at the next level out.

Generating from noise and continuing from an enlarged image differ in the initial state only. A
sampler is a frozen record of its settings (`protocols.Sampler` is the interface), and `walks.walk`
takes the steps of any of them. N levels take N - 1 steps and one last evaluation: 2 N - 1 NFE at
second order, N at first.

Noise comes from a function `noise(k)`, the k-th unit noise of the whole batch: samplers hold no
keys.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.processes import CascadeProcess, RelayProcess
from rdm_jax.diffusion.protocols import Denoiser, Levels, Noise, Precondition, Process
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least, between, one_of, positive


def nfe_of(levels: int, order: int) -> int:
    """NFE of a method of order 1 or 2 over so many levels."""
    return levels if order == 1 else 2 * levels - 1


def lowest(sampler: Any) -> float:
    """The last noise level of a sampler: where it stops, or `sigma_min`."""
    return sampler.stop or sampler.sigma_min


def check_levels(
    sampler: Any, path: str, precondition: Precondition, *, highest: bool = True
) -> None:
    """Checks a sampler's sigma_min and sigma_max against what the network knows.

    Args:
      sampler: has `sigma_min`, `sigma_max` and `stop`.
      path: of the sampler in the config.
      precondition: of the network.
      highest: whether sigma_max itself is used.

    Raises:
      InputError: the last level is not below sigma_max, or one is outside of the network's range.
    """
    least, most = precondition.range
    field, last = "stop" if sampler.stop else "sigma_min", lowest(sampler)
    if last >= sampler.sigma_max:
        raise InputError(
            f"{path}.{field}={last} is not below sigma_max={sampler.sigma_max}",
            "Use a number above 0 and below sigma_max.",
        )
    if last < least:
        raise InputError(
            f"{path}.{field}={last} is below the preconditioning's smallest level",
            f"Use {least:.4g} or more.",
        )
    if highest and sampler.sigma_max > most:
        raise InputError(
            f"{path}.sigma_max={sampler.sigma_max} is above the preconditioning's largest level",
            f"Use {most:.5g} or less.",
        )


@dataclasses.dataclass(frozen=True)
class Heun:
    """EDM's second-order sampler (arXiv 2206.00364, algorithms 1 and 2), with churn stochastic.

    Attributes:
      steps: number of levels N.
      sigma_min, sigma_max, rho: of the noise schedule.
      churn, churn_min, churn_max, churn_noise: S_churn, S_min, S_max and S_noise of algorithm 2;
        churn 0 adds no such noise.
      eta: share of fresh noise in each step, in [0, 1], as in DDIM ("sde_scale" of the released
        CelebA-HQ sampler); 0 adds none.
      order: 2 for Heun, 1 for Euler's method (half the NFE).
      stop: noise level at which the stage stops and hands its unfinished state to the next one, a
        jump (`jump.JumpHeun`); the N levels then end there instead of at `sigma_min`. What is shown
        of this stage is the denoised state, for which the last evaluation is spent. 0: finish.
    """

    steps: int = at_least(2, default=18)
    sigma_min: float = positive(default=0.002)
    sigma_max: float = positive(default=80.0)
    rho: float = positive(default=7.0)
    churn: float = at_least(0, default=0.0)
    churn_min: float = at_least(0, default=0.0)
    churn_max: float = 1e9
    churn_noise: float = at_least(0, default=1.0)
    eta: float = between(0, 1, default=0.0)
    order: int = one_of(1, 2, default=2)
    stop: float = at_least(0, default=0.0)

    def walks(self, process: Process) -> bool:
        """Processes that start from noise alone."""
        return process.enlarges == 1

    def levels(self, process: Process) -> Levels:
        """The N levels, whatever the process is."""
        return Levels(
            schedules.edm_levels(
                self.steps, sigma_min=lowest(self), sigma_max=self.sigma_max, rho=self.rho
            )
        )

    def nfe(self, process: Process) -> int:
        """2 N - 1 at second order, N at first."""
        return nfe_of(self.steps, self.order)

    def conditioning(
        self, process: Process, low: Float[Array, "b h w c"] | None, noise: Noise
    ) -> Array | None:
        """None: no conditioning."""
        return None

    def handover(self, process: Process) -> str:
        """The stage before is not used."""
        return "starts from pure noise"

    def check(self, path: str, process: Process, precondition: Precondition) -> None:
        """The levels must be in the network's range. Raises InputError."""
        check_levels(self, path, precondition)

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
        """From level i to the next: churn, an Euler step, Heun's correction; with noise if eta.

        x' = x + (sqrt(1 - eta^2) sigma' - sigma) d + eta sigma' n, which for any eta keeps the
        marginals if d is the true noise.
        """
        x, sigma = self._churned(x, level.sigma, noise(3 * i + 1))
        slope = (x - denoise(x, sigma)) / sigma
        predicted = self._moved(x, slope, sigma, to.sigma, noise(3 * i + 2))
        if self.order == 1:
            return predicted
        slope_at_end = (predicted - denoise(predicted, to.sigma)) / to.sigma
        return self._moved(x, (slope + slope_at_end) / 2, sigma, to.sigma, noise(3 * i + 3))

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
        largest = min(self.churn / self.steps, 2**0.5 - 1)
        gamma = jnp.where((sigma >= self.churn_min) & (sigma <= self.churn_max), largest, 0.0)
        raised = sigma * (1 + gamma)
        # sigma sqrt((1 + gamma)^2 - 1), written so that it is exactly 0 where gamma is
        return x + sigma * jnp.sqrt(gamma * (2 + gamma)) * self.churn_noise * noise, raised


@dataclasses.dataclass(frozen=True)
class CascadeHeun(Heun):
    """EDM's sampler for a classic cascade: from pure noise, conditioned on the small image.

    Attributes:
      augment: noise level of the small image, from 0 to the process's `augment_max`.
    """

    augment: float = at_least(0, default=0.1)

    def walks(self, process: Process) -> bool:
        """Cascades."""
        return isinstance(process, CascadeProcess)

    def conditioning(
        self, process: Any, low: Float[Array, "b h w c"] | None, noise: Noise
    ) -> Float[Array, "b h2 w2 k"]:
        """The small images, noised and enlarged, and the level of that noise."""
        assert low is not None
        white = noise(3 * self.steps)  # an index that no step uses
        unit = process.patch * blurring.mean_pool(white, factor=process.patch)
        level = jnp.full(low.shape[0], self.augment, low.dtype)
        return process.conditioning_at(low, level, unit)

    def handover(self, process: Process) -> str:
        """Pure noise, and the noise level of the small image."""
        return (
            f"starts from pure noise, conditioned on the small image with noise of sigma "
            f"{self.augment:g}"
        )

    def check(self, path: str, process: Any, precondition: Precondition) -> None:
        """`augment` must be a level that training has covered. Raises InputError."""
        super().check(path, process, precondition)
        if self.augment > process.augment_max:
            raise InputError(
                f"{path}.augment={self.augment} is above process.augment_max",
                f"Use 0 to {process.augment_max:g} (process.augment_max).",
            )


class RelaySteps:
    """The steps of samplers of a process that blurs, patch by patch in DCT space.

    Classes have `eta`, `order` and `corrector` (`RelayHeun`).
    """

    eta: float
    order: int
    corrector: str

    def conditioning(
        self, process: Process, low: Float[Array, "b h w c"] | None, noise: Noise
    ) -> Array | None:
        """None: the small image is in the state."""
        return None

    def step(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        to: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From level i to the next.

        The corrector draws fresh noise: with the predictor's, the marginal would be too narrow.
        """
        image = denoise(x, level.sigma)
        predicted = self._update(x, image, noise(2 * i + 1), level, to)
        if self.order == 1:
            return predicted
        image_at_end = denoise(predicted, to.sigma)
        if self.corrector == "images":
            image = (image + image_at_end) / 2
        else:  # the image that the mean of the slopes (x - image) / sigma points away from
            image = (x + image - level.sigma / to.sigma * (predicted - image_at_end)) / 2
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
        assert level.blur is not None
        one_patch = functools.partial(relay_update, level=level, to=to, eta=self.eta)
        moved = blurring.over_patches(one_patch, level.blur.shape[-1])((x, image))
        return moved + self.eta * to.sigma * noise if self.eta else moved


@dataclasses.dataclass(frozen=True)
class RelayHeun(RelaySteps):
    """The relay's sampler (arXiv 2309.03350): from an enlarged image, patch by patch in DCT space.

    Attributes:
      steps: nominal number of levels; only those below `truncation_sigma` are used.
      sigma_min, sigma_max, rho: of the noise schedule.
      truncation_sigma: the relay starts at the highest level below it.
      truncation_time: the clock's length in sampling; 0 for that of the training.
      eta: share of fresh noise in each step, in [0, 1]; 0 is the deterministic sampler.
      order: 2 for Heun, 1 for the plain update (half the NFE).
      corrector: what Heun's method averages over a step's two ends: 'slopes', as published, which
        for eta = 0 is of second order in the patch means and of first where the blur changes; or
        'images', the denoised ones, of second order in both.
      exact_start: treat the first state as what it is: patch means without any detail. If False, as
        published, it is treated as blurred like the process at this level; the detail that this
        blur keeps is missing from then on. With `exact_start`, order 1 and the corrector 'images'
        restore that detail, 'slopes' only part of it.
    """

    steps: int = at_least(2, default=18)
    sigma_min: float = positive(default=0.008)
    sigma_max: float = positive(default=80.0)
    rho: float = positive(default=7.0)
    truncation_sigma: float = 0.9
    truncation_time: float = at_least(0, default=0.0)
    eta: float = between(0, 1, default=0.2)
    order: int = one_of(1, 2, default=2)
    corrector: str = one_of("slopes", "images", default="slopes")
    exact_start: bool = False
    stop: ClassVar[float] = 0.0

    def walks(self, process: Process) -> bool:
        """The relay's process."""
        return isinstance(process, RelayProcess)

    def levels(self, process: RelayProcess) -> Levels:
        """The levels below `truncation_sigma`, with the blur of the state at each.

        It is the process's blur; with `exact_start` the first level has nothing but patch means.
        """
        sigma = schedules.edm_levels(
            self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )
        sigma = schedules.truncate(sigma, self.truncation_sigma)
        clock = process.clock
        if self.truncation_time:
            clock = dataclasses.replace(clock, length=self.truncation_time)
        blur = process.blur_weights(clock.time(sigma))
        if self.exact_start:
            blur = blur.at[0].set(0.0).at[0, 0, 0].set(1.0)  # the patch mean alone
        return Levels(sigma, blur)

    def nfe(self, process: RelayProcess) -> int:
        """2 n - 1 at second order, n at first, for the n levels below `truncation_sigma`."""
        return nfe_of(len(self.levels(process).sigma), self.order)

    def joined_level(self, process: RelayProcess) -> Levels:
        """The level at which the relay starts, with the blur of the process there."""
        published = dataclasses.replace(self, exact_start=False)
        return jax.tree.map(lambda a: a[0], published.levels(process))

    def handover(self, process: RelayProcess) -> str:
        """The level, and how much detail is left there; the paper assumes none."""
        first = self.joined_level(process)
        end = process.blur_weights(jnp.ones(1))[0]
        assert first.blur is not None
        text = (
            f"starts at sigma {first.sigma:.4g}, where {first.blur[0, 1]:.1%} of a patch's lowest "
            f"frequency is left ({end[0, 1]:.1%} where its training ends)"
        )
        compensated = self.exact_start and (self.order == 1 or self.corrector == "images")
        return f"{text}, which the first step restores" if compensated else text

    def check(self, path: str, process: RelayProcess, precondition: Precondition) -> None:
        """At least two levels must be left, in the network's range. Raises InputError."""
        check_levels(self, path, precondition, highest=False)
        count = len(self.levels(process).sigma)
        if count < 2:
            raise InputError(
                f"{path}.steps={self.steps} leaves {count} levels below truncation_sigma",
                "Use more steps.",
            )

    def start(
        self, low: Float[Array, "b h w c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level: the small image with constant patches, plus noise."""
        assert low is not None and level.blur is not None
        return blurring.enlarge(low, factor=level.blur.shape[-1]) + level.sigma * noise(0)


def relay_update(
    x: Float[Array, "p p"], image: Float[Array, "p p"], level: Levels, to: Levels, eta: float
) -> Float[Array, "p p"]:
    """One patch at the next level, without the fresh noise (arXiv 2309.03350).

    With u and u0 the DCTs of the state and of the denoised image:

    u' = g u + (D' - g D) u0,    g = sqrt(1 - eta^2) sigma' / sigma

    With the true u0 any eta keeps the marginals of the process. With the posterior mean instead, as
    in sampling, eta > 0 costs up to (1 - sqrt(1 - eta^2)) / 2 of the variance.
    """
    assert level.blur is not None and to.blur is not None
    g = (1 - eta**2) ** 0.5 * to.sigma / level.sigma
    return g * x + blurring.filter_patch(image, to.blur - g * level.blur)
