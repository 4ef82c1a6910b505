"""From an nnx module to a pair of pure functions, split once: merging inside `jit` costs nothing at run time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Key


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: key -> params, a nested dict of float32 arrays.
      apply: (params, x, noise_label, class_label, augment_label, dropout_key) -> F; the last three may be None.
    """

    init: Callable[[Key[Array, ""]], dict[str, Any]]
    apply: Callable[..., Float[Array, "b h w c"]]

    def count(self) -> int:
        """Number of parameters, by abstract evaluation."""
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(self.init, jax.random.key(0))))


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Splits what `build` makes into structure and parameters."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)

    def init(key):
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)), nnx.Param)[1])

    def apply(params, x, noise_label, class_label=None, augment_label=None, dropout_key=None):
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next line writes into it
        nnx.replace_by_pure_dict(state, params)
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        return nnx.merge(graph, state)(x, noise_label, class_label, augment_label, rngs=rngs)

    return Network(init, apply)
