"""Our transformer, its loss and its sampler against JiT's published PyTorch code.

As in `test_reference`: the cases hold all their parameters, and `RDM_REFERENCE_DIR` names a folder
of others.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import guidance, linear_path, preconditioning, schedules
from rdm_jax.diffusion.walks import scanned_walk, walk
from rdm_jax.interop import jit_names
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.conditions import ClassLabels
from rdm_jax.models.functional import functional
from rdm_jax.models.positions import sine_cosine
from rdm_jax.models.transformer import JiT
from tests.support.precision import enable_x64
from tests.support.reference import cases, draw_parameter, load

TOLERANCE = {"float64": 1e-9, "float32": 5e-5}


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def check(ours, theirs, dtype):
    assert ours.dtype == dtype
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs))
    assert error <= TOLERANCE[dtype.name], error


def toy(z, time, y, classes):
    """The network that the original's numbers were computed with."""
    time, y = (a[:, None, None, None].astype(z.dtype) for a in (time, y))
    shifted = 0.1 * jnp.roll(z, 1, 2) * (1 - time)
    return jnp.tanh(z) * (0.2 + 0.7 * time) + shifted + 0.05 * jnp.cos(z) * y / classes


def toy_denoiser(meta):
    """D(x, sigma, condition) of the toy, for one-hot conditions."""
    classes = int(meta["classes"])
    precondition = preconditioning.XPreconditioning(schedules.Path(meta["noise_scale"]))

    def denoise(x, sigma, condition):
        y = condition @ jnp.arange(classes) + classes * (1 - condition.sum(1))  # null: `classes`
        network = functools.partial(toy, y=y, classes=classes)
        return preconditioning.denoiser(lambda z, time: network(z, time), precondition)(x, sigma)

    return denoise


def one_hot(case, meta, dtype):
    return jax.nn.one_hot(case["labels"], int(meta["classes"]), dtype=dtype)


@cases("jit_loss")
def test_jit_reference_loss(path, dtype):
    meta, case = load(path)
    process = linear_path.LinearProcess(
        schedules.Path(meta["noise_scale"]), meta["P_mean"], meta["P_std"], meta["t_eps"]
    )
    images, noise, draw = (jnp.asarray(case[k], dtype) for k in ("images", "noise", "draw_time"))
    noised = process.noised(images, draw, noise)
    denoise = toy_denoiser(meta)
    denoised = denoise(noised.images, noised.sigma, one_hot(case, meta, dtype))
    loss = noised.weight * ((denoised - images) ** 2).mean((1, 2, 3))
    check(loss, case["loss"], dtype)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@cases("jit_sampler")
def test_jit_reference_sampler(path, dtype, scan):
    meta, case = load(path)
    linear = schedules.Path(meta["noise_scale"])
    process = linear_path.LinearProcess(linear, t_eps=meta["t_eps"])
    order = {"euler": 1, "heun": 2}[meta["method"]]
    sampler = linear_path.LinearHeun(int(meta["steps"]), meta["t_eps"], order)
    low, high = meta["interval"]
    low_sigma, high_sigma = (  # of the interval of times, of noise levels
        float(linear.sigma(jnp.asarray(time))) if time else math.inf for time in (high, low)
    )
    interval = (low_sigma, high_sigma)
    null = ClassLabels(int(meta["classes"])).null
    guided = guidance.ClassifierFree(meta["cfg"], interval).transform(toy_denoiser(meta), null)
    condition = one_hot(case, meta, dtype)

    def denoise(x, sigma):
        return guided(x, sigma, condition)

    def step(denoise, x, i, level, to):
        return sampler.step(denoise, x, i, level, to, noise)

    def finish(denoise, x, i, level):
        return sampler.finish(denoise, x, i, level, noise)

    def noise(k):
        return jnp.asarray(case["noise"], dtype)

    levels = sampler.levels(process)
    x = sampler.start(None, jax.tree.map(lambda a: a[0], levels), noise)
    if scan:
        out = scanned_walk(step, finish, denoise, x, levels)
    else:
        out = walk(*(functools.partial(f, denoise) for f in (step, finish)), x, levels)
    check(out, case["out"], dtype)


def config_of(original):
    return JiT(
        patch=original["patch_size"],
        hidden=original["hidden_size"],
        depth=original["depth"],
        heads=original["num_heads"],
        bottleneck=original["bottleneck_dim"],
        class_tokens=original["in_context_len"],
        class_tokens_from=original["in_context_start"],
        mlp_ratio=original["mlp_ratio"],
    )


@cases("jit_network")
def test_jit_reference_network(path):
    meta, case = load(path)
    classes, channels = meta["config"]["num_classes"], meta["config"]["in_channels"]
    config, condition = config_of(meta["config"]), ClassLabels(classes)
    config.check("network")
    network = functional(
        lambda rngs: config.build(Shapes(channels, channels, condition.spec), rngs=rngs)
    )
    theirs = {}
    for name, shape, total in zip(
        case["param_names"].tolist(),
        json.loads(str(case["param_shapes"])),
        case["param_abs_sums"],
        strict=True,
    ):
        theirs[name] = draw_parameter(name, shape, meta["seed"])
        np.testing.assert_allclose(np.abs(theirs[name]).sum(dtype=np.float64), total, rtol=1e-6)

    def name_of(keys) -> str:
        return jit_names.original_name(tuple(key.key for key in keys))

    leaves = jax.tree_util.tree_flatten_with_path(network.abstract)[0]
    assert sorted(name_of(keys) for keys, _ in leaves) == sorted(theirs)

    def ours(keys, leaf):
        name = name_of(keys)
        array = jit_names.to_ours(name, theirs[name])
        assert array.shape == leaf.shape, name
        np.testing.assert_array_equal(
            jit_names.to_theirs(name, array, config.patch), theirs[name], strict=True
        )
        return jnp.asarray(array)

    params = jax.tree.map_with_path(ours, network.abstract)
    labels = jnp.asarray(case["labels"])
    labels = condition.encode({"label": jnp.where(labels == classes, -1, labels)})
    x, time, target = (jnp.asarray(case[k]) for k in ("x", "t", "target"))

    def loss(params):
        y = network.apply(params, x, time, labels)
        return ((y - target) ** 2).mean(), y

    (value, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(y, case["y"], atol=2e-5 * np.abs(case["y"]).max(), rtol=0)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-4)
    norms = {
        name_of(keys): np.linalg.norm(np.asarray(leaf, np.float64))
        for keys, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]
    }
    assert sorted(case["grad_names"].tolist()) == sorted(norms)
    for name, norm in zip(case["grad_names"].tolist(), case["grad_norms"], strict=True):
        np.testing.assert_allclose(norms[name], norm, rtol=1e-4, err_msg=name)
    height, width = (side // config.patch for side in x.shape[1:3])
    np.testing.assert_allclose(
        sine_cosine(height, width, config.hidden), case["pos_embed"], atol=1e-6
    )
