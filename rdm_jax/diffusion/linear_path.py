"""The linear path from noise to images: JiT's process and sampler (arXiv 2511.13720).

Networks see it as noise levels, like any process (`schedules.Path`), so that other samplers and
preconditionings combine with it.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rdm_jax.diffusion import schedules
from rdm_jax.diffusion.processes import FromNoise
from rdm_jax.diffusion.protocols import Denoiser, Levels, Noise, Precondition, Process
from rdm_jax.diffusion.samplers import nfe_of
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least, inside, one_of, positive


@dataclasses.dataclass(frozen=True)
class LinearProcess(FromNoise):
    """Logit-normal times on the linear path, as noise levels.

    The loss is that of velocities: see `schedules.Path`.

    Attributes:
      path: from times to noise levels.
      p_mean, p_std: mean and standard deviation of log(t / (1 - t)).
      t_eps: bound of 1 - t in the velocities' weight.
    """

    path: schedules.Path = schedules.Path()
    p_mean: float = -0.8
    p_std: float = positive(default=0.8)
    t_eps: float = inside(0, 1, default=0.05)

    def draw_level(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """The draw that `sigma` turns into a noise level: N(0, 1)."""
        return jax.random.normal(key)

    def sigma(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """Noise level at the time sigmoid(p_mean + p_std level)."""
        return self.path.noise_scale * jnp.exp(-(self.p_mean + self.p_std * level))

    def published_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
        """That of velocities."""
        return self.path.velocity_weight(sigma, self.t_eps)


@dataclasses.dataclass(frozen=True)
class LinearHeun:
    """JiT's sampler (arXiv 2511.13720): equal steps in the time of the linear path.

    The state is z = t x + (1 - t) s e, and a step follows the velocity
    (D - z) / max(1 - t, t_eps). The first time is not 0, where z / t has no value, but 1e-20, whose
    state is that of 0 to the last bit of float64.

    Attributes:
      steps: N equal steps from t = 0 to t = 1.
      t_eps: bound of 1 - t in velocities; with more than 1 / t_eps steps it damps the last ones.
      order: 2 for Heun, 1 for Euler's method; the last step is always Euler's.
    """

    steps: int = at_least(2, default=50)
    t_eps: float = inside(0, 1, default=0.05)
    order: int = one_of(1, 2, default=2)
    stop: ClassVar[float] = 0.0

    def walks(self, process: Process) -> bool:
        """The linear path."""
        return isinstance(process, LinearProcess)

    def levels(self, process: Any) -> Levels:
        """The beginnings of the N steps."""
        time = jnp.linspace(0.0, 1.0, self.steps + 1)[:-1].at[0].set(1e-20)
        return Levels(process.path.sigma(time), time=time)

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
        """The network must know all noise levels. Raises InputError."""
        least, most = precondition.range
        if least > 0 or most < math.inf:
            raise InputError(
                f"{path}: the linear path has all noise levels, and the preconditioning knows "
                f"{least:.4g} to {most:.4g}",
                "Use precondition.kind='x' or 'edm'.",
            )

    def start(
        self, low: Float[Array, "b h2 w2 c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h w c"]:
        """The state at the first level: pure noise."""
        assert level.time is not None
        return level.sigma * level.time * noise(0)

    def step(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        to: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From level i to the next: an Euler step, and Heun's correction."""
        assert level.time is not None and to.time is not None
        length = to.time - level.time
        velocity = self._velocity(denoise, x, level)
        predicted = x + length * velocity
        if self.order == 1:
            return predicted
        return x + length * (velocity + self._velocity(denoise, predicted, to)) / 2

    def finish(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From the last level to t = 1: an Euler step."""
        assert level.time is not None
        return x + (1 - level.time) * self._velocity(denoise, x, level)

    def _velocity(self, denoise: Denoiser, z: Array, level: Levels) -> Array:
        assert level.time is not None
        image = denoise(z / level.time, level.sigma)
        return (image - z) / jnp.maximum(1 - level.time, self.t_eps)
