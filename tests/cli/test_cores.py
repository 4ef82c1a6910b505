"""How many virtual CPU devices a run gets, and that it gets them."""

import json
import os
import subprocess
import sys

import jax
import pytest

from rdm_jax import config as configs
from rdm_jax import load_config
from rdm_jax.cli.cores import LEAST_IMAGES, use_cores
from rdm_jax.cli.cores import number_of_devices as number
from rdm_jax.models.conditions import Text
from tests.support.commands import environment
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="earlier versions of JAX get one device"
)


@pytest.fixture(scope="module")
def digits():
    return configs.parse(load_config("digits"))


def test_every_batch_is_shared_evenly(digits):
    assert [number(digits, cores) for cores in (1, 2, 3, 4)] == [1, 2, 2, 4]
    assert number(digits.with_stage(1, training={"batch_size": 60}), 8) == 4
    assert number(digits.with_stage(2, training={"accumulate": 4}), 8) == 2
    assert number(digits.with_stage(2, training={"batch_size": 27}), 2) == 1


def test_a_device_gets_enough_images(digits):
    assert number(digits, 64) == 64 // LEAST_IMAGES
    assert number(digits.with_stage(1, training={"batch_size": 2 * LEAST_IMAGES - 2}), 2) == 1


def test_large_networks_get_one_device():
    assert number(configs.parse(load_config("imagenet")), 16) == 1


def test_networks_that_need_classes_get_devices(digits):
    """Their number is known once the data is open."""
    assert number(digits.with_stage(1, condition=Text(classes=True)), 2) == 2


def test_a_given_mesh_keeps_its_device(digits):
    parallel = configs.Parallel(data=1, fsdp=1)
    assert number(configs.Config(**{**vars(digits), "parallel": parallel}), 2) == 1


def test_an_invalid_config_is_left_to_the_run(digits):
    for wrong in ({"channels": 33}, {"channels": 0}):
        assert number(digits.with_stage(1, network=wrong), 2) == 1


def test_a_given_number_of_devices_is_kept(digits):
    before = os.environ["XLA_FLAGS"]
    use_cores(digits, 2)
    assert jax.local_device_count() == 8 and os.environ["XLA_FLAGS"] == before


SCRIPT = """
import json, os
from rdm_jax import config, load_config
from rdm_jax.cli.cores import use_cores
use_cores(config.parse(load_config("digits")), 2)
import jax
print(json.dumps([jax.local_device_count(), os.environ.get("XLA_FLAGS", "")]))
"""


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, 2),
        pytest.param({"JAX_NUM_CPU_DEVICES": "1"}, 1, marks=pytest.mark.second),
        pytest.param(
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3, marks=pytest.mark.second
        ),
    ],
)
def test_a_process_gets_its_devices(variables, devices):
    clean = environment()
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        del clean[name]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    count, flags = json.loads(result.stdout.splitlines()[-1])
    assert count == devices
    # Devices of a stopped process wait for each other without end.
    assert ("collective_call_terminate_timeout" in flags) == (not variables)
