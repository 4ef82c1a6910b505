"""From an nnx module to a pair of pure functions, split once: merging inside `jit` costs nothing at run time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: key -> params, a nested dict of float32 arrays.
      apply: (params, x, noise_label, class_label, augment_label, dropout_keys) -> F; the last three may be None.
      abstract: the shapes and dtypes of the parameters, a tree of `jax.ShapeDtypeStruct`.
    """

    init: Callable[[Key[Array, ""]], dict[str, Any]]
    apply: Callable[..., Float[Array, "b h w c"]]
    abstract: dict[str, Any]

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract))

    def multiply_adds(self, image_shape: tuple[int, int, int], classes: int) -> int:
        """Multiply-adds of one forward pass for one image, in the convolutions and matrix products of the traced program.

        (XLA's own cost analysis leaves out what falls on a convolution's padding, 4 % of ADM-64.)
        """
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        labels = array(1, classes) if classes else None
        return _multiply_adds(jax.make_jaxpr(self.apply)(self.abstract, array(1, *image_shape), array(1), labels).jaxpr)


def _multiply_adds(jaxpr: Any) -> int:
    """Of all equations, those of inner functions too."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars[:2], *equation.outvars)]
        if equation.primitive.name == "conv_general_dilated":
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += math.prod(shapes[-1]) * math.prod(shapes[1]) // shapes[1][outputs]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        else:
            inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
            total += sum(_multiply_adds(value) for value in inner if hasattr(value, "eqns"))
    return total


class _SameKey(nnx.Rngs):
    """One key for everything: shapes do not depend on it, and counting the draws takes nnx most of the time of a trace."""

    def params(self) -> Key[Array, ""]:
        return jax.random.key(0)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Splits what `build` makes into structure and parameters."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(_SameKey(0))), nnx.Param)

    def init(key):
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)), nnx.Param)[1])

    def apply(params, x, noise_label, class_label=None, augment_label=None, dropout_keys=None):
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next line writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x, noise_label, class_label, augment_label, dropout_keys)

    return Network(init, apply, nnx.to_pure_dict(abstract))
