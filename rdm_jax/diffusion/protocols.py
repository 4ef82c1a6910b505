"""The interfaces of diffusion: denoisers, processes, samplers. Classes satisfy them by shape.

A new process or sampler is a frozen dataclass with these methods and an entry in the kinds of
`rdm_jax.config.Stage` (`rdm_jax.config.extend` adds one from outside the package).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

# The k-th unit noise of the whole batch: samplers hold no keys.
Noise = Callable[[Int[Array, ""] | int], Array]


@runtime_checkable
class Denoiser(Protocol):
    """x0 = D(x, sigma)."""

    def __call__(
        self, x: Float[Array, "b h w c"], sigma: Float[Array, "*b"], /
    ) -> Float[Array, "b h w c"]:
        """The denoised images of x at noise levels sigma, () or (b,)."""


@runtime_checkable
class ConditionalDenoiser(Protocol):
    """x0 = D(x, sigma, condition)."""

    def __call__(
        self, x: Float[Array, "b h w c"], sigma: Float[Array, "*b"], condition: Any, /
    ) -> Float[Array, "b h w c"]:
        """The same, conditioned on a tree of arrays with leading axis b (`models.conditions`)."""


class Noised(NamedTuple):
    """Input of a denoiser in training: noised images, noise level, weight of the squared error."""

    images: Float[Array, "b h w c"]
    sigma: Float[Array, " b"]
    weight: Float[Array, " b"]


class Levels(NamedTuple):
    """Levels of a noise schedule (leading axis n), or one of them.

    Attributes:
      sigma: noise levels, decreasing.
      blur: for a relay, the blur's weights D at each level; None where nothing is blurred.
      time: the process's own time at each level, for samplers that step in it; else None.
    """

    sigma: Float[Array, "*n"]
    blur: Float[Array, "*n p p"] | None = None
    time: Float[Array, "*n"] | None = None


@runtime_checkable
class Process(Protocol):
    """A forward process: clean images in, noised images out."""

    @property
    def enlarges(self) -> int:
        """Factor by which the stage enlarges the images of the one before; 1 for none."""

    @property
    def blurs(self) -> bool:
        """Whether the process blurs images (`blurred`)."""

    @property
    def data_std(self) -> float | None:
        """Standard deviation that the data is assumed to have; None if none is assumed."""

    def conditioning_channels(self, channels: int) -> int:
        """Channels of the network's input besides those of the noised image."""

    def conditioning(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w k"] | None:
        """What the network gets besides the noised image in training; None for nothing."""

    def draw_level(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """One image's draw that `noised` turns into a noise level."""

    def draw_noise(self, key: Key[Array, ""], shape: tuple[int, int, int]) -> Float[Array, "h w c"]:
        """Unit noise of one image."""

    def noised(
        self, x: Float[Array, "b h w c"], level: Float[Array, " b"], noise: Float[Array, "b h w c"]
    ) -> Noised:
        """Noises each image at its level."""

    def blurred(self, x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Float[Array, "b h w c"]:
        """The images blurred as at times t, without noise; x itself where nothing is blurred."""

    def check(self, path: str) -> None:
        """Checks what concerns several fields; `path` names the process. Raises InputError."""


@runtime_checkable
class Precondition(Protocol):
    """The part of a preconditioning that samplers need."""

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the network knows."""


@runtime_checkable
class Sampler(Protocol):
    """A sampler: steps from the highest to the lowest of its noise levels.

    One that continues from an unfinished stage also has `Joins`.
    """

    def walks(self, process: Any) -> bool:
        """Whether the sampler can be used with this process."""

    def levels(self, process: Any) -> Levels:
        """The noise levels of all steps."""

    def nfe(self, process: Any) -> int:
        """Network function evaluations per image, the two passes of guidance counted as one."""

    def conditioning(
        self, process: Any, low: Float[Array, "b h w c"] | None, noise: Noise
    ) -> Float[Array, "b h2 w2 k"] | None:
        """What the network gets besides the state, constant over all levels; None for nothing."""

    def start(
        self, low: Float[Array, "b h w c"] | None, level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level, from the images of the stage before (None for stage 1)."""

    def step(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        to: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From level i to the next."""

    def finish(
        self,
        denoise: Denoiser,
        x: Float[Array, "b h w c"],
        i: Int[Array, ""],
        level: Levels,
        noise: Noise,
    ) -> Float[Array, "b h w c"]:
        """From the last level to clean images."""

    def handover(self, process: Any) -> str:
        """How the stage continues from the images of the one before, for the log."""

    @property
    def stop(self) -> float:
        """Noise level at which it stops and hands over its state x + stop n; 0: it finishes."""

    def check(self, path: str, process: Any, precondition: Precondition) -> None:
        """Checks what concerns several fields, or the process and the preconditioning.

        Raises:
          InputError: names the field by `path`, that of the sampler.
        """


@runtime_checkable
class Joins(Protocol):
    """The part of a sampler that continues from the state of a stage that has stopped before."""

    def joins_at(self, process: Any) -> float:
        """The noise level of the small state that it continues from."""

    def join(
        self, low: Float[Array, "b h w c"], level: Levels, noise: Noise
    ) -> Float[Array, "b h2 w2 c"]:
        """The state at the first level, from that small state, whose noise is white."""
