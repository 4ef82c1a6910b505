"""What the tests of both families of networks share: small networks, parameters as after some
training, and inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.models.backbone import Shapes
from rdm_jax.models.conditions import ClassLabels
from rdm_jax.models.functional import Network, functional

CLASSES, AUGMENT, CHANNELS = 5, 3, 2
# The network in float32, summed in another order: relative to outputs near 1.
FLOAT32 = 2e-5


def shapes(channels=CHANNELS, classes=CLASSES, outputs=1) -> Shapes:
    """Of networks for images of so many channels and classes (0: none)."""
    return Shapes(channels, outputs * channels, ClassLabels().bound(classes).spec)


@functools.cache
def network(config, outputs=1) -> Network:
    return functional(lambda rngs: config.build(shapes(outputs=outputs), rngs=rngs))


def parameters(net, seed=0):
    """Parameters as after some training: no kernel is near zero, outputs are near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        return jnp.asarray(
            z / np.sqrt(np.prod(leaf.shape[:-1]))
            if name == "kernel"
            else 0.1 * z + (name == "scale")
        )

    return jax.tree.map_with_path(draw, net.abstract)


def inputs(batch=3, height=4, width=8, seed=0):
    """Images, noise labels, class labels, augmentation labels."""
    rng = np.random.default_rng(seed)
    one_hot = np.eye(CLASSES)[rng.permutation(CLASSES)[:batch]]
    arrays = (
        rng.standard_normal((batch, height, width, CHANNELS)),
        rng.standard_normal(batch),
        one_hot,
    )
    return tuple(
        jnp.asarray(a, jnp.float32) for a in (*arrays, rng.standard_normal((batch, AUGMENT)))
    )
