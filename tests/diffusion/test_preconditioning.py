import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import preconditioning, schedules
from tests.support.precision import enable_x64

SIGMAS = [0.002, 0.1, 0.5, 3.0, 80.0]


def simulate(sigma, sigma_data, n=20_000):
    """Network inputs and targets in float64, for data and noise of the assumed variances."""
    rng = np.random.default_rng(0)
    data, noise = sigma_data * rng.standard_normal(n), sigma * rng.standard_normal(n)
    coefficients = preconditioning.EDMPreconditioning(sigma_data=sigma_data)(
        jnp.full(1, sigma, jnp.float32)
    )
    c_skip, c_out, c_in, _ = (float(c[0]) for c in coefficients)
    return c_in * (data + noise), (data - c_skip * (data + noise)) / c_out


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_edm_input_and_target_have_unit_variance(sigma, sigma_data):
    network_input, target = simulate(sigma, sigma_data)
    # 5 standard errors of a variance and of a correlation; c_skip is known to 6e-8 and the target
    # divides it by c_out >= 0.002.
    bound = 5 * np.sqrt(2 / len(target)) + 1e-4
    assert abs(np.var(network_input) - 1) < bound
    assert abs(np.var(target) - 1) < bound
    # c_skip is the one that leaves the network nothing to learn from its input's scale alone.
    assert abs(np.corrcoef(network_input, target)[0, 1]) < 5 / np.sqrt(len(target)) + 1e-4


@pytest.mark.parametrize("noise_scale", [0.25, 4.0])
def test_edm_noise_label_is_scaled_logarithm(noise_scale):
    c_noise = preconditioning.EDMPreconditioning(noise_scale=noise_scale)(
        jnp.asarray(SIGMAS)
    ).c_noise
    chex.assert_trees_all_close(
        np.asarray(c_noise), noise_scale * np.log(np.float32(SIGMAS)), rtol=1e-6
    )


def record_into(calls):
    def network(x, c_noise):
        calls.append((x, c_noise))
        return jnp.cos(x)

    return network


def test_denoiser_matches_equation():
    x, sigma = jax.random.normal(jax.random.key(0), (3, 4, 2, 1)), jnp.asarray([0.01, 0.5, 20.0])
    calls = []
    out = preconditioning.denoiser(record_into(calls), preconditioning.EDMPreconditioning())(
        x, sigma
    )
    ((network_input, c_noise),) = calls
    x, s = np.asarray(x, np.float64), np.asarray(sigma, np.float64)[:, None, None, None]
    expected_input = x / np.sqrt(s**2 + 0.25)
    expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / np.sqrt(s**2 + 0.25) * np.cos(expected_input)
    # A few float32 roundings of numbers below 10.
    chex.assert_trees_all_close(np.asarray(network_input, np.float64), expected_input, atol=1e-5)
    chex.assert_trees_all_close(np.asarray(c_noise, np.float64), np.log(s.ravel()) / 4, rtol=1e-6)
    chex.assert_trees_all_close(np.asarray(out, np.float64), expected, atol=1e-5)


def test_denoiser_broadcasts_level():
    x = jax.random.normal(jax.random.key(0), (3, 4, 2, 1))
    denoise = preconditioning.denoiser(record_into([]), preconditioning.EDMPreconditioning())
    chex.assert_trees_all_equal(denoise(x, jnp.asarray(0.7)), denoise(x, jnp.full(3, 0.7)))


def test_denoiser_without_noise_is_identity():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    denoise = preconditioning.denoiser(record_into([]), preconditioning.EDMPreconditioning())
    change = [
        float(jnp.max(jnp.abs(denoise(x, jnp.asarray(sigma)) - x))) for sigma in (1e-3, 1e-4, 1e-30)
    ]
    # |D - x| <= c_out |F| + (1 - c_skip) |x| <= sigma + 4 sigma^2 |x|, to first order sigma.
    assert 0.9e-3 < change[0] < 1.1e-3
    assert 0.9e-4 < change[1] < 1.1e-4
    assert change[2] == 0


def test_denoiser_keeps_image_dtype():
    calls = []

    def network(x, c_noise):
        calls.append((x.dtype, c_noise.dtype))
        return x.astype(jnp.bfloat16)

    out = preconditioning.denoiser(network, preconditioning.EDMPreconditioning())(
        jnp.ones((2, 4, 4, 1)), jnp.asarray(0.5)
    )
    assert out.dtype == jnp.float32
    assert calls == [(jnp.float32, jnp.float32)]
    with enable_x64(True):
        out = preconditioning.denoiser(network, preconditioning.EDMPreconditioning())(
            jnp.ones((2, 4, 4, 1), jnp.float64), jnp.float32(0.5)
        )
        assert out.dtype == jnp.float64
    assert calls[1] == (jnp.float64, jnp.float64)


VP, VE, IDDPM = (
    preconditioning.VPPreconditioning(),
    preconditioning.VEPreconditioning(),
    preconditioning.IDDPMPreconditioning(),
)
IDDPM_LEVELS = schedules.iddpm_levels(1000, c1=0.001, c2=0.008)
others = pytest.mark.parametrize(
    ("precondition", "sign"), [(VP, 1), (VE, -1), (IDDPM, 1)], ids=["vp", "ve", "iddpm"]
)
every_kind = pytest.mark.parametrize(
    "precondition",
    [preconditioning.EDMPreconditioning(), VP, VE, IDDPM],
    ids=["edm", "vp", "ve", "iddpm"],
)


@others
def test_vp_ve_iddpm_predict_unit_noise(precondition, sign):
    """A network that returns the unit noise (VE: its negative) yields the clean image at every
    level."""
    sigma = jnp.asarray(SIGMAS)
    data, noise = (jax.random.normal(jax.random.key(i), (5, 4, 4, 2)) for i in range(2))
    outputs = jnp.concatenate([sign * noise] * precondition.outputs, axis=-1)
    out = preconditioning.denoiser(lambda x, c_noise: outputs, precondition)(
        data + sigma[:, None, None, None] * noise, sigma
    )
    # Numbers up to 300 in float32.
    chex.assert_trees_all_close(out, data, atol=5e-5)


@others
def test_vp_ve_iddpm_coefficients(precondition, sign):
    """VP and iDDPM scale their input to unit variance if the data has unit variance; VE passes data
    plus noise unchanged."""
    rng, n = np.random.default_rng(0), 20_000
    for sigma in SIGMAS:
        data, noise = rng.standard_normal((2, n))
        c_skip, c_out, c_in, _ = (float(c[0]) for c in precondition(jnp.full(1, sigma)))
        expected = 1 if sign > 0 else 1 + sigma**2
        assert abs(np.var(c_in * (data + sigma * noise)) / expected - 1) < 5 * np.sqrt(
            2 / n
        )  # 5 standard errors
        # EDM, table 1
        assert (c_skip, c_out) == (1, -sign * np.float32(sigma))
        assert c_in == pytest.approx(1 / np.sqrt(sigma**2 + 1) if sign > 0 else 1, rel=1e-6)


def test_vp_noise_label_is_step_index():
    t = np.geomspace(1e-5, 1.0, 50)
    c_noise = VP(schedules.Linear().sigma(jnp.float32(t))).c_noise
    chex.assert_trees_all_close(
        np.asarray(c_noise, np.float64), 999 * t, rtol=2e-6
    )  # as the schedule's round trip


def test_ve_noise_label_is_log_of_half_sigma():
    chex.assert_trees_all_close(
        np.asarray(VE(jnp.asarray(SIGMAS)).c_noise), np.log(np.float32(SIGMAS) / 2), rtol=1e-6
    )


def test_range_of_levels():
    assert preconditioning.EDMPreconditioning().range == (0.0, np.inf)
    assert VP.range == pytest.approx((1e-3, np.sqrt(np.exp(10.05) - 1)), rel=1e-3)
    assert VE.range == (0.02, 100.0)
    assert IDDPM.range == (IDDPM_LEVELS[-2], IDDPM_LEVELS[0])
    # The least level is that of the first step alone, the greatest that of a noise of variance 1 -
    # c1 at the end.
    assert IDDPM.range[0] == pytest.approx(
        np.sqrt(np.cos(np.pi / 2 * 8 / 1008) ** 2 / np.cos(np.pi / 2 * 9 / 1008) ** 2 - 1)
    )


def test_iddpm_rounds_to_nearest_level():
    low, high = IDDPM.range
    sigma = np.float32(
        np.exp(np.random.default_rng(0).uniform(np.log(low), np.log(2 * high), 500))
    ).astype(np.float64)
    rounded = np.asarray(IDDPM.round(jnp.float32(sigma)), np.float64)
    # Where two are equally near in float32, either is right.
    excess = np.abs(rounded - sigma) - np.min(np.abs(sigma[:, None] - IDDPM_LEVELS), axis=1)
    assert np.all(np.abs(excess) < 2e-7 * sigma)
    assert np.isin(rounded, IDDPM_LEVELS.astype(np.float32)).all()
    assert np.any(np.abs(rounded / sigma - 1) > 1e-3)


def test_iddpm_noise_label_is_training_step():
    c_noise = np.asarray(IDDPM(jnp.float32(IDDPM_LEVELS[:-1])).c_noise)
    np.testing.assert_array_equal(
        c_noise, np.arange(999, -1, -1)
    )  # u_0, the noisiest, is step M - 1
    low, high = IDDPM.range
    anywhere = np.asarray(IDDPM(jnp.geomspace(low, high, 300)).c_noise)
    assert anywhere.dtype == np.float32
    assert (anywhere.min(), anywhere.max()) == (0, 999) and np.all(np.diff(anywhere) >= 0)
    # Any other level is labelled as the nearest of its own, but scaled by itself.
    between = (IDDPM_LEVELS[400:401] * 3 + IDDPM_LEVELS[401:402]) / 4
    c = IDDPM(jnp.float32(between))
    assert float(c.c_noise[0]) == 599
    assert float(c.c_in[0]) == pytest.approx(1 / np.sqrt(between[0] ** 2 + 1), rel=1e-6)


@every_kind
def test_round_is_idempotent(precondition):
    low, high = precondition.range
    sigma = jnp.geomspace(max(low, 1e-3), min(high, 1e3), 200)
    rounded = precondition.round(sigma)
    chex.assert_trees_all_equal(precondition.round(rounded), rounded)
    if not isinstance(
        precondition, preconditioning.IDDPMPreconditioning
    ):  # which alone knows a finite number of levels
        chex.assert_trees_all_equal(rounded, sigma)


def test_denoiser_uses_first_of_two_outputs():
    x, sigma = jax.random.normal(jax.random.key(0), (3, 4, 2, 2)), jnp.asarray([0.01, 0.5, 20.0])

    def both(x, c_noise):
        return jnp.concatenate([jnp.cos(x), jnp.full_like(x, jnp.nan)], axis=-1)

    out = preconditioning.denoiser(both, IDDPM)(x, sigma)
    chex.assert_trees_all_equal(
        out, preconditioning.denoiser(lambda x, c_noise: jnp.cos(x), IDDPM)(x, sigma)
    )
    chex.assert_shape(out, x.shape)


@every_kind
def test_denoiser_is_traced_once(precondition):
    chex.clear_trace_counter()  # the counter knows a function by its source, which all cases share
    denoise = preconditioning.denoiser(
        lambda x, c_noise: x * c_noise[:, None, None, None], precondition
    )
    compiled = jax.jit(chex.assert_max_traces(n=1)(denoise))
    for sigma in SIGMAS:
        chex.assert_shape(compiled(jnp.ones((2, 4, 4, 1)), jnp.float32(sigma)), (2, 4, 4, 1))
