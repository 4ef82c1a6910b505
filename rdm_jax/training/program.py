"""A stage's training step, compiled for a mesh: by `jit` with shardings, or by `pmap`."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from rdm_jax.config import Stage
from rdm_jax.config.autoencoder import Autoencoder
from rdm_jax.data.augment import Augmentation
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.latents import Latents
from rdm_jax.models.target import compiling_for
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.training.count import Count
from rdm_jax.training.optimizer import build_optimizer
from rdm_jax.training.step import Loss, Objective, TrainState, init_state, make_step

Trained = Stage | Autoencoder

# Else the gradients of sharded kernels are computed piece by piece, to send one while the next is
# computed; of convolutions a piece has so few channels that it takes five times as long.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def build_objective(
    stage: Stage,
    image_shape: tuple[int, ...],
    classes: int,
    cell: int = 1,
    latents: Latents | None = None,
) -> Objective:
    """The stage's objective, on images (h, w, c) of its own or a later stage's size.

    Args:
      stage: what is trained.
      image_shape: of the records.
      classes: of the images; 0 for none.
      cell: other than 1: on sums of cell x cell pixels.
      latents: how records hold moments of latents, of which c / 2 are means; None for pixels.

    Raises:
      InputError: latents are to be mirrored or transformed, which images alone can be.
    """
    training = stage.training
    if latents:
        for field in ("augment", "flip", "dct_quality"):
            if given := getattr(training, field):
                raise InputError(
                    f"config.{stage.name}.training.{field}={given!r} is for pixels, not latents",
                    f"Use {type(given)()!r}.",
                )
    channels = image_shape[-1] // 2 if latents else image_shape[-1]
    return Objective(
        network=stage.build(channels, classes),
        process=stage.process,
        precondition=stage.precondition,
        pool=image_shape[0] // stage.resolution[0],
        condition=stage.condition_for(classes),
        label_dropout=training.label_dropout,
        augmentation=Augmentation(training.augment) if training.augment else None,
        flip=training.flip,
        representation=latents or dataclasses.replace(stage.representation, cell=cell),
        dct_quality=training.dct_quality,
    )


def latent_objective(stage: Stage, images: ImageSet) -> Objective | None:
    """The stage's objective on a set of latents; None for pixels."""
    if images.latent_spec is None:
        return None
    latents = Latents(*images.latent_spec.statistics)
    return build_objective(stage, images.image_shape, len(images.class_names), latents=latents)


class Program(ABC):
    """The step of one stage on a mesh. Arrays are made, and code is compiled, on demand.

    Args:
      stage: what is trained, and how; of another `objective` its training alone is used.
      image_shape: (h, w, c) of the records.
      classes: of the images; 0 for none.
      key: of the training's randomness.
      mesh: of all devices that train.
      count: of images, if the batch size has changed during the training; else None.
      cell: records hold the sums of cell x cell pixels; 1 for pixels.
      objective: what is trained instead of the stage's own objective.

    Attributes:
      objective: of the training.
      inputs: shapes and dtypes of what it reads of a batch, for one image.
      abstract: the state's shapes and shardings, as in checkpoints.
    """

    AXIS: str | None = None  # the step itself averages gradients over this axis

    def __init__(
        self,
        stage: Trained,
        image_shape: tuple[int, ...],
        classes: int,
        key: Key[Array, ""],
        mesh: Mesh,
        count: Count | None = None,
        cell: int = 1,
        objective: Loss | None = None,
    ):
        self.mesh, self._training = mesh, stage.training
        count = count or Count(stage.training.batch_size)
        self.objective = objective or build_objective(stage, image_shape, classes, cell)
        position = {"position": jax.ShapeDtypeStruct((), jnp.int32)}
        self.inputs = self.objective.inputs(image_shape) | position
        self._optimizer = build_optimizer(stage.training, count)
        shapes = jax.eval_shape(
            lambda params: init_state(params, self._optimizer, stage.training.averages),
            self.objective.network.abstract,
        )
        self.abstract: TrainState = sharding.by_rules(shapes, mesh)
        self._step = make_step(
            self.objective,
            self._optimizer,
            key,
            count=count,
            accumulate=stage.training.accumulate,
            ema_halflife=stage.training.ema_halflife,
            ema_rampup=stage.training.ema_rampup,
            averages=stage.training.averages,
            fetch=sharding.fetcher(self.abstract.params, self.objective.network.dtypes),
            axis_name=self.AXIS,
        )

    def init(self, key: Key[Array, ""]) -> TrainState:
        """The state before the first step, created with its shardings."""
        # It runs once: optimising the code that draws some hundred small arrays takes longer than
        # drawing them.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

        def init(key):
            params = self.objective.network.init(key)
            return init_state(params, self._optimizer, self._training.averages)

        return jax.jit(
            init, out_shardings=sharding.shardings(self.abstract), compiler_options=options
        )(key)

    @abstractmethod
    def compile(self) -> None:
        """Compiles the step."""

    @abstractmethod
    def place(self, state: TrainState) -> TrainState:
        """From the state as in checkpoints to the state as the step takes it."""

    @abstractmethod
    def whole(self, state: TrainState) -> TrainState:
        """The inverse of `place`."""

    @abstractmethod
    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Starts the transfer of this process's part of a batch to its devices."""

    @abstractmethod
    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Starts one step. `state` is donated; the metrics are scalars."""


class Jitted(Program):
    """One program over the whole mesh; XLA inserts the collectives."""

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered for compilation; needs no devices."""
        batch = sharding.batch_of(self.inputs, self._training.batch_size, self.mesh)
        out = (sharding.shardings(self.abstract), sharding.replicated(self.mesh))
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        step = jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=out,
            compiler_options=TPU_OPTIONS if on_tpu else None,
        )
        with compiling_for(self.mesh):
            return step.lower(self.abstract, batch)

    def compile(self) -> None:  # noqa: D102
        self.compiled = self.lower().compile()

    def place(self, state: TrainState) -> TrainState:  # noqa: D102
        return state

    def whole(self, state: TrainState) -> TrainState:  # noqa: D102
        return state

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:  # noqa: D102
        return sharding.put_batch(batch, self.mesh)

    def __call__(self, state, batch):  # noqa: D102
        return self.compiled(state, batch)


class Pmapped(Program):
    """The same step on each device, with its replica of the state and its shard of the batch."""

    AXIS = sharding.DATA

    def compile(self) -> None:  # noqa: D102
        devices = list(self.mesh.local_devices) if jax.process_count() == 1 else None
        self._mapped = jax.pmap(self._step, axis_name=self.AXIS, donate_argnums=0, devices=devices)

    def place(self, state: TrainState) -> TrainState:  # noqa: D102
        count = len(self.mesh.local_devices)
        return jax.tree.map(lambda x: np.broadcast_to(_first(x), (count, *x.shape)), state)

    def whole(self, state: TrainState) -> TrainState:  # noqa: D102
        def unmapped(x, like):
            value = _first(x).reshape(like.shape)
            return jax.make_array_from_callback(
                like.shape, like.sharding, lambda index: value[index]
            )

        return jax.tree.map(unmapped, state, self.abstract)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:  # noqa: D102
        count = len(self.mesh.local_devices)
        return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

    def __call__(self, state, batch):  # noqa: D102
        state, values = self._mapped(state, batch)
        return state, jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(()), values)


def _first(x: Any) -> np.ndarray:
    """The value on the first of this process's devices."""
    return np.asarray(x.addressable_shards[0].data)


PROGRAMS = {"pjit": Jitted, "pmap": Pmapped}
