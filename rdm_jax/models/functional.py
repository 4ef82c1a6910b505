"""An nnx module as pure functions. It is split once; merging inside `jit` is free at run time."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rdm_jax.runtime.random_streams import root_key


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: key -> params, a nested dict of float32 arrays.
      apply: (params, x, noise_label, condition, augment_label, dropout_keys) -> F; the last three
        may be None.
      abstract: the shapes and dtypes of the parameters, a tree of `jax.ShapeDtypeStruct`.
      dtypes: the dtype that each parameter is computed with, a tree.
    """

    init: Callable[[Key[Array, ""]], dict[str, Any]]
    apply: Callable[..., Float[Array, "b h w c"]]
    abstract: dict[str, Any]
    dtypes: dict[str, Any]

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract))

    def multiply_adds(self, input_shape: tuple[int, int, int], condition: Any = None) -> int:
        """Multiply-adds of one forward pass for one image, counted in convolutions and products.

        XLA's own cost analysis leaves out the padding of convolutions, 4 % of ADM-64.

        Args:
          input_shape: (h, w, c) of the network's input.
          condition: `Condition.spec`.
        """
        x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
        noise_label = jax.ShapeDtypeStruct((1,), jnp.float32)
        batched = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), condition
        )
        return multiply_adds(self.apply, self.abstract, x, noise_label, batched)


def multiply_adds(function: Callable[..., Any], *abstract_args: Any) -> int:
    """Multiply-adds in the convolutions and matrix products of a function as JAX traces it.

    The arguments may be arrays or their shapes. A scan counts once per iteration; of the branches
    of a conditional the largest counts. Fused attention on GPU (bfloat16 networks, traced there) is
    not a matrix product to JAX and is not counted: trace in float32.

    Raises:
      ValueError: some are in a loop with an unknown number of iterations.
    """
    return _multiply_adds(jax.make_jaxpr(function)(*abstract_args).jaxpr)


def _multiply_adds(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return (
            equation.outvars[0].aval.size
            * math.prod(kernel)
            // kernel[params["dimension_numbers"].rhs_spec[0]]
        )
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return equation.outvars[0].aval.size * math.prod(
            equation.invars[0].aval.shape[axis] for axis in contracted
        )
    if name == "cond":
        return max(_multiply_adds(branch.jaxpr) for branch in params["branches"])
    inner = sum(
        _multiply_adds(getattr(value, "jaxpr", value))
        for value in params.values()
        if has_equations(value)
    )
    if name == "while" and inner:
        raise ValueError("multiply-adds in a while loop with an unknown number of iterations")
    return inner * params["length"] if name == "scan" else inner


def has_equations(value: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr, with or without constants."""
    return hasattr(getattr(value, "jaxpr", value), "eqns")


class _SameKey(nnx.Rngs):
    """One key for everything: shapes do not depend on keys, and drawing them slows traces down."""

    def params(self) -> Key[Array, ""]:
        return root_key(0)


class _CountedKeys(nnx.Rngs):
    """The keys of `nnx.Rngs`, counted in Python: counting in arrays slows traces down."""

    def __init__(self, key: Key[Array, ""]):
        super().__init__(key)
        self._used = itertools.count()

    def params(self) -> Key[Array, ""]:
        return jax.random.fold_in(self.default.key[...], next(self._used))


class Parts(NamedTuple):
    """A module, split into structure and parameters.

    Attributes:
      init: key -> params, a nested dict of float32 arrays.
      merge: params -> the module; free inside of `jit`.
      abstract: the shapes and dtypes of the parameters, a tree of `jax.ShapeDtypeStruct`.
      dtypes: the dtype that each parameter is computed with, a tree.
    """

    init: Callable[[Key[Array, ""]], dict[str, Any]]
    merge: Callable[[Any], Any]
    abstract: dict[str, Any]
    dtypes: dict[str, Any]


def split(build: Callable[[nnx.Rngs], nnx.Module]) -> Parts:
    """Splits what `build` makes into structure and parameters."""
    module = nnx.eval_shape(lambda: build(_SameKey(0)))
    graph, abstract = nnx.split(module, nnx.Param)

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.split(build(_CountedKeys(key)), nnx.Param)[1])

    def merge(params: Any) -> Any:
        state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next line writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def dtype_of(path: Any, leaf: Any) -> jnp.dtype:
        *owners, name = (key.key for key in path)
        owner: Any = functools.reduce(getattr, owners, module)
        return jnp.dtype((owner.dtype if name == "kernel" else None) or leaf.dtype)

    leaves = nnx.to_pure_dict(abstract)
    return Parts(init, merge, leaves, jax.tree.map_with_path(dtype_of, leaves))


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The network that `build` makes, as pure functions."""
    parts = split(build)

    def apply(
        params: Any,
        x: Array,
        noise_label: Array,
        condition: Any = None,
        augment_label: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        network = parts.merge(params)
        return network(x, noise_label, condition, augment_label, dropout_keys)

    return Network(parts.init, apply, parts.abstract, parts.dtypes)
