"""The loss of fixed images under the averaged parameters, which tells the best checkpoint."""

import dataclasses
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
from rdm_jax.runtime import distributed, random_streams, sharding
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training.step import Objective


class Validation:
    """Measures the loss of images as they are, at fixed levels with fixed noise, labels dropped as
    in training.

    Args:
      objective: of the training; its augmentation is left out.
      images: whose loss it is.
      training: says how many of them, and in which parts.
      key: of the levels and the noise.
      mesh: of the devices that train.
    """

    def __init__(
        self,
        objective: Objective,
        images: ImageSet,
        training: Training,
        key: Key[Array, ""],
        mesh: Mesh,
    ):
        self._objective = dataclasses.replace(objective, augmentation=None, flip=False)
        self._images, self._key, self._mesh = images, key, mesh
        self._label_dropout, self._size = (
            training.label_dropout,
            training.batch_size // training.accumulate,
        )
        # Evenly from the set, which may be sorted, in whole batches.
        count = -(-training.validation // training.batch_size) * training.batch_size
        self._places = np.linspace(0, len(images) - 1, count).astype(int)

    @property
    def identity(self) -> str:
        """A hash of all that the loss depends on but for the network and its parameters."""
        parts = (self._images.identity, self._places.tolist(), self._label_dropout)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def compile(self, abstract_ema: Any) -> None:
        """Compiles the loss for parameters of these shapes and shardings."""
        cut = sharding.batched(self._mesh)
        array = lambda dtype, *shape: jax.ShapeDtypeStruct(
            (self._size, *shape), dtype, sharding=cut
        )  # noqa: E731
        batch = {
            "image": array(self._objective.representation.dtype, *self._images.image_shape),
            "label": array(jnp.int32),
        }
        loss = jax.jit(self._loss, out_shardings=sharding.replicated(self._mesh))
        self._compiled = loss.lower(abstract_ema, batch, array(jnp.int32)).compile()

    def loss(self, ema: Any, stop: StopOnSignal) -> float | None:
        """The mean over all images; None where a signal comes before it is known, in all
        processes."""
        losses = []
        for part in self._parts():
            if distributed.in_any_process(bool(stop.requested)):
                return None
            losses.append(np.asarray(self._compiled(ema, *part)))
        return float(np.mean(losses))

    def _parts(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        for first in range(0, len(self._places), self._size):
            here = np.arange(first, first + self._size, dtype=np.int32).reshape(
                jax.process_count(), -1
            )[jax.process_index()]
            yield sharding.put_batch((self._images.batch(self._places[here]), here), self._mesh)

    def _loss(self, params: Any, batch: dict[str, jax.Array], number: jax.Array) -> jax.Array:
        return self._objective.loss(
            params, batch, random_streams.image_keys(self._key, number), dropout=False
        ).mean()
