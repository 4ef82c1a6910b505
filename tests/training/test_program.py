"""The same step with any program: one device, data-parallel, FSDP, pmap, accumulation,
rematerialisation."""

import collections
import functools
import math
import re

import chex
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from rdm_jax.checkpoints import store
from rdm_jax.config import Stage, Training
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.runtime import sharding
from rdm_jax.training.program import PROGRAMS

BATCH, CLASSES, SHAPE = 16, 3, (8, 8, 3)


LEVELS = {
    "one level": {"channel_mult": (1,), "attention_levels": (0,)},
    "two levels": {"channel_mult": (1, 2), "attention_levels": (1,)},
    "no attention": {"channel_mult": (1,), "attention_levels": ()},
}


@pytest.fixture(params=["one level", pytest.param("two levels", marks=pytest.mark.second)])
def size(request):
    """The larger network also resamples, and takes twice as long to compile."""
    return request.param


def program(
    devices=1, fsdp=1, mode="pjit", accumulate=1, remat="none", dtype="float32", size="one level"
):
    """A relay stage whose network has attention, labels and dropout."""
    network = ADM(
        8,
        blocks=1,
        emb_mult=2,
        head_channels=8,
        dropout=0.2,
        remat=remat,
        dtype=dtype,
        **LEVELS[size],
    )
    # Adam divides a gradient by its own size; where that is little more than rounding, epsilon
    # should be no less.
    training = Training(
        batch_size=BATCH,
        accumulate=accumulate,
        learning_rate=1e-3,
        warmup=16,
        ema_halflife=64.0,
        averages=(0.1,),
        epsilon=1e-3,
    )
    stage = Stage(
        SHAPE[:2], network, process=RelayProcess(patch=2), training=training, sampler=RelayHeun()
    )
    mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:devices])
    return PROGRAMS[mode](stage, SHAPE, CLASSES, jax.random.key(1), mesh)


def compiled(size="one level", **how):
    """A compiled program, cached: compilation takes most of the time of these tests."""
    return _compiled(size, tuple(sorted(how.items())))


@functools.cache
def _compiled(size, how):
    made = program(size=size, **dict(how))
    made.compile()
    return made


def batch(number):
    random = np.random.default_rng(number)
    image, label = (
        random.integers(0, 256, (BATCH, *SHAPE), np.uint8),
        random.integers(0, CLASSES, BATCH).astype(np.int32),
    )
    return {"image": image, "label": label, "position": np.arange(BATCH, dtype=np.int32)}


@functools.cache
def before(size):
    """The initial state, on the host: initialising it on devices compiles once per mesh."""
    return jax.device_get(program(size=size).init(jax.random.key(0)))


def trained(made, steps=5, state=None, first=0, size="one level"):
    """The state after some steps, as in checkpoints, and the metrics of each step."""
    if state is None:
        state = jax.device_put(before(size), sharding.shardings(made.abstract))
    state, metrics = made.place(state), []
    for number in range(first, first + steps):
        state, values = made(state, made.put(batch(number)))
        metrics.append(jax.device_get(values))
    return made.whole(state), metrics


@functools.cache
def on_one_device(size):
    return jax.device_get(trained(compiled(size=size), size=size))


def difference(tree, other):
    """The largest difference between two trees, relative to the largest value of each array."""

    def share(a, b):
        return np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1e-3)

    return max(jax.tree.leaves(jax.tree.map(share, tree, other)))


LONG = (
    {"devices": 8, "fsdp": 2},
    {"devices": 8, "mode": "pmap"},
    {"accumulate": 4},
    {"remat": "block"},
)


@pytest.mark.second
@pytest.mark.parametrize(
    "how",
    [
        {"devices": 8},
        {"devices": 8, "fsdp": 4},
    ],
    ids=str,
)
def test_training_is_independent_of_mesh(how):
    check_trained(how, "two levels")


@pytest.mark.second
@pytest.mark.parametrize(
    "how",
    [{"devices": 8, "fsdp": 8, "remat": "convolutions"}, {"devices": 2, "mode": "pmap"}],
    ids=str,
)
def test_training_is_independent_of_program(how):
    check_trained(how, "two levels")


@pytest.mark.long
@pytest.mark.parametrize("how", LONG, ids=str)
def test_training_is_independent_of_other_programs(how):
    check_trained(how, "two levels")


def check_trained(how, size):
    """Losses, parameters, EMA and averages match those on one device."""
    state, metrics = trained(compiled(**how, size=size), size=size)
    wanted, wanted_metrics = on_one_device(size)
    assert int(state.step) == 5 and int(state.skipped) == 0
    chex.assert_trees_all_close(metrics, wanted_metrics, rtol=1e-5)
    assert difference(state.params, wanted.params) < 1e-5
    assert difference(state.ema, wanted.ema) < 1e-5
    assert difference(state.averages, wanted.averages) < 1e-5


@pytest.mark.second
def test_training_changes_parameters(size):
    assert difference(on_one_device(size)[0].params, before(size).params) > 1e-2


@pytest.mark.second
def test_state_is_sharded_by_rules():
    made = compiled(devices=8, fsdp=4, size="two levels")
    state, _ = trained(made, steps=1, size="two levels")
    for tree in (state, made.init(jax.random.key(0))):
        moments = tree.opt_state[0]
        averages = tree.averages.values()
        for params in (tree.params, tree.ema, *averages, moments.mu, moments.nu):
            kernel, bias = (
                params["encoder1_0"]["conv0"]["kernel"],
                params["encoder1_0"]["conv0"]["bias"],
            )
            assert kernel.sharding.spec == PartitionSpec(None, None, None, "fsdp")
            assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 8, 4)}
            assert bias.sharding.is_fully_replicated
            stem = params["stem"]["kernel"]  # (3, 3, 3, 8)
            assert {shard.data.shape for shard in stem.addressable_shards} == {(3, 3, 3, 2)}


def test_largest_axis():
    assert sharding.largest_axis((3, 3, 6, 8), 4) == PartitionSpec(None, None, None, "fsdp")
    assert sharding.largest_axis((1000, 768), 8) == PartitionSpec("fsdp")
    assert (
        sharding.largest_axis((3, 3, 5, 7), 4)
        == sharding.largest_axis((4, 4), 1)
        == PartitionSpec()
    )


@pytest.mark.second
@pytest.mark.parametrize("how", [{}, {"devices": 2, "mode": "pmap"}], ids=str)
def test_resume_on_fewer_devices(tmp_path, how):
    saved = store.Checkpoints(tmp_path)
    state, _ = trained(compiled(devices=8, fsdp=4), steps=2)
    saved.save(state, {"validation_loss": 1.0})
    saved.wait()
    made = compiled(**how)
    restored, _ = saved.restore(2, made.abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {
        how.get("devices", 1)
    }
    after, _ = trained(made, steps=3, state=restored, first=2)
    assert difference(after.params, on_one_device("one level")[0].params) < 1e-5
    saved.close()


@pytest.mark.second
def test_collectives_are_gradients_only():
    one, eight = compiled("two levels"), compiled("two levels", devices=8)
    parameters = 4 * eight.objective.network.num_parameters
    assert sharding.collectives(one.compiled) == {}
    sent = sharding.collectives(eight.compiled)
    assert sent.keys() == {"all-reduce"}
    assert parameters <= sent["all-reduce"] <= parameters + 64  # and the loss


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"devices": 8, "fsdp": 4}, marks=pytest.mark.second),
        pytest.param({"devices": 8, "fsdp": 4, "size": "two levels"}, marks=pytest.mark.second),
        pytest.param(
            {"devices": 8, "fsdp": 8, "remat": "convolutions", "size": "two levels"},
            marks=pytest.mark.second,
        ),
        pytest.param({"devices": 8, "fsdp": 8, "size": "two levels"}, marks=pytest.mark.long),
        pytest.param({"devices": 8, "fsdp": 2, "size": "two levels"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_collectives_fetch_sharded_parameters_once(how):
    made, fsdp = compiled(**how), how["fsdp"]
    sent, params = sharding.collectives(made.compiled), jax.tree.leaves(made.abstract.params)
    cut = sum(4 * leaf.size for leaf in params if not leaf.sharding.is_fully_replicated)
    assert cut > 0 and sent["all-gather"] == cut and sent.keys() == {"all-gather", "all-reduce"}
    # On CPU, gradients are summed in full along 'fsdp' (on TPU by a reduce-scatter, see
    # test_plan.py), then their parts along 'data'. Besides there are the loss and, of each cut
    # array, its share of the gradient's norm.
    gradients = 4 * sum(leaf.size for leaf in params) + (cut // fsdp if fsdp < 8 else 0)
    assert gradients <= sent["all-reduce"] <= gradients + 4 * (len(params) + 2)


@pytest.mark.second
def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    state, metrics = trained(compiled(dtype="bfloat16"), steps=2)
    assert {
        leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state[0].mu))
    } == {np.dtype("float32")}
    _, wanted = on_one_device("one level")
    np.testing.assert_allclose(
        [m["loss"] for m in metrics], [m["loss"] for m in wanted[:2]], rtol=0.02
    )


def test_fetched_parameters_have_computation_dtype():
    """And not a narrower one: sharded and replicated parameters would then differ."""
    made = program(devices=8, fsdp=4, dtype="bfloat16")
    dtypes, abstract = made.objective.network.dtypes, made.abstract.params
    fetched = jax.eval_shape(sharding.fetcher(abstract, dtypes), abstract)
    cut = jax.tree.map(lambda leaf: not leaf.sharding.is_fully_replicated, abstract)
    wanted = jax.tree.map(
        lambda leaf, dtype, is_cut: dtype if is_cut else leaf.dtype, abstract, dtypes, cut
    )
    assert jax.tree.map(lambda leaf: leaf.dtype, fetched) == wanted
    assert (
        cut["map_layer1"]["kernel"]
        and cut["middle0"]["affine"]["kernel"]
        and cut["middle0"]["conv0"]["kernel"]
    )
    assert {str(dtype) for dtype in jax.tree.leaves(wanted)} == {"bfloat16", "float32"}


@pytest.fixture
def compiling():
    """Disables the compilation cache, so that the compiler runs and writes its dumps."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at the setting once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.second
def test_gradients_are_summed_in_computation_dtype(tmp_path, compiling):
    """Checked after the SPMD partitioner: the CPU compiler later converts all of it to float32,
    those of accelerators do not."""
    made = program(devices=8, dtype="bfloat16", size="no attention")
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    made.lower().compile(compiler_options=options)
    (text,) = (path.read_text() for path in tmp_path.glob("*after_spmd-partitioning*.txt"))
    summed = collections.Counter()
    for shapes in re.findall(r"= ([^%\n]*?) all-reduce\(", text):
        # The matrix unit sums the gradient of a bias in eight equal rows.
        shapes = re.sub(r"f32\[1,1,8,", "f32[", shapes)
        for dtype, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", shapes):
            summed[dtype] += math.prod(map(int, filter(None, shape.split(","))))
    params, dtypes = made.objective.network.abstract, made.objective.network.dtypes
    values = collections.Counter()
    for leaf, dtype in zip(jax.tree.leaves(params), jax.tree.leaves(dtypes), strict=True):
        values[{"bfloat16": "bf16", "float32": "f32"}[str(dtype)]] += leaf.size
    assert values["bf16"] > values["f32"] > 0
    assert summed == values + collections.Counter(f32=1)  # and the loss
