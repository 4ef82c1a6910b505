"""Augmentation: geometry, frequencies of draws, and labels."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from rdm_jax.data import augment
from rdm_jax.data.augment import Augmentation, Transformation
from rdm_jax.runtime import sharding
from tests.support.precision import enable_x64

SIZE = 32
# Rotation and stretching are measured on Gaussian blobs of height 1 and a standard deviation of 3
# pixels. Interpolating lowers their top by about 0.01, and as sym6 is no mirror image of itself
# (its centre of mass is 0.05 pixels off its middle), half a turn moves them by 0.1 pixels, which is
# 0.02. Half a pixel's error would be 0.1.
SMOOTH = 0.025
FIELDS = Transformation._fields


def white(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def blob(x=0.0, y=0.0, std_x=3.0, std_y=3.0):
    """(1, SIZE, SIZE, 1): a Gaussian at (x, y) pixels right of and below the centre."""
    places = np.arange(SIZE) - (SIZE - 1) / 2
    image = np.exp(
        -(((places[None, :] - x) / std_x) ** 2) / 2 - ((places[:, None] - y) / std_y) ** 2 / 2
    )
    return jnp.asarray(image[None, :, :, None], jnp.float32)


def only(**values):
    """One image's transformation of zeros except `values`."""
    return Transformation(*(jnp.asarray([values.get(name, 0.0)], jnp.float32) for name in FIELDS))


compiled = jax.jit(Augmentation().transform)


def transformed(image, **values):
    return compiled(image, only(**values))


def test_transform_of_zeros_is_the_identity():
    x = white((1, SIZE, SIZE, 1))
    chex.assert_trees_all_close(transformed(x), x, atol=1e-5)


def test_flips():
    x = white((1, SIZE, SIZE, 1))
    chex.assert_trees_all_close(transformed(x, x_flip=1.0), x[:, :, ::-1], atol=1e-5)
    chex.assert_trees_all_close(transformed(x, y_flip=1.0), x[:, ::-1], atol=1e-5)


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, 5), (-4, 2)])
def test_integer_shift_moves_image_and_reflection(right, down):
    x = white((1, SIZE, SIZE, 1))
    std = Augmentation().shift_std
    moved = transformed(x, shift_x=right / (std * SIZE), shift_y=down / (std * SIZE))
    margin = 8
    around = np.pad(np.asarray(x), ((0, 0), (margin, margin), (margin, margin), (0, 0)), "reflect")
    expected = around[
        :, margin - down : margin - down + SIZE, margin - right : margin - right + SIZE
    ]
    chex.assert_trees_all_close(
        np.asarray(moved), expected, atol=5e-5
    )  # white noise, and float32 places up to 70


def test_rotation_is_counterclockwise():
    x = blob(5, -2) + 0.5 * blob(-3, -4)
    for quarters in (1, 2, 3, -1):
        turned = transformed(x, rotation=quarters * np.pi / 2)
        chex.assert_trees_all_close(turned, jnp.rot90(x, quarters, (1, 2)), atol=SMOOTH)
    angle = 0.7
    turned, expected = (
        transformed(blob(4, 0), rotation=angle),
        blob(4 * np.cos(angle), -4 * np.sin(angle)),
    )  # upwards
    inside = np.s_[:, 8:-8, 8:-8]  # where no reflection turns in
    chex.assert_trees_all_close(turned[inside], expected[inside], atol=SMOOTH)


@pytest.mark.parametrize("log2", [0.5, -0.3])
def test_scale_magnifies_about_the_centre(log2):
    factor = 2.0**log2
    expected = blob(2 * factor, -1 * factor, 3 * factor, 3 * factor)
    chex.assert_trees_all_close(transformed(blob(2, -1), scale=log2 / 0.2), expected, atol=SMOOTH)


def test_anisotropy_stretches_along_its_axis_and_shrinks_across():
    factor = 2.0**0.3
    wide = blob(2 * factor, 1 / factor, 3 * factor, 3 / factor)
    chex.assert_trees_all_close(transformed(blob(2, 1), anisotropy=1.5), wide, atol=SMOOTH)
    high = blob(2 / factor, 1 * factor, 3 / factor, 3 * factor)
    chex.assert_trees_all_close(
        transformed(blob(2, 1), anisotropy=1.5, axis=np.pi / 2), high, atol=SMOOTH
    )


def test_anisotropy_along_any_axis_keeps_the_area():
    factor, axis = 2.0**0.3, 0.6
    direction = np.array([np.cos(axis), -np.sin(axis)])  # to the right and upwards
    before = blob(*(3 * direction))
    mass = np.asarray(transformed(before, anisotropy=1.5, axis=axis), np.float64)[0, ..., 0]
    np.testing.assert_allclose(mass.sum(), np.asarray(before, np.float64).sum(), rtol=0.01)
    places = np.arange(SIZE) - (SIZE - 1) / 2
    centre = np.array([mass.sum(0) @ places, mass.sum(1) @ places]) / mass.sum()
    np.testing.assert_allclose(centre, factor * 3 * direction, atol=0.05)


def test_transformation_is_in_standard_deviations():
    stronger = Augmentation(scale_std=0.4, anisotropy_std=0.4, shift_std=0.25)
    t = only(scale=-0.8, anisotropy=0.6, axis=0.3, shift_x=0.7, shift_y=-0.4, rotation=1.0)
    half = t._replace(
        **{name: getattr(t, name) / 2 for name in ("scale", "anisotropy", "shift_x", "shift_y")}
    )
    x = blob(3, 1)
    chex.assert_trees_all_close(jax.jit(stronger.transform)(x, half), compiled(x, t), atol=1e-5)


def expectation(augmentation, image, t):
    """One (h, w, c) image in float64, by the paper's matrices for homogeneous (x, y, 1)."""
    h, w, _ = image.shape
    image = image[:: -1 if t["y_flip"] else 1, :: -1 if t["x_flip"] else 1]
    shift = np.array(
        [augmentation.shift_std * t["shift_x"] * w, augmentation.shift_std * t["shift_y"] * h]
    )
    scale, stretch = (
        2.0 ** (augmentation.scale_std * t["scale"]),
        2.0 ** (augmentation.anisotropy_std * t["anisotropy"]),
    )

    def turn(angle):
        """Rotates counterclockwise; y points down."""
        return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    stretching = turn(t["axis"]) @ np.diag([stretch, 1 / stretch]) @ turn(-t["axis"])
    backward = np.linalg.inv(stretching @ turn(t["rotation"]) * scale)
    taps = augment._SYM6
    around = np.pad(image, ((h - 1, h - 1), (w - 1, w - 1), (0, 0)), "reflect")
    for axis in (0, 1):
        between = np.zeros([n * (2 if i == axis else 1) for i, n in enumerate(around.shape)])
        between[(slice(None),) * axis + (slice(None, None, 2),)] = around
        around = np.apply_along_axis(
            lambda v: np.convolve(v, taps * np.sqrt(2))[5:-6], axis, between
        )
    # Output coordinates in the doubled image: pixel i is at 2 i.
    y, x = np.meshgrid(np.arange(-5, 2 * h + 5), np.arange(-5, 2 * w + 5), indexing="ij")
    x, y = np.einsum(
        "ij,jyx->iyx", backward, np.stack([x - (w - 1) - 2 * shift[0], y - (h - 1) - 2 * shift[1]])
    )
    at = [y + (h - 1) + 2 * (h - 1), x + (w - 1) + 2 * (w - 1)]
    channels = [
        scipy.ndimage.map_coordinates(around[..., c], at, order=1, mode="grid-constant")
        for c in range(image.shape[-1])
    ]
    out = np.stack(channels, -1)
    for axis in (0, 1):
        out = np.apply_along_axis(lambda v: np.correlate(v, taps / np.sqrt(2))[::2], axis, out)
    return out


def test_transform_matches_its_definition():
    shape = (4, 9, 14, 2)  # not square
    with enable_x64(True):
        augmentation = Augmentation(
            probability=1.0, scale_std=0.3, anisotropy_std=0.25, shift_std=0.2
        )
        images = jnp.asarray(np.random.default_rng(1).standard_normal(shape))
        keys = jax.random.split(jax.random.key(3), shape[0])
        t = jax.jit(jax.vmap(augmentation.draw))(keys)
        out, labels = jax.jit(augmentation.__call__)(images, keys)
        assert out.dtype == labels.dtype == jnp.float64
        for i in range(shape[0]):
            one = {name: float(value[i]) for name, value in zip(FIELDS, t, strict=True)}
            np.testing.assert_allclose(
                out[i], expectation(augmentation, np.asarray(images[i]), one), atol=1e-11
            )


def test_labels_describe_the_transformation():
    values = dict(
        x_flip=1,
        y_flip=1,
        scale=-0.7,
        rotation=2.0,
        anisotropy=0.5,
        axis=-0.4,
        shift_x=1.5,
        shift_y=-0.3,
    )
    t = jax.tree.map(lambda *v: jnp.concatenate(v), only(), only(**values))
    expected = [
        1,
        1,
        -0.7,
        np.cos(2.0) - 1,
        np.sin(2.0),
        0.5 * np.cos(0.4),
        -0.5 * np.sin(0.4),
        1.5,
        -0.3,
    ]
    labels = Augmentation().labels(t)
    chex.assert_shape(labels, (2, augment.LABELS))
    np.testing.assert_array_equal(labels[0], np.zeros(augment.LABELS))
    np.testing.assert_allclose(labels[1], expected, rtol=1e-6)


def draws(probability, count=20_000):
    """The draws of every field, in float64."""
    keys = jax.random.split(jax.random.key(5), count)
    t = jax.jit(jax.vmap(Augmentation(probability).draw))(keys)
    return {name: np.asarray(value, np.float64) for name, value in t._asdict().items()}


def assert_share(what, expected):
    """5 standard errors."""
    assert abs(what.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(what)), (
        what.mean()
    )


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_draws_have_their_frequencies(p):
    t = draws(p)
    done = {name: values != 0 for name, values in t.items()}
    shares = dict(
        x_flip=1 / 2,
        y_flip=p / 2,
        scale=p,
        rotation=p,
        anisotropy=p,
        axis=p / 2,
        shift_x=p,
        shift_y=p,
    )
    for name, share in shares.items():
        if share == 1:
            assert done[name].all()
        else:
            assert_share(done[name], share)
    np.testing.assert_array_equal(done["shift_x"], done["shift_y"])  # one gate for both
    assert not np.any(done["axis"] & ~done["anisotropy"])  # no axis where nothing is stretched
    assert set(t["x_flip"]) == set(t["y_flip"]) == {0, 1}
    if p < 1:  # each gate is its own
        names = ["x_flip", "y_flip", "scale", "rotation", "anisotropy", "shift_x"]
        for i, first in enumerate(names):
            for second in names[:i]:
                assert_share(done[first] & done[second], shares[first] * shares[second])


def test_draws_have_their_distributions():
    t = draws(1.0)
    for name in ("scale", "anisotropy", "shift_x", "shift_y"):
        assert scipy.stats.kstest(t[name], "norm").pvalue > 1e-4, name
    for name in ("rotation", "axis"):
        angles = t[name][t[name] != 0]
        assert scipy.stats.kstest(angles, "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-4, name
    moving = np.stack([t[name] for name in FIELDS])
    off_diagonal = np.corrcoef(moving)[~np.eye(len(FIELDS), dtype=bool)]
    assert np.max(np.abs(off_diagonal)) < 5 / np.sqrt(moving.shape[1])


def test_draw_with_closed_gates_only_flips():
    augmentation = Augmentation(probability=0.0)
    x, keys = white((8, 6, 4, 3)), jax.random.split(jax.random.key(0), 8)
    out, labels = jax.jit(augmentation.__call__)(x, keys)
    np.testing.assert_array_equal(labels[:, 1:], np.zeros((8, augment.LABELS - 1)))
    assert set(np.asarray(labels[:, 0])) == {0, 1}
    chex.assert_trees_all_close(
        out, jnp.where(labels[:, :1, None, None] > 0, x[:, :, ::-1], x), atol=1e-5
    )


def test_images_are_independent_on_one_or_eight_devices():
    """One trace; equal numbers on any device; a sharded batch needs no communication."""
    function = jax.jit(chex.assert_max_traces(Augmentation(probability=1.0).__call__, n=1))
    x, keys = white((8, 6, 4, 3)), jax.random.split(jax.random.key(0), 8)
    out, labels = function(x, keys)
    assert out.dtype == labels.dtype == jnp.float32
    order = jnp.asarray([3, 0, 7, 1])
    among_others = function(
        white(x.shape, 1).at[:4].set(x[order]),
        jax.random.split(jax.random.key(1), 8).at[:4].set(keys[order]),
    )
    for ours, theirs in zip(among_others, (out, labels), strict=True):
        np.testing.assert_array_equal(ours[:4], theirs[order])
        assert not np.any(np.all(np.asarray(ours[4:] == theirs[4:]).reshape(4, -1), -1))

    cut = sharding.batched(sharding.local_mesh())
    program = (
        jax.jit(Augmentation(probability=1.0).__call__)
        .lower(*jax.device_put((x, keys), cut))
        .compile()
    )
    assert not [
        op
        for op in ("all-gather", "all-reduce", "all-to-all", "collective")
        if op in program.as_text()
    ]
    for ours, theirs in zip(program(*jax.device_put((x, keys), cut)), (out, labels), strict=True):
        assert ours.sharding.is_equivalent_to(cut, ours.ndim)
        chex.assert_trees_all_close(np.asarray(ours), np.asarray(theirs), atol=1e-5)


def test_halve_is_inverse_and_transpose_of_double():
    double, halve = (
        jax.jit(function, static_argnames="axis") for function in (augment.double, augment.halve)
    )
    x, y = white((5, 3)), white((20, 3), 1)
    # `halve` looks at 5 more places on either side, which doubling fills where the zeros outside
    # belong to the image.
    doubled = double(jnp.pad(x, ((8, 8), (0, 0))), axis=0)
    chex.assert_shape(doubled, (42, 3))
    chex.assert_trees_all_close(doubled[16:26], double(x, axis=0), atol=1e-6)
    chex.assert_trees_all_close(halve(doubled[11:31], axis=0), x, atol=1e-6)
    chex.assert_trees_all_close(
        2 * jnp.sum(halve(y, axis=0) * x), jnp.sum(y * doubled[11:31]), rtol=1e-5
    )
    chex.assert_trees_all_close(double(x.T, axis=1), double(x, axis=0).T, atol=1e-6)
    chex.assert_trees_all_close(halve(y.T, axis=1), halve(y, axis=0).T, atol=1e-6)
