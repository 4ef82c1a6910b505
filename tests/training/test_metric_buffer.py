"""The rates that the log shows: steps alone, and with what comes between them."""

import types

import jax.numpy as jnp
from tqdm import tqdm

from rdm_jax.config import Training
from rdm_jax.training import metric_buffer
from rdm_jax.training.count import Count
from rdm_jax.training.metric_writer import NoWriter


def test_pauses_are_in_the_second_rate_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metric_buffer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    training = Training(batch_size=8)
    buffer = metric_buffer.MetricBuffer(training, Count(8), NoWriter(), tqdm(disable=True))
    zero = jnp.zeros((), jnp.int32)
    values = {"loss": jnp.zeros(()), "grad_norm": jnp.zeros(()), "skipped_in_a_row": zero}
    for step in range(1, 6):
        buffer.add(step, values)
        now[0] += 1  # a second per step
    with buffer.paused():
        now[0] += 15  # a checkpoint
    assert buffer.rates() == "8 images/s (2 with checkpoints and evaluations)"
