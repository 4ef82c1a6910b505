"""A small classifier of a data set's own labels.

It gives features for data that networks trained on photographs do not know.
"""

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
from rdm_jax.runtime.lazy import import_library, lazy_import
from rdm_jax.runtime.random_streams import root_key

safetensors = lazy_import("safetensors", "weights")
safetensors_numpy = lazy_import("safetensors.numpy", "weights")

FEATURES, WIDTHS = 64, (32, 64, 64)
IMAGES_SHOWN, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 40_000, 100, 2e-3, 0.01


class Classifier(nnx.Module):
    """Three strided convolutions, pooling to a 4 x 4 grid, and two dense layers.

    The first stride grows with the image size above 64 pixels, to bound the cost; its kernel grows
    too, so that every pixel is seen.
    """

    def __init__(self, image_shape: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
        def convolution(stride: int, inputs: int, outputs: int) -> nnx.Conv:
            kernel = (stride + 1, stride + 1)
            return nnx.Conv(inputs, outputs, kernel, strides=stride, rngs=rngs)

        self.conv1 = convolution(max(2, min(image_shape[:2]) // 32), image_shape[-1], WIDTHS[0])
        self.conv2 = convolution(2, WIDTHS[0], WIDTHS[1])
        self.conv3 = convolution(2, WIDTHS[1], WIDTHS[2])
        self.to_features = nnx.Linear(16 * WIDTHS[-1], FEATURES, rngs=rngs)
        self.to_logits = nnx.Linear(FEATURES, classes, rngs=rngs)

    def __call__(
        self, images: UInt8[Array, "b h w c"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b n"]]:
        """Returns features (b, 64) and logits (b, classes), float32."""
        x = images.astype(jnp.float32) / 127.5 - 1
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(convolution(x))
        # With antialiasing, "linear" averages when it shrinks.
        x = jax.image.resize(x, (len(x), 4, 4, x.shape[-1]), "linear").reshape(len(x), -1)
        features = nnx.relu(self.to_features(x))
        # Normalised to mean square 1: a kernel distance depends on the scale of the features, which
        # grows with training.
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
    """The features of a classifier in a file; `train` makes a missing one.

    Args:
      images: the training set. A classifier from a file must have been made for images of this
        shape and these classes.
      held_out: images to measure its accuracy on; None if there are none.
      path: of the file, safetensors.
      train: whether to train a missing classifier, or one of other images, and write it.
      check_stop: called between training steps; what it raises ends the training, and the next call
        starts it again.

    Raises:
      InputError: the data has no classes, or the file is missing (without `train`), damaged, or of
        other classes or images.
    """
    check_trainable(images)
    if not path.is_file() and not train:
        raise InputError(
            f"config.evaluation.weights={str(path)!r} is not a file",
            "Use a classifier that an evaluation has written.",
        )
    graph, abstract = nnx.split(_build(images), nnx.Param)
    if train and not _is_of(images, path, abstract):
        _write(path, _trained(graph, abstract, images, check_stop), images, held_out, graph)
    params, about = read_parameters(path, abstract)
    if about["image_shape"] != list(images.image_shape):
        raise InputError(
            f"{path} is a classifier of images of shape {about['image_shape']}",
            f"Use one of {list(images.image_shape)}.",
        )
    theirs, ours = Classes(tuple(about["class_names"])), Classes(images.class_names)
    if theirs != ours:
        raise InputError(
            f"{path} is a classifier of the classes {theirs}", f"Use one of {ours}, in this order."
        )
    accuracy = about["accuracy"]
    log.info("evaluation: features of the classifier in %s, held-out accuracy %s", path, accuracy)

    def apply(params: Any, images: Array) -> dict[str, Array]:
        features, logits = nnx.merge(graph, params)(images)
        return {"features": features, "logits": logits}

    sizes = {"features": FEATURES, "logits": len(images.class_names)}
    return FeatureSpace("classifier", _digest(params), sizes, params, apply, images.class_names)


def check_trainable(images: ImageSet) -> None:
    """Raises InputError where no classifier can be trained: no classes, or no library."""
    if len(images.class_names) < 2:
        raise InputError(
            "config.evaluation.features='classifier' needs classes, and the data has none",
            "Use 'inception' or 'efficientnet', or data in class folders.",
        )
    import_library("safetensors", "weights")


def _is_of(images: ImageSet, path: Path, abstract: Any) -> bool:
    """Whether a file has a classifier that was trained on these images."""
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
    """Returns trained parameters; they do not depend on the run's seed.

    Images are shifted at random by up to a sixteenth of their height.
    """
    steps = IMAGES_SHOWN // BATCH_SIZE
    most = max(images.image_shape[0] // 16, 1)
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
    moments = optimizer.init(params)
    began = time.perf_counter()
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
    correct = 0
    for first in range(0, len(images), BATCH_SIZE):
        batch = images.batch(np.arange(first, min(first + BATCH_SIZE, len(images))))
        logits = nnx.merge(graph, params)(jnp.asarray(batch["image"]))[1]
        correct += int((np.asarray(logits).argmax(1) == batch["label"]).sum())
    return correct / len(images)


def read_parameters(path: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Reads parameters like `abstract`, and the record beside them.

    Raises:
      InputError: the file is damaged, or has other parameters.
    """
    fix = "Use a classifier that an evaluation of such images has written."
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
        complete = {"image_shape", "class_names", "trained_on", "accuracy"} <= about.keys()
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise InputError(f"{path} is not a classifier ({error})", fix) from error
    if not complete or not all(jax.tree.leaves(same)):
        raise InputError(f"{path} is another classifier", fix)
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
