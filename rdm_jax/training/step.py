"""One training step as a pure function of (state, batch)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from rdm_jax.checkpoints.profiles import average_names, exponent
from rdm_jax.data.augment import Augmentation, mirror
from rdm_jax.diffusion import dct_error, preconditioning, processes
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.protocols import Process
from rdm_jax.models.conditions import Condition
from rdm_jax.models.functional import Network
from rdm_jax.runtime import random_streams
from rdm_jax.training.count import Count


@runtime_checkable
class Loss(Protocol):
    """What `make_step` minimises; `Objective` is that of a stage."""

    @property
    def network(self) -> Network:
        """Whose parameters are trained."""

    def plain(self) -> "Loss":
        """The same without augmentation, for the validation loss."""

    def inputs(self, image_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loss reads of a batch: shapes and dtypes for one image (h, w, c)."""

    def loss(
        self, params: dict, batch: dict[str, Array], keys: Key[Array, " b"], *, dropout: bool
    ) -> Float[Array, " b"]:
        """The loss per image; all of an image's randomness follows from its own key."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective: everything that the loss needs besides parameters and images.

    Attributes:
      pool: the stage sees the means of pool x pool values of the records.
      condition: what the network is conditioned on.
      label_dropout: probability of the null condition, per image: of caption and class together.
      augmentation: of the images, with a label that the network is conditioned on; None for none.
      flip: mirror half of all images, without a label; not together with an augmentation.
      representation: how records hold images.
      dct_quality: of the error's weights in the DCT; 0 for the error in pixels.
    """

    network: Network
    process: Process
    precondition: preconditioning.Preconditioning
    pool: int
    condition: Condition
    label_dropout: float
    augmentation: Augmentation | None = None
    flip: bool = False
    representation: Pixels | Latents = Pixels()
    dct_quality: int = 0

    def plain(self) -> "Objective":
        """The same without augmentation."""
        return dataclasses.replace(self, augmentation=None, flip=False)

    def inputs(self, image_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loss reads of a batch: shapes and dtypes for one image (h, w, c)."""
        return {
            "image": jax.ShapeDtypeStruct(image_shape, self.representation.dtype),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
            **self.condition.inputs,
        }

    def loss(
        self, params: dict, batch: dict[str, Array], keys: Key[Array, " b"], *, dropout: bool
    ) -> Float[Array, " b"]:
        """The weighted squared error per image, mean over its values (EDM eq. 8; RDM eq. 11).

        Args:
          params: of the network.
          batch: 'image' (b, h, w, c) as the records have it, 'label' (b,) int32, and what the
            condition reads besides (`Condition.inputs`).
          keys: one per image; all of an image's randomness follows from its own.
          dropout: whether the network's dropout is on.
        """
        images = self.representation.draw(batch["image"], self.pool, keys)
        process_keys, label_keys, augment_keys, dropout_keys = jax.vmap(
            lambda key: jax.random.split(key, 4), out_axes=1
        )(keys)
        images = mirror(images, augment_keys) if self.flip else images
        augment_labels = None
        if self.augmentation:
            images, augment_labels = self.augmentation(images, augment_keys)
        noised, conditioning = processes.diffuse(self.process, images, process_keys)
        condition = self.condition.drop(
            self.condition.encode(batch), label_keys, self.label_dropout
        )

        def network(x, c_noise):
            x = x if conditioning is None else jnp.concatenate([x, conditioning], -1)
            return self.network.apply(
                params, x, c_noise, condition, augment_labels, dropout_keys if dropout else None
            )

        denoise = preconditioning.denoiser(network, self.precondition)
        error = denoise(noised.images, noised.sigma) - images
        if self.dct_quality:
            return noised.weight * dct_error.squared(error, quality=self.dct_quality)
        return noised.weight * jnp.mean(error**2, (1, 2, 3))


@flax.struct.dataclass
class TrainState:
    """The state that a run carries from step to step; arrays, or their abstract shapes.

    Attributes:
      step: number of steps; the step's randomness follows from it.
      params, ema: the network's parameters and their exponential moving average.
      opt_state: optax's.
      skipped, skipped_in_a_row: int32 numbers of steps whose loss or gradient was not finite.
      averages: further averages of the parameters, of the widths of `training.averages`, by the
        names that `average_names` gives them.
    """

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any
    averages: Any = flax.struct.field(default_factory=dict)


def init_state(
    params: dict[str, Any],
    optimizer: optax.GradientTransformation,
    averages: Sequence[float] = (),
) -> TrainState:
    """The state before the first step. Under `jit` with `out_shardings` it is created sharded.

    Args:
      params: of the network.
      optimizer: of the parameters.
      averages: widths of the further averages.
    """

    def copy():  # of its own, so that the state can be donated
        return jax.tree.map(jnp.array, params)

    zero = jnp.zeros((), jnp.int32)
    further = {name: copy() for name in average_names(averages)}
    return TrainState(zero, params, copy(), optimizer.init(params), zero, zero, further)


def ema_weight(
    images: Float[Array, ""], *, batch_size: int, halflife: float, rampup: float
) -> Float[Array, ""]:
    """Weight of the new parameters in a step of the EMA, w = 1 - 2^(-batch_size / halflife).

    float32, EDM's rule. The half-life is at most `rampup` times the images seen so far; 0 images
    give 1, so that the EMA starts as the parameters.

    Args:
      images: seen so far.
      batch_size: images per step.
      halflife: in images.
      rampup: 0 for no bound of the half-life.
    """
    if rampup:
        halflife = jnp.minimum(halflife, images * rampup)
    else:
        halflife = jnp.asarray(halflife, jnp.float32)
    # Not 1 minus the power, which for long half-lives cancels all but a digit or two.
    return -jnp.expm1(-math.log(2) * batch_size / jnp.maximum(halflife, 1e-8))


def power_weight(images: Float[Array, ""], *, batch_size: int, width: float) -> Float[Array, ""]:
    """Weight of the new parameters in a step of the average of a relative width.

    w = 1 - (1 - batch_size / images)^(gamma + 1), float32; 1 in the first step (EDM2, arXiv
    2312.02696, section 3.1). The average is then exactly that of the power function over parameters
    that stay as they are between two steps.

    Args:
      images: seen after the step.
      batch_size: images per step.
      width: relative, as in `profiles.exponent`.
    """
    return -jnp.expm1((exponent(width) + 1) * jnp.log1p(-batch_size / images))


def make_step(
    objective: Loss,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    count: Count,
    accumulate: int,
    ema_halflife: float,
    ema_rampup: float,
    averages: Sequence[float] = (),
    fetch: Callable[[Any], Any] = lambda params: params,
    axis_name: str | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    `batch` holds what the objective reads (`Objective.inputs`), and 'position' (b,) int32, each
    image's index in the global batch, from which its randomness follows. If the
    loss or a gradient is not finite, parameters, moments and EMA stay as they are, and the step is
    counted as skipped; to the further averages it is a step to the same parameters.

    Args:
      objective: what is trained.
      optimizer: of the parameters.
      key: of all randomness of the training.
      count: of images, by the size of the global batch.
      accumulate: number of equal parts of a batch, whose gradients are averaged one after the
        other.
      ema_halflife, ema_rampup: as in `ema_weight`.
      averages: widths of the further averages.
      fetch: all-gathers sharded parameters.
      axis_name: under `pmap`, the axis over whose devices gradients are averaged; None under `jit`,
        where arrays are global.
    """

    def loss_of(params, batch, keys):
        return objective.loss(fetch(params), batch, keys, dropout=True).mean()

    gradient = accumulated(jax.value_and_grad(loss_of), accumulate)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        keys = random_streams.image_keys(jax.random.fold_in(key, state.step), batch["position"])
        loss, grads = gradient(state.params, batch, keys)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        # Parameters and their EMA.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        images = state.step * float(count.batch_size)
        if count.step:
            images += float(count.images - count.step * count.batch_size)
        weight = ema_weight(
            images, batch_size=count.batch_size, halflife=ema_halflife, rampup=ema_rampup
        )
        ema = optax.incremental_update(params, state.ema, weight)

        # The state stays as it was where anything is not finite.
        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params = keep(params, state.params)
        further = {
            name: optax.incremental_update(
                params,
                state.averages[name],
                power_weight(images + count.batch_size, batch_size=count.batch_size, width=width),
            )
            for name, width in average_names(averages).items()
        }
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            averages=further,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        return new_state, metrics

    return step


def accumulated(gradient: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Averages a gradient over equal parts of a batch, one after the other.

    Args:
      gradient: (params, batch, keys) -> (loss, gradients), means over the batch.
      parts: number of parts; 1 leaves `gradient` as it is.
    """
    if parts == 1:
        return gradient

    def split(x):
        # Every `parts`-th image makes a part, so that each part lies on all devices.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def averaged(params, batch, keys):
        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, (batch, keys)))
        return jax.tree.map(lambda x: x / parts, total)

    return averaged
