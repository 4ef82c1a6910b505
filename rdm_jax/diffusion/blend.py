"""CogView3's relay: the image fades linearly into the enlarged small image (arXiv 2403.05121).

With s = t / T_r, the share of the process's time that has passed, and E(M x), the enlarged means:

    q(z_s | x) = N(z_s^0, sigma_s^2),    z_s^0 = (1 - s) x + s E(M x)

E enlarges by nearest neighbour and M takes the means of p x p cells, of pixels or of latents. In
the DCT of a patch, z_s^0 is a blur: the mean stays, and every other coefficient has the weight
1 - s. So the published step

    z' = a z + b x~ + c z^0,  a = sqrt(sigma'^2 - delta^2) / sigma, b = 1 - s' / s, c = s' / s - a

is the relay's update (`samplers.relay_update`), with delta = eta sigma', and with z^0 taken from
the denoised image x~ in every step. The paper carries z^0 along from the small image instead; for
sigma proportional to s and delta = 0 the two are equal, as then c = 0. For other schedules only the
first, used here, keeps the process's marginals.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.processes import FromNoise
from rdm_jax.diffusion.protocols import Levels, Noise, Noised, Precondition, Process
from rdm_jax.diffusion.samplers import RelaySteps, nfe_of
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least, below, between, one_of


@dataclasses.dataclass(frozen=True)
class BlendProcess(FromNoise):
    """CogView3's process: a linear mixture of image and enlarged small image, and white noise.

    Times are uniform. As published, the squared error of images has the weight 1.

    Attributes:
      patch: p, factor by which this stage enlarges.
      schedule: from times to noise levels.
      end: T_r, the time at which the mixture is the enlarged small image alone.
      epsilon: smallest s.
    """

    patch: int = at_least(2, default=4)
    schedule: schedules.Linear = schedules.Linear()
    end: float = between(0.01, 1, default=0.5)
    epsilon: float = below(1, least=1e-6, default=1e-3)
    blurs: ClassVar[bool] = True

    @property
    def enlarges(self) -> int:
        """`patch`."""
        return self.patch

    def sigma_at(self, s: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The noise level at a share s of the process's time."""
        return self.schedule.sigma(self.end * s)

    def share(self, sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The inverse of `sigma_at`."""
        return self.schedule.time(sigma) / self.end

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """The noise level of an s that is uniform in [epsilon, 1)."""
        return self.sigma_at(self.epsilon + (1 - self.epsilon) * level)

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """1."""
        return jnp.ones_like(sigma)

    def blur_weights(self, s: Float[Array, "*b"]) -> Float[Array, "*b p p"]:
        """The factor of each DCT coefficient of a patch: 1 for the mean, else 1 - s."""
        weights = jnp.broadcast_to((1 - s)[..., None, None], (*s.shape, self.patch, self.patch))
        return weights.at[..., 0, 0].set(1.0)

    def blurred(self, x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Float[Array, "b h w c"]:
        """The mixtures z^0 at shares t of the time."""
        means = blurring.enlarge(blurring.mean_pool(x, factor=self.patch), factor=self.patch)
        return x + t[:, None, None, None] * (means - x)

    def noised_at(
        self, x: Float[Array, "b h w c"], sigma: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """Mixes and noises each image at its noise level."""
        return super().noised_at(self.blurred(x, self.share(sigma)), sigma, noise)


@dataclasses.dataclass(frozen=True)
class BlendHeun(RelaySteps):
    """The blend's sampler, in equal steps of time from the enlarged small image with noise.

    Attributes:
      steps: number of levels N, from s = 1 to 1 / N.
      eta: share of fresh noise in each step, in [0, 1]: delta / sigma'; 0 is the deterministic
        sampler.
      order: 2 for Heun's method with the denoised images of both ends averaged, 1 for the published
        update (half the NFE).
    """

    steps: int = at_least(2, default=10)
    eta: float = between(0, 1, default=0.0)
    order: int = one_of(1, 2, default=2)
    corrector: ClassVar[str] = "images"  # type: ignore[misc]
    stop: ClassVar[float] = 0.0

    def walks(self, process: Process) -> bool:
        """The blend."""
        return isinstance(process, BlendProcess)

    def levels(self, process: BlendProcess) -> Levels:
        """The beginnings of the N steps, with the weights of the blend at each."""
        s = 1 - jnp.arange(self.steps) / self.steps
        return Levels(process.sigma_at(s), process.blur_weights(s))

    def nfe(self, process: BlendProcess) -> int:
        """2 N - 1 at second order, N at first."""
        return nfe_of(self.steps, self.order)

    def handover(self, process: BlendProcess) -> str:
        """The level, and how much detail is left there: none, as where its training ends."""
        first = self.levels(process)
        assert first.blur is not None
        return (
            f"starts at sigma {first.sigma[0]:.4g}, where {first.blur[0, 0, 1]:.1%} of a patch's "
            "detail is left, as where its training ends"
        )

    def check(self, path: str, process: BlendProcess, precondition: Precondition) -> None:
        """The network must know the noise levels of sampling. Raises InputError."""
        least, most = precondition.range
        sigma = self.levels(process).sigma
        first, last = float(sigma[0]), float(sigma[-1])
        if first > most:
            raise InputError(
                f"{path.rpartition('.')[0]}.process.end={process.end} begins at sigma {first:.4g}, "
                "above the preconditioning's largest level",
                f"Use a smaller end, so that sigma is {most:.5g} or less.",
            )
        if last < least:
            raise InputError(
                f"{path}.steps={self.steps} ends at sigma {last:.4g}, below the preconditioning's "
                "smallest level",
                "Use fewer steps.",
            )
        if 1 / self.steps < process.epsilon:
            raise InputError(
                f"{path}.steps={self.steps} ends at s = {1 / self.steps:.4g}, below the process's "
                f"epsilon={process.epsilon:g}, where no network is trained",
                f"Use {int(1 / process.epsilon)} steps or fewer.",
            )

    def start(
        self, low: Float[Array, "b h w c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level: the enlarged small image with noise."""
        assert low is not None and level.blur is not None
        return blurring.enlarge(low, factor=level.blur.shape[-1]) + level.sigma * noise(0)
