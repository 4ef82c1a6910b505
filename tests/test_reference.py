"""Our numbers against the published PyTorch implementation's.

The cases are files `KIND-NN.npz`, computed once with the original; each holds its parameters in `meta`, so another folder of
cases runs through the same tests: `RDM_REFERENCE_DIR=/path pytest -k reference`. Errors are relative to the largest magnitude.
"""

import json
import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rdm_jax.diffusion import blurring, guidance, preconditioning, processes, samplers, schedules
from rdm_jax.models.adm import ADM

FOLDER = pathlib.Path(os.environ.get("RDM_REFERENCE_DIR", pathlib.Path(__file__).parent / "reference_cases"))
WHOLE = {"seed", "patch", "block", "up_scale", "num_steps", "num_noise_draws"}  # all other numbers in a case's meta are real
# The original computes the DCT's frequencies in float32 even where the rest is float64.
EXACT, HALF_EXACT, FLOAT32 = 1e-9, 1e-6, 5e-5


def cases(kind: str, **wanted):
    """Parameters for `pytest.mark.parametrize`: every file of a kind whose meta agrees with `wanted`; none is an error."""
    found = []
    for path in sorted(FOLDER.glob(f"{kind}-*.npz")):
        meta = json.loads(str(np.load(path)["meta"]))
        if all(meta.get(k) == v for k, v in wanted.items()):
            found.append(pytest.param(path, id=path.stem))
    return pytest.mark.parametrize("path", found or [pytest.param(None, id=f"no-{kind}-case-found")])


def load(path):
    assert path is not None, f"no case of this kind in {FOLDER}"
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    return {k: float(v) if type(v) is int and k not in WHOLE else v for k, v in meta.items()}, arrays


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def check(ours, theirs, dtype, tolerance):
    """Compares, relative to the largest magnitude: within `tolerance` as float64, within FLOAT32 as float32."""
    assert ours.dtype == dtype
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs))
    assert error <= (tolerance if dtype == jnp.float64 else FLOAT32), error


def toy(x, sigma, labels=None):
    """The denoiser that the original's numbers were computed with."""
    sigma = jnp.broadcast_to(sigma, x.shape[:1])[:, None, None, None].astype(x.dtype)
    out = jnp.tanh(x) * 0.25 / (0.25 + sigma**2) + 0.1 * jnp.roll(x, 1, 2) / (1 + sigma)
    return out if labels is None else out + 0.05 * labels.sum(-1)[:, None, None, None] * jnp.cos(x)


@cases("dct")
def test_reference_dct(path, dtype):
    meta, case = load(path)
    x = jnp.asarray(case["x"], dtype)
    check(blurring.patch_dct(x, patch=meta["patch"]), case["dct"], dtype, EXACT)
    check(blurring.patch_idct(x, patch=meta["patch"]), case["idct"], dtype, EXACT)


@cases("blur")
def test_reference_blur(path, dtype):
    meta, case = load(path)
    x, sigma = jnp.asarray(case["x"], dtype), jnp.asarray(case["blur_sigma"], dtype)
    check(blurring.blur(x, sigma, patch=meta["patch"], min_scale=meta["min_scale"]), case["out"], dtype, HALF_EXACT)


@cases("block_noise")
def test_reference_block_noise(path, dtype):
    meta, case = load(path)
    check(blurring.block_noise(jnp.asarray(case["white"], dtype), block=meta["block"]), case["out"], dtype, EXACT)


def relay_process(meta, **kwargs):
    clock = schedules.Clock(meta["prob_length"], meta["blur_sigma_max"], meta["P_mean"], meta["P_std"])
    return processes.Relay(clock=clock, min_scale=meta["min_scale"], **kwargs)


@cases("blur_weights")
def test_reference_blur_weights(path, dtype):
    meta, case = load(path)
    process = relay_process(meta, patch=meta["patch"])
    check(process.blur_weights(process.clock.time(jnp.asarray(case["sigma"], dtype))), case["out"], dtype, HALF_EXACT)


@cases("loss", loss="edm")
def test_reference_edm_loss(path, dtype):
    meta, case = load(path)
    process = processes.Gaussian(meta["P_mean"], meta["P_std"], meta["sigma_data"])
    check_loss(process, case, jnp.asarray(case["white"], dtype), dtype, EXACT)


@cases("loss", loss="relay")
def test_reference_relay_loss(path, dtype):
    meta, case = load(path)
    process = relay_process(
        meta,
        patch=meta["up_scale"],
        block_scale=meta["block_scale"],
        sigma_data=meta["sigma_data"],
        sigma_floor=meta["truncate_sigma"],
        max_weight=meta["max_weight"],
    )
    block_white = jnp.asarray(case["block_white"], dtype) if meta["block_scale"] else None
    check_loss(process, case, process.mixture(jnp.asarray(case["white"], dtype), block_white), dtype, HALF_EXACT)


def check_loss(process, case, noise, dtype, tolerance):
    images = jnp.asarray(case["images"], dtype)
    # The original draws the level in float32, and goes on in float64 only where its own sigma is float64.
    level = jnp.asarray(case["draw_time"], min(dtype, case["sigma"].dtype))
    noised = process.noised(images, level, noise)
    loss = noised.weight[:, None, None, None] * (toy(noised.images, noised.sigma) - images) ** 2
    check(noised.images, case["net_input"], dtype, tolerance)
    check(noised.sigma, case["sigma"], level.dtype, tolerance)
    check(loss, case["loss"], dtype, tolerance)


def white(meta, shape, dtype):
    """The white arrays that the original's sampler drew, in order."""
    draws = [np.random.default_rng([meta["seed"], k]).standard_normal(shape) for k in range(meta["num_noise_draws"])]
    return jnp.asarray(np.stack(draws), dtype)


def toy_denoiser(meta, case, dtype):
    if "labels" not in case:
        return toy
    return guidance.classifier_free(toy, jnp.asarray(case["labels"], dtype), meta.get("cfg_scale", 1.0))


def run_sampler(sampler, denoise, x, levels, noise, scan):
    step = lambda x, i, level, to: sampler.step(denoise, x, i, level, to, noise)  # noqa: E731
    finish = lambda x, i, level: sampler.finish(denoise, x, i, level, noise)  # noqa: E731
    return samplers.walk(step, finish, x, levels, scan=scan)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@cases("sampler", family="edm")
def test_reference_edm_sampler(path, dtype, scan):
    meta, case = load(path)
    sampler = samplers.Heun(
        steps=meta["num_steps"],
        sigma_min=meta["sigma_min"],
        sigma_max=meta["sigma_max"],
        rho=meta["rho"],
        churn=meta["S_churn"],
        churn_min=meta["S_min"],
        churn_max=meta["S_max"],
        churn_noise=meta["S_noise"],
    )
    levels = sampler.levels(processes.Gaussian())
    draws = jnp.concatenate([jnp.asarray(case["init"], dtype)[None], white(meta, case["init"].shape, dtype)])
    x = sampler.start(None, samplers.Levels(levels.sigma[0]), lambda k: draws[k])
    out = run_sampler(sampler, toy_denoiser(meta, case, dtype), x, levels, lambda k: draws[k], scan)
    check(out, case["out"], dtype, EXACT)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@cases("sampler", family="relay")
def test_reference_relay_sampler(path, dtype, scan):
    meta, case = load(path)
    clock = schedules.Clock(length=1.0, blur_sigma_max=meta["blur_sigma_max"])
    process = processes.Relay(meta["up_scale"], clock, block_scale=meta["s_block"])
    sampler = samplers.RelayHeun(
        steps=meta["num_steps"],
        sigma_min=meta["sigma_min"],
        sigma_max=meta["sigma_max"],
        rho=meta["rho"],
        truncation_sigma=meta["truncation_sigma"],
        truncation_time=meta["truncation_t"],
        eta=meta["s_noise"],
    )
    levels = sampler.levels(process)
    draws = white(meta, case["init"].shape, dtype)
    mixtures = jax.vmap(process.mixture)(draws[::2], draws[1::2]) if meta["s_block"] else draws
    assert len(mixtures) == 2 * len(levels.sigma) - 1  # one at the start, two a step: we walk as many levels as the original
    x = sampler.start(jnp.asarray(case["low"], dtype), jax.tree.map(lambda a: a[0], levels), lambda k: mixtures[k])
    out = run_sampler(sampler, toy_denoiser(meta, case, dtype), x, levels, lambda k: mixtures[k], scan)
    check(out, case["out"], dtype, HALF_EXACT)


def draw_parameter(name, shape, seed):
    """The recipe by which the original's parameters were drawn for the cases."""
    z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * z
    return 0.1 * z if name.endswith("bias") else z * np.float32(0.7 / np.sqrt(np.prod(shape[1:])))


def our_path(name: str, resolution: int) -> tuple[str, ...]:
    """The path in our network of an original ADM's parameter, such as `model.dec.8x8_block0.conv0.weight`."""
    parts = name.removeprefix("model.").split(".")
    leaf = parts.pop()
    if parts[0] in ("enc", "dec"):
        side, _, block = parts[1].partition("_")
        level = (resolution // int(side.split("x")[0])).bit_length() - 1
        half = {"enc": "encoder", "dec": "decoder"}[parts[0]]
        if block.startswith("block"):
            block = f"{half}{level}_{block.removeprefix('block')}"
        else:
            block = {"conv": "stem", "down": f"down{level}", "up": f"up{level}", "in0": "middle0", "in1": "middle1"}[block]
        inner = {"norm2": ("attention", "norm"), "qkv": ("attention", "qkv"), "proj": ("attention", "proj")}
        parts = [block, *(inner.get(parts[2], (parts[2],)) if len(parts) > 2 else ())]
    kernel = "scale" if "norm" in parts[-1] else "kernel"
    return (*parts, "bias" if leaf == "bias" else kernel)


def to_ours(value):
    """OIHW to HWIO, (out, in) to (in, out)."""
    return {4: lambda v: v.transpose(2, 3, 1, 0), 2: lambda v: v.T, 1: lambda v: v}[value.ndim](value)


def is_adm(path) -> bool:
    meta = json.loads(str(np.load(path)["meta"]))
    return meta["config"]["model_type"] == "DhariwalUNet" and meta["precond"] == "EDMPrecond"


ADM_CASES = [pytest.param(p, id=p.stem) for p in sorted(FOLDER.glob("network-*.npz")) if is_adm(p)]


@pytest.mark.parametrize("path", ADM_CASES or [pytest.param(None, id="no-network-case-found")])
def test_reference_network(path):
    meta, case = load(path)
    config = meta["config"]
    levels = [i for i in range(len(config["channel_mult"])) if config["img_resolution"] >> i in config["attn_resolutions"]]
    adm = ADM(config["model_channels"], tuple(config["channel_mult"]), config["num_blocks"], tuple(levels), dropout=0.0)
    network = adm.build(config["img_channels"], config["label_dim"], config.get("augment_dim", 0), rngs=nnx.Rngs(0))
    graph, params = nnx.split(network, nnx.Param)
    theirs = {}
    names = dict(zip(case["param_names"], case["param_shapes"], strict=True))
    for (name, shape), total in zip(names.items(), case["param_abs_sums"], strict=True):
        if name.endswith("resample_filter"):
            continue
        value = draw_parameter(name, json.loads(shape) if isinstance(shape, str) else tuple(shape[shape > 0]), meta["seed"])
        np.testing.assert_allclose(np.abs(value).sum(dtype=np.float64), total, rtol=1e-6)
        theirs[our_path(name, config["img_resolution"])] = jnp.asarray(to_ours(value))
    assert {path for path, _ in flat_leaves(params)} == set(theirs)
    params = nnx.map_state(lambda path, leaf: leaf.replace(theirs[tuple(map(str, path))]), params)

    arrays = {k: jnp.asarray(case[k], jnp.float32) for k in case if case[k].dtype.kind == "f"}
    labels, augment = arrays.get("labels"), arrays.get("augment_labels")

    def output(params, labels):
        net = lambda x, c: nnx.merge(graph, params)(x, c, labels, augment)  # noqa: E731
        return preconditioning.denoiser(net, preconditioning.EDM())(arrays["x"], arrays["sigma"])

    loss = lambda params: ((output(params, labels) - arrays["target"]) ** 2).mean()  # noqa: E731
    y, (value, grads) = output(params, labels), jax.jit(jax.value_and_grad(loss))(params)
    scale = np.abs(case["y"]).max()
    np.testing.assert_allclose(y, case["y"], atol=2e-5 * scale)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-4)
    if "y_null_label" in case:
        np.testing.assert_allclose(output(params, None), case["y_null_label"], atol=2e-5 * scale)
    flat = {path: leaf for path, leaf in flat_leaves(grads)}
    for name, norm in zip(case["grad_names"], case["grad_norms"], strict=True):
        ours = np.linalg.norm(np.asarray(flat[our_path(str(name), config["img_resolution"])], np.float64))
        np.testing.assert_allclose(ours, norm, rtol=1e-4, err_msg=str(name))


def flat_leaves(state):
    return [(tuple(str(k) for k in path), leaf[...]) for path, leaf in nnx.to_flat_state(state)]
