"""The exact jump in mid-diffusion: from an unfinished small image to a larger one.

The stage before stops at a noise level s, with the state x_low + s n. Enlarged by p, and with the
noise that is missing inside of the cells (arXiv 2410.05954 and 2411.07126 for p = 2), that is the
state of this stage's process at p s:

    E(x_low + s n) + p s (e - E(M e)) = E(x_low) + p s e'',   e'' exactly white

E enlarges by nearest neighbour and M takes the means of p x p cells. Within a cell E n has the
covariance J, a matrix of ones, and p (e - E(M e)) has p^2 (1 - J / p^2), together p^2. So the
process has white noise only, and its blur is complete at p s.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.protocols import Levels, Noise, Precondition, Process
from rdm_jax.diffusion.samplers import RelaySteps, check_levels, lowest, nfe_of
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least, between, one_of, positive

# The largest weight of the blur that counts as complete, and of 1 minus it as none. The published
# floor of the weights (`RelayProcess.min_scale`) is a tenth of it.
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class JumpHeun(RelaySteps):
    """The relay's sampler, from the state of a stage that has stopped at `sigma_max` / p.

    It also continues from finished small images, whose noise is then part of the first state's: the
    result has the same distribution.

    Attributes:
      steps: number of levels N.
      sigma_min, sigma_max, rho: of the noise schedule; it joins at sigma_max, p times the level at
        which the stage before stops.
      eta: share of fresh noise in each step, in [0, 1]; 0 is the deterministic sampler.
      order: 2 for Heun, 1 for the plain update (half the NFE).
      corrector: what Heun's method averages over a step's two ends, as in `RelayHeun`.
      stop: noise level at which this stage stops in turn, as in `Heun`; 0: finish. Nothing may be
        blurred there any more (`Clock.blur_from`).
    """

    steps: int = at_least(2, default=18)
    sigma_min: float = positive(default=0.008)
    sigma_max: float = positive(default=1.6)
    rho: float = positive(default=7.0)
    eta: float = between(0, 1, default=0.2)
    order: int = one_of(1, 2, default=2)
    corrector: str = one_of("slopes", "images", default="slopes")
    stop: float = at_least(0, default=0.0)

    def walks(self, process: Process) -> bool:
        """The relay's process; `check` says how it must be set."""
        return isinstance(process, RelayProcess)

    def levels(self, process: RelayProcess) -> Levels:
        """The N levels, with the blur of the process at each."""
        sigma = schedules.edm_levels(
            self.steps, sigma_min=lowest(self), sigma_max=self.sigma_max, rho=self.rho
        )
        # Rounding must not carry the first level beyond the clock's end.
        time = jnp.minimum(process.clock.time(sigma), 1.0)
        return Levels(sigma, process.blur_weights(time))

    def nfe(self, process: RelayProcess) -> int:
        """2 N - 1 at second order, N at first."""
        return nfe_of(self.steps, self.order)

    def joins_at(self, process: RelayProcess) -> float:
        """sigma_max / p."""
        return self.sigma_max / process.patch

    def handover(self, process: RelayProcess) -> str:
        """The levels on both sides, and how much detail is left there."""
        return (
            f"joins at sigma {self.sigma_max:.4g}, from a small image with noise of sigma "
            f"{self.joins_at(process):.4g}, where {self._detail(process):.1%} of a patch's "
            "lowest frequency is left"
        )

    def check(self, path: str, process: RelayProcess, precondition: Precondition) -> None:
        """White noise, trained up to the first level and with a complete blur there.

        Where it stops, nothing may be blurred. Raises InputError.
        """
        check_levels(self, path, precondition)
        process_path = f"{path.rpartition('.')[0]}.process"
        if process.block_scale:
            raise InputError(
                f"{process_path}.block_scale={process.block_scale} adds block noise, and the noise "
                "that is handed over in a jump is white",
                "Use 0, or sampler.kind='relayheun'.",
            )
        largest = float(process.clock.sigma(jnp.float32(1)))
        if self.sigma_max > largest * (1 + 1e-5):
            raise InputError(
                f"{path}.sigma_max={self.sigma_max} is above the process's largest noise level",
                f"Use {largest:.5g} or less, or a larger process.clock.length.",
            )
        left = self._detail(process)
        if left > TOLERANCE:
            raise InputError(
                f"{process_path}.clock.blur_sigma_max={process.clock.blur_sigma_max} is a jump "
                f"whose blur is not complete where it joins: {left:.2%} of a patch's lowest "
                f"frequency is left at sigma {self.sigma_max:g}",
                f"Use more blur or a larger sampler.sigma_max, so that {TOLERANCE:.0%} or less is "
                "left.",
            )
        kept = float(self._blur(process)[-1].min()) if self.stop else 1.0
        if kept < 1 - TOLERANCE:
            raise InputError(
                f"{path}.stop={self.stop} is a noise level at which images are still blurred, down "
                f"to {kept:.1%} of a patch's highest frequency",
                f"Use a larger process.clock.blur_from, so that {1 - TOLERANCE:.0%} or more is "
                "left.",
            )

    def _blur(self, process: RelayProcess) -> Float[Array, "n p p"]:
        """The blur's weights at all levels."""
        blur = self.levels(process).blur
        assert blur is not None
        return blur

    def _detail(self, process: RelayProcess) -> float:
        """The weight of a patch's lowest frequency at the first level."""
        return float(self._blur(process)[0, 0, 1])

    def start(
        self, low: Float[Array, "b h w c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level, from finished small images."""
        assert low is not None and level.blur is not None
        return blurring.enlarge(low, factor=level.blur.shape[-1]) + level.sigma * noise(0)

    def join(
        self, low: Float[Array, "b h w c"], level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level, from small images with white noise of `joins_at`."""
        assert level.blur is not None
        factor = level.blur.shape[-1]
        return blurring.enlarge(low, factor=factor) + level.sigma * within_cells(
            noise(0), factor=factor
        )


def within_cells(noise: Float[Array, "b h w c"], *, factor: int) -> Float[Array, "b h w c"]:
    """e - E(M e): noise without the means of its factor x factor cells."""
    means = blurring.mean_pool(noise, factor=factor)
    return noise - blurring.enlarge(means, factor=factor)
