"""What runs on each device for its own images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.models.target import compiling_for, per_device
from rdm_jax.runtime import sharding


@pytest.mark.parametrize(("count", "share"), [(16, 2), (8, 1), (3, 3)])
def test_per_device_takes_any_batch(count, share):
    """One that the eight devices divide is split; any other is whole on each. Also in `vmap`."""
    seen = []

    def product(x, scale):
        seen.append(x.shape)
        return x * scale

    def run(x, scale):
        with compiling_for(sharding.make_mesh()):
            return per_device(product, shared=1)(x, scale)

    x, scales = np.arange(2.0 * count).reshape(count, 2), jnp.array([2.0, 3.0])
    np.testing.assert_array_equal(jax.jit(run)(x, scales[0]), 2 * x)
    assert set(seen) == {(share, 2)}
    mapped = jax.jit(jax.vmap(run, (None, 0)))(x, scales)
    np.testing.assert_array_equal(mapped, np.stack([2 * x, 3 * x]))
    one_by_one = jax.jit(jax.vmap(lambda each: run(each[None], scales[0])[0]))(x)
    np.testing.assert_array_equal(one_by_one, 2 * x)
