"""The training step: loss, randomness, skipped steps and EMA, independent of devices and
accumulation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdm_jax.checkpoints.profiles import exponent
from rdm_jax.diffusion import dct_error, preconditioning, processes
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.models.adm import ADM
from rdm_jax.models.conditions import ClassLabels
from rdm_jax.models.functional import Network, functional
from rdm_jax.runtime import random_streams, sharding
from rdm_jax.training.count import Count
from rdm_jax.training.step import Objective, ema_weight, init_state, make_step
from tests.support.small_networks import shapes

BATCH, CLASSES, WIDTH = 16, 3, 0.1
OPTIMIZER = optax.adam(3e-3)


@dataclasses.dataclass(frozen=True)
class PoisonedWhereWhite(processes.GaussianProcess):
    """Gaussian noise, but an image whose first value is 1, up to rounding, gets the level NaN."""

    def noised(self, x, level, noise):
        return super().noised(x, jnp.where(x[:, 0, 0, 0] > 0.99, jnp.nan, level), noise)


def objective(dropout: float = 0.0, process=PoisonedWhereWhite(), pool: int = 1) -> Objective:
    adm = ADM(8, (1,), 1, (), head_channels=8, dropout=dropout)
    network = functional(lambda rngs: adm.build(shapes(3, CLASSES), rngs=rngs))
    return Objective(
        network,
        process,
        preconditioning.EDMPreconditioning(),
        pool,
        ClassLabels(CLASSES),
        label_dropout=0.25,
    )


def batch(seed: int = 0, size: int = 8):
    random = np.random.default_rng(seed)
    label = random.integers(0, CLASSES, BATCH).astype(np.int32)
    images = 80 * label[:, None, None, None] + random.integers(
        0, 40, (BATCH, size, size, 3)
    )  # never 255, the poison
    return {
        "image": images.astype(np.uint8),
        "label": label,
        "position": np.arange(BATCH, dtype=np.int32),
    }


def poisoned(data):
    image = data["image"].copy()
    image[5] = 255
    return {**data, "image": image}


@functools.cache
def step_and_state(accumulate: int = 1, dropout: float = 0.0, shared: bool = False):
    """A compiled step that may be traced once, and a state in which every parameter has a
    gradient."""
    goal = objective(dropout)
    chex.clear_trace_counter()  # it counts by the name of the function, which every step shares
    kwargs = {
        "count": Count(BATCH),
        "accumulate": accumulate,
        "ema_halflife": 100.0,
        "ema_rampup": 0.05,
        "averages": (WIDTH,),
    }
    step = make_step(goal, OPTIMIZER, jax.random.key(1), **kwargs)
    state = jax.jit(lambda key: init_state(goal.network.init(key), OPTIMIZER, (WIDTH,)))(
        jax.random.key(0)
    )

    # The last convolutions start at zero; a nudge lets gradients reach all parameters from the
    # first step.
    def nudge(x):
        return np.asarray(x) + 0.05 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    params = jax.device_put(jax.tree.map(nudge, state.params))
    out = sharding.replicated(sharding.local_mesh()) if shared else None
    return jax.jit(chex.assert_max_traces(step, n=1), out_shardings=out), state.replace(
        params=params, ema=params, averages={"average0": params}
    )


def test_step_learns_and_is_traced_once():
    step, state = step_and_state()
    before, losses = state.params, []
    for i in range(60):
        state, metrics = step(state, batch(i % 2))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert int(state.step) == 60 and int(state.skipped) == 0
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.params)
    assert all(jax.tree.leaves(changed))


def test_cascade_learns_from_conditioning():
    """A network that returns its conditioning, at a noise level where the noised image carries no
    information."""
    process = processes.CascadeProcess(p_mean=4.0, p_std=0.0, patch=2, augment_max=0.0)

    def given(params, x, c_noise, labels, augment, keys):
        return params["scale"] * x[..., 3:6]

    goal = Objective(
        Network(None, given, None, None),
        process,
        preconditioning.EDMPreconditioning(),
        1,
        ClassLabels(CLASSES),
        label_dropout=0.25,
    )
    smooth = (
        batch()["image"][:, ::2, ::2].repeat(2, 1).repeat(2, 2)
    )  # the same as its means, enlarged
    data, keys = (
        jax.device_put({**batch(), "image": smooth}),
        jax.random.split(jax.random.key(0), BATCH),
    )
    loss = jax.jit(lambda scale: goal.loss({"scale": scale}, data, keys, dropout=False).mean())
    right = 1 / preconditioning.EDMPreconditioning()(jnp.exp(jnp.full(1, 4.0))).c_out[0]
    assert loss(right) < 0.01 * loss(0.0)


def test_loss_in_the_dct_has_the_weight_of_the_level():
    """Of a network that answers 0, so that the error is known."""
    goal = objective(process=processes.GaussianProcess())
    goal = dataclasses.replace(
        goal, network=Network(None, lambda params, x, *_: jnp.zeros_like(x), None, None)
    )
    data, keys = jax.device_put(batch()), jax.random.split(jax.random.key(0), BATCH)
    in_dct = dataclasses.replace(goal, dct_quality=85).loss({}, data, keys, dropout=False)
    images = Pixels().encode(data["image"])
    process_keys = jax.vmap(lambda key: jax.random.split(key, 4)[0])(keys)
    noised, _ = processes.diffuse(goal.process, images, process_keys)
    c_skip = goal.precondition(noised.sigma).c_skip[:, None, None, None]
    expected = noised.weight * dct_error.squared(c_skip * noised.images - images, quality=85)
    np.testing.assert_allclose(in_dct, expected, rtol=1e-4)
    assert np.abs(in_dct / goal.loss({}, data, keys, dropout=False) - 1).max() > 0.1


@pytest.mark.second
def test_accumulate_uses_all_devices():
    step, state = step_and_state()
    whole = step(state, batch())[
        1
    ]  # before another one is made: traces are counted by the name that all of them share
    in_parts, mesh = step_and_state.__wrapped__(accumulate=2, shared=True)[0], sharding.local_mesh()
    shared = jax.device_put(state, sharding.replicated(mesh)), sharding.put_batch(batch(), mesh)
    compiled = in_parts.lower(*shared).compile()
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()
    chex.assert_trees_all_close(compiled(*shared)[1], whole, rtol=2e-5)


@pytest.mark.second
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulate_matches_whole_batch(accumulate):
    step, state = step_and_state()
    in_parts, _ = step_and_state(accumulate)
    whole, parts = step(state, batch()), in_parts(state, batch())
    # float32 sums in another order; Adam divides each gradient by its own size, so small ones show
    # it most.
    chex.assert_trees_all_close(whole[1], parts[1], rtol=1e-5)
    chex.assert_trees_all_close(whole[0].opt_state[0].mu, parts[0].opt_state[0].mu, atol=1e-6)


@pytest.mark.second  # test_program.py has more meshes
def test_step_on_eight_devices_matches_one():
    assert jax.device_count() == 8
    step, state = step_and_state()
    shared, mesh = step_and_state.__wrapped__(shared=True)[0], sharding.local_mesh()
    here, there = state, jax.device_put(state, sharding.replicated(mesh))
    for i in range(3):
        here, one = step(here, batch(i))
        there, eight = shared(there, sharding.put_batch(batch(i), mesh))
        chex.assert_trees_all_close(one, eight, rtol=2e-5)  # float32 sums in another order
    chex.assert_trees_all_close(
        here.opt_state[0].mu, jax.device_get(there.opt_state[0].mu), atol=1e-5
    )
    assert there.params["stem"]["kernel"].sharding.is_fully_replicated


def test_step_skips_non_finite_gradients():
    step, state = step_and_state()
    state, _ = step(state, batch())
    state = state.replace(averages={"average0": jax.tree.map(jnp.zeros_like, state.ema)})
    after, metrics = step(state, poisoned(batch(1)))
    assert not np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(
        (after.params, after.ema, after.opt_state), (state.params, state.ema, state.opt_state)
    )
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    # To an average it is a step to the same parameters: half of the images seen.
    kept = 0.5 ** (exponent(WIDTH) + 1)
    expected = jax.tree.map(lambda new: (1 - kept) * new, state.params)
    chex.assert_trees_all_close(after.averages["average0"], expected, atol=1e-6)
    good, _ = step(after, batch(2))
    assert (int(good.skipped), int(good.skipped_in_a_row)) == (1, 0)
    assert bool(jnp.any(good.params["stem"]["kernel"] != after.params["stem"]["kernel"]))


@pytest.mark.second
def test_step_randomness_follows_step_index():
    step, state = step_and_state(dropout=0.5)
    first, again = step(state, batch())[1], step(state, batch())[1]
    later = step(state.replace(step=state.step + 1), batch())[1]
    chex.assert_trees_all_equal(first, again)
    assert float(first["loss"]) != float(later["loss"])


def test_loss_is_independent_of_batch():
    goal, data = objective(dropout=0.5), batch()
    keys = random_streams.image_keys(jax.random.key(3), jnp.arange(BATCH))
    params, data = step_and_state()[1].params, jax.device_put(data)
    loss = jax.jit(functools.partial(goal.loss, dropout=True))
    whole, part = (
        loss(params, data, keys),
        loss(params, jax.tree.map(lambda x: x[4:7], data), keys[4:7]),
    )
    chex.assert_trees_all_close(whole[4:7], part, rtol=1e-5)


def test_label_dropout_rate():
    goal, keys = objective(), jax.random.split(jax.random.key(0), 4000)
    labels = goal.condition.encode({"label": jnp.full(4000, 2)})
    labels = goal.condition.drop(labels, keys, goal.label_dropout)
    share = float(jnp.mean(labels.sum(-1) == 0))
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5  # four standard errors
    chex.assert_trees_all_equal(
        labels[labels.sum(-1) > 0][:5], jnp.tile(jnp.array([0.0, 0.0, 1.0]), (5, 1))
    )


@pytest.mark.parametrize(
    ("batch_size", "halflife", "images", "rampup"),
    [
        (64, 50e6, 1e9, 0.0),
        (32, 500e6, 1e9, 0.0),
        (50, 1000.0, 1e6, 0.05),
        (50, 1e9, 2000.0, 0.05),
        (2048, 1e3, 1e9, 0.05),
    ],
)
def test_ema_weight_matches_float64(batch_size, halflife, images, rampup):
    """In the fourth case the half-life is 5 % of the images seen."""
    effective = min(halflife, images * rampup) if rampup else halflife
    weight = jax.jit(
        functools.partial(ema_weight, batch_size=batch_size, halflife=halflife, rampup=rampup)
    )(jnp.float32(images))
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, 1 - np.float64(0.5) ** (batch_size / effective), rtol=1e-6)


def test_ema_weight_halves_in_a_halflife():
    weight = float(ema_weight(jnp.float32(1e6), batch_size=50, halflife=1000.0, rampup=0.05))
    np.testing.assert_allclose((1 - weight) ** (1000 / 50), 0.5, rtol=1e-5)


def test_ema_starts_at_parameters():
    assert float(ema_weight(jnp.float32(0), batch_size=50, halflife=1000.0, rampup=0.05)) == 1
    without_rampup = float(ema_weight(jnp.float32(0), batch_size=50, halflife=1000.0, rampup=0.0))
    np.testing.assert_allclose(without_rampup, 1 - 0.5 ** (50 / 1000), rtol=1e-6)
    step, state = step_and_state()
    after, _ = step(state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema)), batch())
    # XLA computes the update once more for the EMA, and may fuse it in another way: an ulp of
    # the parameters, below 1.
    chex.assert_trees_all_close(after.ema, after.params, rtol=0, atol=2**-24)


def test_ema_update_matches_formula():
    step, state = step_and_state()
    before = state.replace(step=jnp.int32(1000))  # beyond the ramp-up: 16,000 images
    after, _ = step(before, batch())
    decay = 0.5 ** (BATCH / 100.0)
    expected = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, before.ema, after.params
    )
    chex.assert_trees_all_close(after.ema, expected, atol=1e-6)


def test_average_starts_at_parameters_and_follows_the_power_function():
    step, state = step_and_state()
    zeros = {"average0": jax.tree.map(jnp.zeros_like, state.ema)}
    after, _ = step(state.replace(averages=zeros), batch())
    chex.assert_trees_all_close(after.averages["average0"], after.params, rtol=0, atol=2**-24)
    later, _ = step(state.replace(step=jnp.int32(9), averages=zeros), batch())  # the tenth
    weight = 1 - 0.9 ** (exponent(WIDTH) + 1)
    expected = jax.tree.map(lambda new: weight * new, later.params)
    chex.assert_trees_all_close(later.averages["average0"], expected, atol=1e-6)


def test_pixels_encode_scales_and_pools():
    image = (
        jnp.zeros((1, 4, 4, 1), jnp.uint8)
        .at[0, :2, :2, 0]
        .set(jnp.array([[0, 255], [255, 255]], jnp.uint8))
    )
    chex.assert_trees_all_close(
        Pixels().encode(image, 2)[0, :, :, 0], jnp.array([[0.5, -1], [-1, -1]])
    )
