"""Weights of the loss that are a sigmoid in log SNR."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rdm_jax.diffusion import processes
from rdm_jax.diffusion.blend import BlendProcess
from rdm_jax.diffusion.coupling import CouplingProcess
from rdm_jax.diffusion.linear_path import LinearProcess


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_sigmoid_weight_is_that_of_the_noise(x64, bias):
    """sigmoid(bias - log SNR) of the squared error of the noise (x - D) / sigma."""
    sigma = jnp.asarray([1e-3, 0.02, 0.5, 1.0, 7.0, 80.0])
    log_snr = -2 * np.log(sigma)
    expected = scipy.special.expit(bias - log_snr) / sigma**2
    np.testing.assert_allclose(processes.sigmoid_weight(sigma, bias), expected, rtol=1e-10)
    # What Kingma and Gao, and SiD2, also write for the squared error of the image.
    of_image = np.exp(bias) * scipy.special.expit(log_snr - bias)
    np.testing.assert_allclose(expected, of_image, rtol=1e-10)


@pytest.mark.parametrize(
    "cls",
    [
        processes.GaussianProcess,
        processes.CascadeProcess,
        processes.VPProcess,
        processes.VEProcess,
        processes.RelayProcess,
        LinearProcess,
        CouplingProcess,
        BlendProcess,
    ],
)
def test_sigmoid_weighting_of_every_process(cls):
    sigma = jnp.asarray([0.05, 0.3, 2.0])
    weighted = cls(weighting="sigmoid", weight_bias=1.5)
    np.testing.assert_allclose(
        weighted.weight(sigma), processes.sigmoid_weight(sigma, 1.5), rtol=1e-6
    )
    assert np.abs(cls().weight(sigma) / weighted.weight(sigma) - 1).max() > 0.1
    noise = jnp.zeros((3, 12, 12, 1))
    noised = weighted.noised(noise, jnp.asarray([0.2, 0.5, 0.9]), noise)
    np.testing.assert_allclose(noised.weight, weighted.weight(noised.sigma), rtol=1e-6)
