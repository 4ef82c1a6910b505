"""Our numbers against the published PyTorch implementation's.

The cases are files `KIND-NN.npz`, computed once with the original; each holds its parameters in
`meta`, so another folder of cases runs through the same tests: `RDM_REFERENCE_DIR=/path pytest -k
reference`. Errors are relative to the largest magnitude.
"""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config import Stage
from rdm_jax.data import augment
from rdm_jax.diffusion import blurring, guidance, preconditioning, processes, samplers, schedules
from rdm_jax.diffusion.walks import scanned_walk, walk
from rdm_jax.evaluation import inception, inception_weights, metrics, moments
from rdm_jax.interop import pytorch_names
from rdm_jax.models.conditions import ClassLabels
from tests.support import inception_file
from tests.support.precision import enable_x64
from tests.support.reference import cases, load

# The original computes the DCT's frequencies in float32 even where the rest is float64.
EXACT, HALF_EXACT, FLOAT32 = 1e-9, 1e-6, 5e-5


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def check(ours, theirs, dtype, tolerance):
    """Compares, relative to the largest magnitude: within `tolerance` as float64, within FLOAT32 as
    float32."""
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
    check(
        blurring.blur(x, sigma, patch=meta["patch"], min_scale=meta["min_scale"]),
        case["out"],
        dtype,
        HALF_EXACT,
    )


@cases("block_noise")
def test_reference_block_noise(path, dtype):
    meta, case = load(path)
    check(
        blurring.block_noise(jnp.asarray(case["white"], dtype), block=meta["block"]),
        case["out"],
        dtype,
        EXACT,
    )


def relay_process(meta, **kwargs):
    clock = schedules.Clock(
        meta["prob_length"], meta["blur_sigma_max"], meta["P_mean"], meta["P_std"]
    )
    return processes.RelayProcess(clock=clock, min_scale=meta["min_scale"], **kwargs)


@cases("blur_weights")
def test_reference_blur_weights(path, dtype):
    meta, case = load(path)
    process = relay_process(meta, patch=meta["patch"])
    check(
        process.blur_weights(process.clock.time(jnp.asarray(case["sigma"], dtype))),
        case["out"],
        dtype,
        HALF_EXACT,
    )


LOSS_TOLERANCE = {"edm": EXACT, "ve": EXACT, "vp": HALF_EXACT, "relay": HALF_EXACT}


def loss_process(meta):
    """Our process for the original's loss."""
    if meta["loss"] == "edm":
        return processes.GaussianProcess(meta["P_mean"], meta["P_std"], meta["sigma_data"])
    if meta["loss"] == "vp":
        return processes.VPProcess(
            schedules.Linear(meta["beta_d"], meta["beta_min"]), meta["epsilon_t"]
        )
    if meta["loss"] == "ve":
        return processes.VEProcess(meta["sigma_min"], meta["sigma_max"])
    assert meta["loss"] == "relay"
    return relay_process(
        meta,
        patch=meta["up_scale"],
        block_scale=meta["block_scale"],
        sigma_data=meta["sigma_data"],
        sigma_floor=meta["truncate_sigma"],
        max_weight=meta["max_weight"],
    )


@cases("loss")
def test_reference_loss(path, dtype):
    meta, case = load(path)
    process, tolerance = loss_process(meta), LOSS_TOLERANCE[meta["loss"]]
    images, noise = jnp.asarray(case["images"], dtype), jnp.asarray(case["white"], dtype)
    if meta["loss"] == "relay":
        noise = process.mixture(
            noise, jnp.asarray(case["block_white"], dtype) if meta["block_scale"] else None
        )
        noised = process.noised(images, jnp.asarray(case["draw_time"], dtype), noise)
        check(noised.sigma, case["sigma"], dtype, tolerance)
    else:
        # The original's noise levels are float32 even where its images are float64. Ours are the
        # same to that precision, and what follows from the original's to the full one.
        sigma = process.sigma(jnp.asarray(case["draw_time"]))
        np.testing.assert_allclose(sigma, case["sigma"], rtol=0, atol=1e-6 * case["sigma"].max())
        noised = process.noised_at(
            images, jnp.asarray(case["sigma"]) if dtype == jnp.float64 else sigma, noise
        )
    loss = noised.weight[:, None, None, None] * (toy(noised.images, noised.sigma) - images) ** 2
    check(noised.images, case["net_input"], dtype, tolerance)
    check(loss, case["loss"], dtype, tolerance)


def white(meta, shape, dtype):
    """The white arrays that the original's sampler drew, in order."""
    draws = [
        np.random.default_rng([meta["seed"], k]).standard_normal(shape)
        for k in range(meta["num_noise_draws"])
    ]
    return jnp.asarray(np.stack(draws), dtype)


def toy_denoiser(meta, case, dtype):
    if "labels" not in case:
        return toy
    labels = jnp.asarray(case["labels"], dtype)
    transform = guidance.ClassifierFree(meta.get("cfg_scale", 1.0))
    guided = transform.transform(toy, ClassLabels(labels.shape[1]).null)
    return lambda x, sigma: guided(x, sigma, labels)


def run_sampler(sampler, denoise, x, levels, noise, scan):
    def step(denoise, x, i, level, to):
        return sampler.step(denoise, x, i, level, to, noise)

    def finish(denoise, x, i, level):
        return sampler.finish(denoise, x, i, level, noise)

    if scan:
        return scanned_walk(step, finish, denoise, x, levels)
    return walk(*(functools.partial(f, denoise) for f in (step, finish)), x, levels)


def heun(meta, case, dtype):
    """Our sampler for a case of the families edm and edm_sde, its levels, its first state and its
    noise."""
    settings = {"churn": "S_churn", "churn_min": "S_min", "churn_max": "S_max"}
    settings |= {"churn_noise": "S_noise", "eta": "sde_scale", "steps": "num_steps"}
    settings |= {name: name for name in ("sigma_min", "sigma_max", "rho")}
    sampler = samplers.Heun(
        **{ours: meta[theirs] for ours, theirs in settings.items() if theirs in meta}
    )
    levels = sampler.levels(processes.GaussianProcess())
    draws = jnp.concatenate(
        [jnp.asarray(case["init"], dtype)[None], white(meta, case["init"].shape, dtype)]
    )
    if meta["family"] == "edm_sde":  # three draws a step, as ours
        return sampler, levels, None, lambda k: draws[k]
    return (
        sampler,
        levels,
        None,
        lambda k: draws[(k + 2) // 3],
    )  # one draw a step, for the churn; ours is the first of three


def relay_heun(meta, case, dtype):
    """The same for the family relay."""
    process = processes.RelayProcess(
        meta["up_scale"], schedules.Clock(1.0, meta["blur_sigma_max"]), block_scale=meta["s_block"]
    )
    settings = {"steps": "num_steps", "truncation_time": "truncation_t", "eta": "s_noise"}
    settings |= {name: name for name in ("sigma_min", "sigma_max", "rho", "truncation_sigma")}
    sampler = samplers.RelayHeun(**{ours: meta[theirs] for ours, theirs in settings.items()})
    levels = sampler.levels(process)
    draws = white(meta, case["init"].shape, dtype)
    mixtures = jax.vmap(process.mixture)(draws[::2], draws[1::2]) if meta["s_block"] else draws
    assert (
        len(mixtures) == 2 * len(levels.sigma) - 1
    )  # one at the start, two a step: we walk as many levels as the original
    return sampler, levels, jnp.asarray(case["low"], dtype), lambda k: mixtures[k]


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@cases("sampler")
def test_reference_sampler(path, dtype, scan):
    meta, case = load(path)
    made, tolerance = {
        "edm": (heun, EXACT),
        "edm_sde": (heun, EXACT),
        "relay": (relay_heun, HALF_EXACT),
    }[meta["family"]]
    sampler, levels, low, noise = made(meta, case, dtype)
    x = sampler.start(low, jax.tree.map(lambda a: a[0], levels), noise)
    out = run_sampler(sampler, toy_denoiser(meta, case, dtype), x, levels, noise, scan)
    check(out, case["out"], dtype, tolerance)


def draw_parameter(name, shape, seed):
    """The recipe by which the original's parameters were drawn for the cases."""
    z = (
        np.random.default_rng([seed, zlib.crc32(name.encode())])
        .standard_normal(shape)
        .astype(np.float32)
    )
    if name.endswith("freqs"):
        return 16 * z
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * z
    return 0.1 * z if name.endswith("bias") else z * np.float32(0.7 / np.sqrt(np.prod(shape[1:])))


@cases("network")
def test_reference_network(path):
    meta, case = load(path)
    found = pytorch_names.describe(meta["precond"], meta["config"], Stage())
    stage, side = found.stage, found.stage.resolution[0]
    network = stage.build(found.channels, found.classes)
    theirs = {}
    for name, shape, total in zip(
        case["param_names"].tolist(), case["param_shapes"], case["param_abs_sums"], strict=True
    ):
        shape = json.loads(str(shape))
        if name.endswith("resample_filter"):
            theirs[name] = pytorch_names.buffers(stage)[name]
            assert theirs[name].shape == tuple(shape)
        else:
            theirs[name] = draw_parameter(name, shape, meta["seed"])
        np.testing.assert_allclose(np.abs(theirs[name]).sum(dtype=np.float64), total, rtol=1e-6)

    def name_of(keys) -> str:
        return pytorch_names.original_name(tuple(key.key for key in keys), stage.network, side)

    # Every parameter of theirs has its place in ours, and the other way round.
    ours = [name_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(network.abstract)[0]]
    assert sorted(ours) == sorted(name for name in theirs if not name.endswith("resample_filter"))
    params = jax.tree.map_with_path(
        lambda keys, _: jnp.asarray(pytorch_names.to_ours(theirs[name_of(keys)])), network.abstract
    )

    arrays = {k: jnp.asarray(case[k], jnp.float32) for k in case if case[k].dtype.kind == "f"}
    labels, augment = arrays.get("labels"), arrays.get("augment_labels")

    def output(params, labels):
        def net(x, c):
            return network.apply(params, x, c, labels, augment)

        return preconditioning.denoiser(net, stage.precondition)(arrays["x"], arrays["sigma"])

    def loss(params):
        return ((output(params, labels) - arrays["target"]) ** 2).mean()

    y, (value, grads) = output(params, labels), jax.jit(jax.value_and_grad(loss))(params)
    scale = np.abs(case["y"]).max()
    np.testing.assert_allclose(y, case["y"], atol=2e-5 * scale, rtol=0)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-4)
    if "y_null_label" in case:
        np.testing.assert_allclose(
            output(params, None), case["y_null_label"], atol=2e-5 * scale, rtol=0
        )
        if labels is not None:
            np.testing.assert_allclose(
                output(params, 0 * labels), case["y_null_label"], atol=2e-5 * scale, rtol=0
            )
    norms = {name_of(keys): np.linalg.norm(np.asarray(leaf, np.float64)) for keys, leaf in
             jax.tree_util.tree_flatten_with_path(grads)[0]}  # fmt: skip
    assert set(case["grad_names"].tolist()) == {
        name for name in norms if not name.endswith("freqs")
    }
    for name, norm in zip(case["grad_names"].tolist(), case["grad_norms"], strict=True):
        np.testing.assert_allclose(norms[name], norm, rtol=1e-4, err_msg=name)


@cases("metrics")
def test_reference_metrics(path, dtype):
    meta, case = load(path)
    # Features that are float32, as a network's are; float64 only tells that nothing else differs.
    reference, sample = (case[name].astype(dtype) for name in ("ref_features", "sample_features"))
    gaussians = []
    for features in (reference, sample):
        sums = moments.start(jnp.asarray(features[:32].mean(0)))
        for first in range(0, len(features), 32):
            part = features[first : first + 32]
            sums = moments.update(sums, jnp.asarray(part), jnp.ones(len(part), dtype))
        gaussians.append(moments.mean_and_covariance(moments.exact(sums), len(features)))
    frechet = metrics.frechet_distance(*gaussians[0], *gaussians[1])
    precision, recall = metrics.precision_and_recall(reference, sample, k=int(meta["k"]), tile=128)
    score = metrics.InceptionScore(*case["logits"].shape[::-1], int(meta["split_size"]))
    score.add(0, case["logits"])
    found = {
        "frechet": frechet,
        "precision": precision,
        "recall": recall,
        "inception_score": score.value(),
    }
    for name, value in found.items():
        assert abs(value - meta[name]) <= (1e-6 if dtype == jnp.float32 else 1e-12) * abs(
            meta[name]
        ), name


AUGMENT_PARAMETERS = {
    "x_flip": "xflip",
    "y_flip": "yflip",
    "scale": "scale",
    "rotation": "rotate",
    "anisotropy": "aniso",
    "axis": "aniso_angle",
    "shift_x": "translate_x",
    "shift_y": "translate_y",
}


@cases("augment")
def test_reference_augment(path, dtype):
    meta, case = load(path)
    augmentation = augment.Augmentation(
        scale_std=meta["scale_std"],
        anisotropy_std=meta["aniso_std"],
        shift_std=meta["translate_frac_std"],
    )
    drawn = {
        ours: jnp.asarray(case[f"param_{theirs}"], dtype)
        for ours, theirs in AUGMENT_PARAMETERS.items()
    }
    t = augment.Transformation(**drawn)
    out, labels = (
        augmentation.transform(jnp.asarray(case["images"], dtype), t),
        augmentation.labels(t),
    )
    for ours, theirs in ((out, case["out"]), (labels, case["labels"])):
        # Within 1e-4 in float64 too: the original's numbers are float32.
        assert np.max(np.abs(np.asarray(ours, np.float64) - theirs)) <= 1e-4 * np.max(
            np.abs(theirs)
        )


@cases("inception")
def test_reference_inception(path, tmp_path):
    meta, case = load(path)
    theirs = {}
    for name, shape, total in zip(
        case["param_names"].tolist(), case["param_shapes"], case["param_abs_sums"], strict=True
    ):
        theirs[name] = inception_file.draw(name, json.loads(str(shape)), meta["seed"])
        np.testing.assert_allclose(np.abs(theirs[name]).sum(dtype=np.float64), total, rtol=1e-6)
    digest = inception_file.write(tmp_path / "weights.pth", theirs)
    params, _ = inception_weights.load(
        tmp_path / "weights.pth", sha256=digest
    )  # so every parameter of theirs has its place in ours
    images = np.random.default_rng([meta["seed"], 1]).integers(
        0, 256, [int(n) for n in meta["shape"]], dtype=np.uint8
    )
    found = jax.jit(inception.apply)(params, jnp.asarray(images))
    for ours, wanted in (
        ("pool", case["pool"]),
        ("spatial", case["spatial"]),
        ("logits", case["logits_no_bias"]),
    ):
        assert found[ours].dtype == np.float32
        np.testing.assert_allclose(
            found[ours], wanted.reshape(len(images), -1), atol=1e-4 * np.abs(wanted).max(), rtol=0
        )
