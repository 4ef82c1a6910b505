"""One training step as a pure function of (state, batch)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from rdm_jax.data.augment import Augmentation, mirror
from rdm_jax.diffusion import preconditioning, processes
from rdm_jax.diffusion.pixels import from_uint8
from rdm_jax.models.functional import Network
from rdm_jax.runtime import random_streams
from rdm_jax.training.count import Count


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a stage learns: everything the loss needs besides parameters and images.

    Attributes:
      pool: the stage sees the means of pool x pool pixels of the records.
      classes: number of classes; 0 for an unconditional network.
      label_dropout: probability that an image is shown without its label.
      augmentation: what is done to the images, the network being told; None for nothing.
      flip: mirror half of all images, the network not being told; not beside an augmentation.
    """

    network: Network
    process: processes.FromNoise | processes.Relay
    precondition: preconditioning.Preconditioning
    pool: int
    classes: int
    label_dropout: float
    augmentation: Augmentation | None = None
    flip: bool = False

    def loss(
        self, params: dict, batch: dict[str, Array], keys: Key[Array, " b"], *, dropout: bool
    ) -> Float[Array, " b"]:
        """The weighted squared error of each image, mean over its values (EDM equation 8; RDM
        equation 11).

        Each image's part follows from its own key, with the network's dropout too, if that is on.
        """
        images = from_uint8(batch["image"], self.pool)
        process_keys, label_keys, augment_keys, dropout_keys = jax.vmap(
            lambda key: jax.random.split(key, 4), out_axes=1
        )(keys)
        images = mirror(images, augment_keys) if self.flip else images
        images, augment = (
            self.augmentation(images, augment_keys) if self.augmentation else (images, None)
        )
        noised = processes.diffuse(self.process, images, process_keys)
        labels = self.labels(batch["label"], label_keys) if self.classes else None

        def network(x, c_noise):
            x = x if noised.given is None else jnp.concatenate([x, noised.given], -1)
            return self.network.apply(
                params, x, c_noise, labels, augment, dropout_keys if dropout else None
            )

        error = (
            preconditioning.denoiser(network, self.precondition)(noised.images, noised.sigma)
            - images
        )
        return noised.weight * jnp.mean(error**2, (1, 2, 3))

    def labels(self, label: Int[Array, " b"], keys: Key[Array, " b"]) -> Float[Array, "b classes"]:
        """One-hot labels, dropped to all-zero ones at random."""
        dropped = jax.vmap(jax.random.uniform)(keys) < self.label_dropout
        return jax.nn.one_hot(jnp.where(dropped, -1, label), self.classes)


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step; int32 scalars and trees of arrays, or their
    abstract shapes.

    Attributes:
      step: steps taken; the step's randomness follows from it.
      params, ema: the network's parameters and their exponential moving average.
      opt_state: optax's.
      skipped, skipped_in_a_row: steps whose loss or gradient was not finite.
    """

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any


def init_state(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Pure: run it under `jit` with `out_shardings`, and it is
    born sharded."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.array, params)  # a copy of its own, so that the state can be donated
    return TrainState(zero, params, ema, optimizer.init(params), zero, zero)


def ema_weight(
    images: Float[Array, ""], *, batch_size: int, halflife: float, rampup: float
) -> Float[Array, ""]:
    """What the new parameters weigh in a step of an average with a half-life counted in images
    (EDM's rule).

    w = 1 - 2^(-batch_size / halflife), float32. The half-life is at most `rampup` times the images
    seen so far; 0 images give 1: the average starts as the parameters.
    """
    halflife = (
        jnp.minimum(halflife, images * rampup) if rampup else jnp.asarray(halflife, jnp.float32)
    )
    # Not 1 minus the power, which for long half-lives leaves no more than a digit or two of the
    # difference.
    return -jnp.expm1(-math.log(2) * batch_size / jnp.maximum(halflife, 1e-8))


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    count: Count,
    accumulate: int,
    ema_halflife: float,
    ema_rampup: float,
    fetch: Callable[[Any], Any] = lambda params: params,
    axis_name: str | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    `batch` holds 'image' (b, h, w, c) uint8, 'label' (b,) int32 and 'position' (b,) int32, each
    image's place in the global batch, from which its randomness follows. Gradients of `accumulate`
    equal parts of it are averaged one after the other. Where the loss or a gradient is not finite,
    parameters, moments and average stay as they are and the step is counted as skipped.

    Args:
      count: of images, by the size of the global batch.
      fetch: makes parameters that are cut over devices whole.
      axis_name: under `pmap`, the axis over whose devices gradients are averaged; None under `jit`,
        where arrays are global.
    """

    def gradient(params, batch, keys):
        loss = lambda p: objective.loss(fetch(p), batch, keys, dropout=True).mean()  # noqa: E731
        return jax.value_and_grad(loss)(params)

    def accumulated(params, batch, keys):
        if accumulate == 1:
            return gradient(params, batch, keys)
        # Every accumulate-th image makes a part, so that each part lies on all devices.
        split = lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(
            0, 1
        )  # noqa: E731

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, (batch, keys)))
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        keys = random_streams.image_keys(jax.random.fold_in(key, state.step), batch["position"])
        loss, grads = accumulated(state.params, batch, keys)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        images = state.step * float(count.batch_size)
        if count.step:
            images += float(count.images - count.step * count.batch_size)
        weight = ema_weight(
            images, batch_size=count.batch_size, halflife=ema_halflife, rampup=ema_rampup
        )
        ema = optax.incremental_update(params, state.ema, weight)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        return new_state, {
            "loss": loss,
            "grad_norm": norm,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }

    return step
