"""Guidance: transforms of conditional denoisers, independent of samplers.

A stage's config holds a list of kinds. `guided` applies them in the order of the list; the result
is a conditional denoiser again, to which the sampling of a stage binds the condition.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.diffusion.protocols import ConditionalDenoiser
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least

Null = Callable[[Any], Any]  # the null condition, a tree of the shapes of a condition


@runtime_checkable
class Guidance(Protocol):
    """A kind of guidance. Its text (`str`) names it in the log."""

    @property
    def guide(self) -> str:
        """The checkpoint of the network that guides; '' if it needs none."""

    @property
    def passes(self) -> int:
        """Passes of what it transforms for each image and evaluation."""

    @property
    def needs_null(self) -> bool:
        """Whether it needs the null condition, so a network trained with label dropout."""

    def check(self, path: str) -> None:
        """Checks what bounds of fields do not; `path` names the entry. Raises InputError."""

    def transform(
        self, conditional: ConditionalDenoiser, null: Null, guide: ConditionalDenoiser | None
    ) -> ConditionalDenoiser:
        """The guided denoiser.

        Args:
          conditional: what it transforms.
          null: the null condition of a condition.
          guide: D of the network that `guide` names, on the same conditions; None without one.
        """


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: D = w D(x | c) - (w - 1) D(x | null) (arXiv 2207.12598).

    Both passes are one call. The two of an image are neighbours in a batch of 2 b, so that both are
    on the device of the image and nothing moves between devices. Weight 1 is plain conditional
    denoising, one pass.

    Attributes:
      weight: w.
      interval: the noise levels between which w applies, the lower first, both exclusive (arXiv
        2404.07724); () for all. Levels within 1e-5 of a bound count as outside, so that rounding
        does not decide about a level that a sampler has put on it.
    """

    weight: float = at_least(0, default=1.0)
    interval: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.weight:g}{_at(self.interval)}"

    @property
    def guide(self) -> str:
        """None: the network guides itself."""
        return ""

    @property
    def passes(self) -> int:
        """2, outside of the interval too; 1 for weight 1."""
        return 1 if self.weight == 1 else 2

    @property
    def needs_null(self) -> bool:
        """Unless the weight is 1."""
        return self.weight != 1

    def check(self, path: str) -> None:
        """Checks the interval. Raises InputError."""
        _check_interval(self.interval, path)

    def transform(
        self,
        conditional: ConditionalDenoiser,
        null: Null,
        guide: ConditionalDenoiser | None = None,
    ) -> ConditionalDenoiser:
        """The guided denoiser."""
        if self.weight == 1:
            return conditional

        def guided(
            x: Float[Array, "b h w c"], sigma: Float[Array, "*b"], condition: Any
        ) -> Float[Array, "b h w c"]:
            both = jax.tree.map(_interleaved, condition, null(condition))
            twice_sigma = jnp.repeat(jnp.broadcast_to(sigma, x.shape[:1]), 2)
            passes = conditional(jnp.repeat(x, 2, axis=0), twice_sigma, both)
            passes = passes.reshape(len(x), 2, *x.shape[1:])
            return _extrapolated(self, sigma, passes[:, 0], passes[:, 1])

        return guided


@dataclasses.dataclass(frozen=True)
class Autoguidance:
    """Guidance by a worse network: D = w D(x | c) - (w - 1) D_guide(x | c) (arXiv 2406.02507).

    The guide is a smaller or less trained network of any family and preconditioning, with the same
    images and classes. Its pass is a call of its own.

    Attributes:
      weight: w. Weight 1 needs no guide, and none is loaded.
      checkpoint: of the guide: the folder of a step, or of a stage in a workdir for its newest one,
        such as 'runs/small/stage1'.
      interval: the noise levels between which w applies, as of 'classifierfree'; () for all.
    """

    weight: float = at_least(0, default=1.0)
    checkpoint: str = ""
    interval: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.weight:g} by {self.checkpoint}{_at(self.interval)}"

    @property
    def guide(self) -> str:
        """`checkpoint`, unless the weight is 1."""
        return "" if self.weight == 1 else self.checkpoint

    @property
    def passes(self) -> int:
        """1: the other pass is the guide's."""
        return 1

    @property
    def needs_null(self) -> bool:
        """It does not."""
        return False

    def check(self, path: str) -> None:
        """Checks the interval and the form of the path. Raises InputError."""
        _check_interval(self.interval, path)
        if self.weight != 1 and "/" not in self.checkpoint:
            raise InputError(
                f"{path}.checkpoint={self.checkpoint!r} cannot be used",
                "Use the path of a step's folder, or of a stage's folder in a workdir.",
            )

    def transform(
        self, conditional: ConditionalDenoiser, null: Null, guide: ConditionalDenoiser | None
    ) -> ConditionalDenoiser:
        """The guided denoiser. Raises ValueError without a guide, unless the weight is 1."""
        if self.weight == 1:
            return conditional
        if guide is None:
            raise ValueError(f"guidance {self} has no guide")

        def guided(
            x: Float[Array, "b h w c"], sigma: Float[Array, "*b"], condition: Any
        ) -> Float[Array, "b h w c"]:
            main, other = (each(x, sigma, condition) for each in (conditional, guide))
            return _extrapolated(self, sigma, main, other)

        return guided


def guided(
    entries: Sequence[Guidance],
    conditional: ConditionalDenoiser,
    null: Null,
    guides: Sequence[ConditionalDenoiser] = (),
) -> ConditionalDenoiser:
    """The denoiser with all guidance of a list; the first entry is applied first.

    Args:
      entries: the list.
      conditional: the network's denoiser.
      null: the null condition of a condition.
      guides: a denoiser for each entry that needs one (`Guidance.guide`), in their order.

    Raises:
      ValueError: the number of guides is not that of the entries that need one.
    """
    if len(guides) != sum(bool(entry.guide) for entry in entries):
        raise ValueError(f"{len(guides)} guides for {entries}")
    remaining = iter(guides)
    for entry in entries:
        conditional = entry.transform(conditional, null, next(remaining) if entry.guide else None)
    return conditional


def passes(entries: Sequence[Guidance]) -> tuple[int, ...]:
    """Passes per image and evaluation: of the stage's network, then of each guide in their order.

    What follows in the list multiplies them: classifier-free guidance of an autoguided network
    takes two passes of both.
    """
    counts = [1]
    for entry in entries:
        counts = [count * entry.passes for count in counts] + ([1] if entry.guide else [])
    return tuple(counts)


def as_list(value: Any) -> tuple[Any, ...]:
    """A stage's guidance as a tuple; numbers are weights of classifier-free guidance, 1 is none."""
    items = value if isinstance(value, tuple | list) else (value,)
    numbers = [isinstance(item, int | float) and not isinstance(item, bool) for item in items]
    return tuple(
        ClassifierFree(float(item)) if number else item
        for item, number in zip(items, numbers, strict=True)
        if not (number and item == 1)
    )


def shown(entries: Sequence[Guidance]) -> float | list[str]:
    """Guidance for a message: the shorthand where there is one, else the entries' texts."""
    if not entries:
        return 1.0
    first = entries[0]
    if len(entries) == 1 and isinstance(first, ClassifierFree) and not first.interval:
        return first.weight
    return [str(entry) for entry in entries]


def text(entries: Sequence[Guidance]) -> str:
    """Guidance for the log: '1' for none, '2 at sigma 0.3 to 5, 1.4 by runs/small/stage1'."""
    return ", ".join(map(str, entries)) or "1"


def _extrapolated(
    entry: ClassifierFree | Autoguidance,
    sigma: Float[Array, "*b"],
    main: Float[Array, "b h w c"],
    other: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
    """From `other` through `main` by the entry's weight; `main` itself outside of its interval."""
    weight = entry.weight
    guided = weight * main - (weight - 1) * other
    if not entry.interval:
        return guided
    (low, high), sigma = entry.interval, jnp.broadcast_to(sigma, main.shape[:1])
    inside = (sigma > low * (1 + 1e-5)) & (sigma < high * (1 - 1e-5))
    # A choice, as a guide may return anything at levels that it does not know.
    return jnp.where(inside[:, None, None, None], guided, main)


def _check_interval(interval: tuple[float, ...], path: str) -> None:
    if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise InputError(
            f"{path}.interval={interval!r} cannot be used",
            "Use two noise levels, the lower first, such as (0.3, 5.0), or () for all.",
        )


def _at(interval: tuple[float, ...]) -> str:
    return f" at sigma {interval[0]:g} to {interval[1]:g}" if len(interval) == 2 else ""


def _interleaved(one: Array, other: Array) -> Array:
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])
