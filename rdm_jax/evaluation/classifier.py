"""A small classifier of a data set's own labels: features where Inception is not there, or knows
nothing of the data."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, parse_json
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.random_streams import root_key

safetensors = lazy_import("safetensors", "weights")
safetensors_numpy = lazy_import("safetensors.numpy", "weights")

FEATURES, WIDTHS = 64, (32, 64, 64)
IMAGES_SHOWN, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 40_000, 100, 2e-3, 0.01


class Classifier(nnx.Module):
    """Three strided convolutions, the mean over a 4 x 4 grid of what they see, and two dense
    layers.

    The first one's stride grows with images above 64 pixels, which would cost minutes otherwise; it
    sees every pixel still.
    """

    def __init__(self, image_shape: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
        strided = lambda by, *widths: nnx.Conv(*widths, (by + 1, by + 1), strides=by, rngs=rngs)  # noqa: E731
        self.conv1 = strided(max(2, min(image_shape[:2]) // 32), image_shape[-1], WIDTHS[0])
        self.conv2, self.conv3 = strided(2, WIDTHS[0], WIDTHS[1]), strided(2, WIDTHS[1], WIDTHS[2])
        self.to_features = nnx.Linear(16 * WIDTHS[-1], FEATURES, rngs=rngs)
        self.to_logits = nnx.Linear(FEATURES, classes, rngs=rngs)

    def __call__(
        self, images: UInt8[Array, "b h w c"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b n"]]:
        """Features and logits, float32."""
        x = images.astype(jnp.float32) / 127.5 - 1
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(convolution(x))
        x = jax.image.resize(x, (len(x), 4, 4, x.shape[-1]), "linear").reshape(
            len(x), -1
        )  # averages, where it makes smaller
        features = nnx.relu(self.to_features(x))
        # Of mean square 1, as a kernel distance has no unit, and features that grow with training
        # would decide its size.
        features *= jax.lax.rsqrt(jnp.mean(features**2, axis=1, keepdims=True) + 1e-6)
        return features, self.to_logits(features)


def classifier_space(
    images: ImageSet,
    held_out: ImageSet | None,
    path: Path,
    *,
    train: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> FeatureSpace:
    """The classifier in a file; one that is not there is trained, if `train`, and written.

    Args:
      images: to learn from; a classifier from a file must have been made for images of this shape
        and these classes.
      held_out: images that tell how good it is; None if there are none.
      path: of the file, safetensors.
      train: whether one that is not there is trained.
      check_stop: called between steps of that training; what it raises ends the work, and the next
        call begins it anew.

    Raises:
      InputError: the data has no classes, or the file is not there (without `train`), damaged, or
        of other classes or images.
    """
    if len(images.class_names) < 2:
        would_do = "'inception', or data in class folders,"
        raise InputError(
            f"config.evaluation.features='classifier' needs classes, and the data has none; {would_do} would do."
        )
    if not path.is_file() and not train:
        raise InputError(
            f"config.evaluation.weights={str(path)!r} is no file; a classifier that an evaluation wrote would do."
        )
    graph, abstract = nnx.split(_build(images), nnx.Param)
    if train and not _is_of(images, path, abstract):
        _write(path, _trained(graph, abstract, images, check_stop), images, held_out, graph)
    params, about = read_parameters(path, abstract)
    if about["image_shape"] != list(images.image_shape):
        found = f"{path} is a classifier of images of shape {about['image_shape']}"
        raise InputError(f"{found}; one of {list(images.image_shape)} would do.")
    theirs, ours = Classes(tuple(about["class_names"])), Classes(images.class_names)
    if theirs != ours:
        raise InputError(
            f"{path} is a classifier of the classes {theirs}; one of {ours}, in this order, would do."
        )
    log.info(
        "evaluation: features of the classifier in %s, which names %s of held-out images rightly",
        path,
        about["accuracy"],
    )

    def apply(params: Any, images: Array) -> dict[str, Array]:
        features, logits = nnx.merge(graph, params)(images)
        return {"features": features, "logits": logits}

    sizes = {"features": FEATURES, "logits": len(images.class_names)}
    return FeatureSpace("classifier", _digest(params), sizes, params, apply, images.class_names)


def _is_of(images: ImageSet, path: Path, abstract: Any) -> bool:
    """Whether a file has a classifier that was trained on these very images."""
    if not path.is_file():
        return False
    try:
        _, about = read_parameters(path, abstract)
        if about["trained_on"] == _trained_on(images):
            return True
        reason = "it was trained on other images"
    except InputError as error:
        reason = str(error)
    log.info("evaluation: the classifier is trained again: %s", reason)
    return False


def _trained_on(images: ImageSet) -> dict[str, Any]:
    return {"images": len(images), "fingerprint": images.fingerprint}


def _build(images: ImageSet) -> Classifier:
    return Classifier(images.image_shape, len(images.class_names), rngs=nnx.Rngs(root_key(0)))


def _trained(graph: Any, params: Any, images: ImageSet, check_stop: Callable[[], None]) -> Any:
    """Parameters after training, with random shifts by up to a sixteenth; the run's seed has no
    part in it."""
    steps, most = IMAGES_SHOWN // BATCH_SIZE, max(images.image_shape[0] // 16, 1)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def shift(image: Array, key: Array) -> Array:
        return jnp.roll(image, jax.random.randint(key, (2,), -most, most + 1), (0, 1))

    @jax.jit
    def step(params, moments, batch, key):
        shown = jax.vmap(shift)(batch["image"], jax.random.split(key, BATCH_SIZE))

        def loss(params):
            logits = nnx.merge(graph, params)(shown)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    random, order = np.random.default_rng(0), np.empty(0, int)
    moments, began = optimizer.init(params), time.perf_counter()
    with progress(steps * BATCH_SIZE, "training the classifier") as bar:
        for number in range(steps):
            check_stop()
            while len(order) < BATCH_SIZE:
                order = np.concatenate([order, random.permutation(len(images))])
            params, moments = step(
                params, moments, images.batch(order[:BATCH_SIZE]), root_key(number)
            )
            order = order[BATCH_SIZE:]
            bar.update(BATCH_SIZE)
    log.info("evaluation: classifier trained in %.1f s", time.perf_counter() - began)
    return params


def _write(
    path: Path, params: Any, images: ImageSet, held_out: ImageSet | None, graph: Any
) -> None:
    about = {
        "image_shape": images.image_shape,
        "class_names": images.class_names,
        "trained_on": _trained_on(images),
        "accuracy": _accuracy(graph, params, held_out) if held_out else None,
    }
    with atomic_write(path) as partial:
        partial.write_bytes(
            safetensors_numpy.save(_named(params), metadata={"about": json.dumps(about)})
        )


def _accuracy(graph: Any, params: Any, images: ImageSet) -> float:
    right = 0
    for first in range(0, len(images), BATCH_SIZE):
        batch = images.batch(np.arange(first, min(first + BATCH_SIZE, len(images))))
        logits = nnx.merge(graph, params)(jnp.asarray(batch["image"]))[1]
        right += int((np.asarray(logits).argmax(1) == batch["label"]).sum())
    return right / len(images)


def read_parameters(path: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Parameters like `abstract`, and what is known of them. Raises InputError where a file has
    none."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = parse_json((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        params = jax.tree.map_with_path(
            lambda keys, _: jnp.asarray(tensors[jax.tree_util.keystr(keys)]), abstract
        )
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype and jnp.isfinite(a).all(),
            params,
            abstract,
        )
        fields = {"image_shape", "class_names", "trained_on", "accuracy"} <= about.keys()
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise InputError(
            f"{path} is no classifier ({error}); one that an evaluation has written would do."
        ) from error
    if not fields or not all(jax.tree.leaves(same)):
        raise InputError(
            f"{path} is another classifier; one that an evaluation of such images has written would do."
        )
    return params, about


def _named(params: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(_named(params).items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
