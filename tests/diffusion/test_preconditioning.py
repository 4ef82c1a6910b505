import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import preconditioning

SIGMAS = [0.002, 0.1, 0.5, 3.0, 80.0]


def simulate(sigma, sigma_data, n=20_000):
    """What the network is given and what it should return, in float64, for data and noise of the assumed variances."""
    rng = np.random.default_rng(0)
    data, noise = sigma_data * rng.standard_normal(n), sigma * rng.standard_normal(n)
    coefficients = preconditioning.EDM(sigma_data=sigma_data)(jnp.full(1, sigma, jnp.float32))
    c_skip, c_out, c_in, _ = (float(c[0]) for c in coefficients)
    return c_in * (data + noise), (data - c_skip * (data + noise)) / c_out


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_networks_input_and_target_have_unit_variance(sigma, sigma_data):
    network_input, target = simulate(sigma, sigma_data)
    # 5 standard errors of a variance and of a correlation; c_skip is known to 6e-8 and the target divides it by c_out >= 0.002.
    bound = 5 * np.sqrt(2 / len(target)) + 1e-4
    assert abs(np.var(network_input) - 1) < bound
    assert abs(np.var(target) - 1) < bound
    # c_skip is the one that leaves the network nothing to learn from its input's scale alone.
    assert abs(np.corrcoef(network_input, target)[0, 1]) < 5 / np.sqrt(len(target)) + 1e-4


@pytest.mark.parametrize("noise_scale", [0.25, 4.0])
def test_the_noise_label_is_a_scaled_logarithm(noise_scale):
    c_noise = preconditioning.EDM(noise_scale=noise_scale)(jnp.asarray(SIGMAS)).c_noise
    chex.assert_trees_all_close(np.asarray(c_noise), noise_scale * np.log(np.float32(SIGMAS)), rtol=1e-6)


def record_into(calls):
    def network(x, c_noise):
        calls.append((x, c_noise))
        return jnp.cos(x)

    return network


def test_denoiser_is_its_equation():
    x, sigma = jax.random.normal(jax.random.key(0), (3, 4, 2, 1)), jnp.asarray([0.01, 0.5, 20.0])
    calls = []
    out = preconditioning.denoiser(record_into(calls), preconditioning.EDM())(x, sigma)
    ((network_input, c_noise),) = calls
    x, s = np.asarray(x, np.float64), np.asarray(sigma, np.float64)[:, None, None, None]
    expected_input = x / np.sqrt(s**2 + 0.25)
    expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / np.sqrt(s**2 + 0.25) * np.cos(expected_input)
    # A few float32 roundings of numbers below 10.
    chex.assert_trees_all_close(np.asarray(network_input, np.float64), expected_input, atol=1e-5)
    chex.assert_trees_all_close(np.asarray(c_noise, np.float64), np.log(s.ravel()) / 4, rtol=1e-6)
    chex.assert_trees_all_close(np.asarray(out, np.float64), expected, atol=1e-5)


def test_denoiser_takes_one_level_for_all_images():
    x = jax.random.normal(jax.random.key(0), (3, 4, 2, 1))
    denoise = preconditioning.denoiser(record_into([]), preconditioning.EDM())
    chex.assert_trees_all_equal(denoise(x, jnp.asarray(0.7)), denoise(x, jnp.full(3, 0.7)))


def test_denoiser_changes_nothing_where_there_is_no_noise():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    denoise = preconditioning.denoiser(record_into([]), preconditioning.EDM())
    change = [float(jnp.max(jnp.abs(denoise(x, jnp.asarray(sigma)) - x))) for sigma in (1e-3, 1e-4, 1e-30)]
    # |D - x| <= c_out |F| + (1 - c_skip) |x| <= sigma + 4 sigma^2 |x|, to first order sigma.
    assert 0.9e-3 < change[0] < 1.1e-3
    assert 0.9e-4 < change[1] < 1.1e-4
    assert change[2] == 0


def test_denoiser_computes_in_the_dtype_of_its_images():
    calls = []

    def network(x, c_noise):
        calls.append((x.dtype, c_noise.dtype))
        return x.astype(jnp.bfloat16)

    out = preconditioning.denoiser(network, preconditioning.EDM())(jnp.ones((2, 4, 4, 1)), jnp.asarray(0.5))
    assert out.dtype == jnp.float32
    assert calls == [(jnp.float32, jnp.float32)]
    with jax.enable_x64(True):
        out = preconditioning.denoiser(network, preconditioning.EDM())(jnp.ones((2, 4, 4, 1), jnp.float64), jnp.float32(0.5))
        assert out.dtype == jnp.float64
    assert calls[1] == (jnp.float64, jnp.float64)


def test_one_trace():
    denoise = preconditioning.denoiser(lambda x, c_noise: x * c_noise[:, None, None, None], preconditioning.EDM())
    compiled = jax.jit(chex.assert_max_traces(n=1)(denoise))
    for sigma in SIGMAS:
        chex.assert_shape(compiled(jnp.ones((2, 4, 4, 1)), jnp.float32(sigma)), (2, 4, 4, 1))
