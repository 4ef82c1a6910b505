"""What a network says of images; distances between sets of images are distances between their
features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array


@dataclass(frozen=True)
class FeatureSpace:
    """A feature extractor. Any other than the project's two is evaluated by giving it to
    `evaluate.Evaluator`.

    Attributes:
      name: of the metrics' table; 'inception' makes the Frechet distances an FID and an sFID.
      digest: tells one set of weights from another; statistics of others are refused.
      sizes: of the outputs. 'features' (d,) is needed; 'spatial' (e,) has a Frechet distance of its
        own, and from 'logits' (n,) come the inception score and, where `class_names` are the
        data's, the accuracy.
      params: what `apply` takes first; a tree of arrays.
      apply: (params, uint8 images (b, h, w, c)) -> float32 arrays (b, size), by the names in
        `sizes`. Pure: it is compiled.
      class_names: what the logits are of; () if these are not the data's classes.
    """

    name: str
    digest: str
    sizes: dict[str, int]
    params: Any = field(repr=False)
    apply: Callable[[Any, Array], dict[str, Array]] = field(repr=False)
    class_names: tuple[str, ...] = ()
