"""A stage's training on random images, for timing."""

import collections
import time

import jax
import numpy as np

from rdm_jax import config as configs
from rdm_jax.plan.cost import records_of
from rdm_jax.runtime import sharding
from rdm_jax.runtime.random_streams import root_key
from rdm_jax.training.metric_buffer import STEPS_IN_FLIGHT
from rdm_jax.training.program import PROGRAMS


class Training:
    """A stage's training on random images, step after step.

    Args:
      config: of the run.
      number: of the stage, from 1.
      classes: of the images.

    Attributes:
      compiling: seconds until the first step had run, with that step.
    """

    def __init__(self, config: configs.Config, number: int, classes: int):
        stage, (shape, cell) = config.stage(number), records_of(config, number)
        mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp)
        make = PROGRAMS[config.parallel.mode]
        self._program = make(stage, shape, classes, root_key(0), mesh, cell=cell)
        self._state = self._program.place(self._program.init(root_key(0)))
        random = np.random.default_rng(0)
        here = stage.training.batch_size // jax.process_count()
        position = np.arange(here, dtype=np.int32) + here * jax.process_index()
        label = random.integers(0, max(1, classes), here, np.int32)
        dtype = self._program.objective.representation.dtype
        image = random.integers(0, 255 * cell**2, (here, *shape), dtype, endpoint=True)
        batch = {
            name: np.zeros((here, *one.shape), one.dtype)
            for name, one in self._program.inputs.items()
        }
        batch |= {"image": image, "label": label, "position": position}
        self._batch = self._program.put(batch)
        self._pending: collections.deque = collections.deque()
        jax.block_until_ready((self._state, self._batch))
        began = time.perf_counter()
        self._program.compile()
        jax.block_until_ready(self.step())
        self.compiling = time.perf_counter() - began

    def step(self) -> dict[str, jax.Array]:
        """Starts a step; a few are in flight at a time, as in training."""
        self._state, values = self._program(self._state, self._batch)
        self._pending.append(values)
        if len(self._pending) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self._pending.popleft())
        return values
