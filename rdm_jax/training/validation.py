"""The loss of the EMA parameters on fixed images, which ranks checkpoints."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from rdm_jax.config import Training
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.models.target import compiling_for
from rdm_jax.runtime import distributed, random_streams, sharding
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training.step import Loss


class Validation:
    """Measures the loss at fixed noise levels with fixed noise, labels dropped as in training.

    Args:
      objective: of the training; its augmentation is switched off.
      images: that the loss is measured on.
      training: gives their number and the size of batches.
      key: of the noise levels and the noise.
      mesh: of the devices that train.
    """

    def __init__(
        self,
        objective: Loss,
        images: ImageSet,
        training: Training,
        key: Key[Array, ""],
        mesh: Mesh,
    ):
        self._objective = objective.plain()
        self._images = images
        self._inputs = self._objective.inputs(images.image_shape)
        self._key = key
        self._mesh = mesh
        self._label_dropout = training.label_dropout
        self._size = training.batch_size // training.accumulate
        # Spread evenly over the set, which may be sorted, in whole batches.
        count = -(-training.validation // training.batch_size) * training.batch_size
        self._indices = np.linspace(0, len(images) - 1, count).astype(int)

    @property
    def identity(self) -> str:
        """A hash of all that the loss depends on, except the network and its parameters."""
        parts = (self._images.identity, self._indices.tolist(), self._label_dropout)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def compile(self, abstract_ema: Any) -> None:
        """Compiles the loss for parameters of these shapes and shardings."""
        index = jax.ShapeDtypeStruct((), jnp.int32)
        batch, indices = sharding.batch_of((self._inputs, index), self._size, self._mesh)
        fetch = sharding.fetcher(abstract_ema, self._objective.network.dtypes)
        loss = jax.jit(
            lambda ema, *part: self._loss(fetch(ema), *part),
            out_shardings=sharding.replicated(self._mesh),
        )
        self._compiled = loss.lower(abstract_ema, batch, indices).compile()

    def loss(self, ema: Any, stop: StopOnSignal) -> float | None:
        """Returns the mean over all images; None in all processes if a signal comes before."""
        losses = []
        for part in self._parts():
            distributed.hear_preemption(stop)
            if distributed.in_any_process(bool(stop.requested)):
                return None
            losses.append(np.asarray(self._compiled(ema, *part)))
        return float(np.mean(losses))

    def _parts(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """Yields batches, with each image's index among all validation images."""
        for first in range(0, len(self._indices), self._size):
            index = np.arange(first, first + self._size, dtype=np.int32)
            local = index.reshape(jax.process_count(), -1)[jax.process_index()]
            batch = self._images.batch(self._indices[local], text="text" in self._inputs)
            batch = {name: batch[name] for name in self._inputs}
            yield sharding.put_batch((batch, local), self._mesh)

    def _loss(self, params: Any, batch: dict[str, jax.Array], index: jax.Array) -> jax.Array:
        keys = random_streams.image_keys(self._key, index)
        with compiling_for(self._mesh):
            return self._objective.loss(params, batch, keys, dropout=False).mean()
