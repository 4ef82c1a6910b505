"""Feature extractors: networks by whose outputs sets of images are compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array


@dataclass(frozen=True)
class FeatureSpace:
    """A feature extractor.

    The project has three; another one is passed to `evaluator.Evaluator`.

    Attributes:
      name: for tables; 'inception' makes the Frechet distances an FID and an sFID.
      digest: identifies the weights; statistics of other weights are refused.
      sizes: of the outputs. 'features' (d,) is needed; 'spatial' (e,) has a Frechet distance of its
        own, and 'logits' (n,) give the inception score and, if `class_names` are the data's, the
        accuracy.
      params: the first argument of `apply`; a tree of arrays.
      apply: (params, uint8 images (b, h, w, c)) -> float32 arrays (b, size), by the names in
        `sizes`. It is pure and gets compiled.
      class_names: of the logits; () if these are not the data's classes.
    """

    name: str
    digest: str
    sizes: dict[str, int]
    params: Any = field(repr=False)
    apply: Callable[[Any, Array], dict[str, Array]] = field(repr=False)
    class_names: tuple[str, ...] = ()
