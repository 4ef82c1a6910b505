"""The optimizer of a stage: Adam or AdamW, the schedule of its learning rate, and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rdm_jax.config import Training
from rdm_jax.training.count import Count


def learning_rate(training: Training) -> optax.Schedule:
    """The learning rate by step, float32: a linear warm-up, then the schedule, both over images."""
    warm = optax.linear_schedule(
        0.0, training.learning_rate, max(1, training.warmup // training.batch_size)
    )
    if training.schedule == "constant":
        return warm

    def rate(step: Any) -> Any:
        images = jnp.asarray(step, jnp.float32) * training.batch_size
        if training.schedule == "inverse_sqrt":
            return warm(step) / jnp.sqrt(jnp.maximum(images / training.decay_from, 1.0))
        left = 1 - jnp.minimum(images / training.images, 1.0)
        return warm(step) * (1 - jnp.cos(jnp.pi * left)) / 2

    return rate


def build_optimizer(training: Training, count: Count) -> optax.GradientTransformation:
    """Its steps count images, also across changes of the batch size.

    The state is Adam's alone for all settings, so that a run may change them.
    """
    rate = learning_rate(training)
    # Adam counts steps; images shown at another batch size count as `ahead` more of them.
    ahead = count.images // count.batch_size - count.step
    schedule = (lambda step: rate(step + ahead)) if ahead else rate
    adam = optax.adam(schedule, b1=training.beta1, b2=training.beta2, eps=training.epsilon)
    clip = optax.clip_by_global_norm(training.clip_norm) if training.clip_norm else None
    if clip is None and not training.weight_decay:
        return adam

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if clip is not None:
            grads, _ = clip.update(grads, clip.init(params))
        updates, new_state = adam.update(grads, state, params)
        if training.weight_decay:
            factor = schedule(state[0].count) * training.weight_decay
            updates = jax.tree.map(
                lambda u, p, decays: u - factor * p if decays else u,
                updates,
                params,
                are_kernels(params),
            )
        return updates, new_state

    return optax.GradientTransformation(adam.init, update)


def are_kernels(params: Any) -> Any:
    """Which parameters are kernels: a tree of bool."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
