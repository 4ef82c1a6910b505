"""What accompanies the steps of a training, and what is scheduled after one."""

from typing import NamedTuple

from rdm_jax.checkpoints import store
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training import metric_writer
from rdm_jax.training.metric_buffer import Clock, MetricBuffer
from rdm_jax.training.probe import Probe
from rdm_jax.training.snapshots import Snapshots


class Due(NamedTuple):
    """What is scheduled after a step."""

    preview: bool
    evaluation: bool
    checkpoint: bool
    snapshot: bool


class Session(NamedTuple):
    """What accompanies the steps of one call of `Trainer.run`."""

    checkpoints: store.Checkpoints
    snapshots: Snapshots
    stop: StopOnSignal
    probe: Probe | None
    writer: metric_writer.Writer
    buffer: MetricBuffer
    clock: Clock
    curves: metric_writer.Curves
