"""Every reader of untrusted files: how to write a valid file, and how to read it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
from hypothesis import strategies as st
from PIL import Image

from rdm_jax import config
from rdm_jax.checkpoints.checksums import CHECKSUMS, damage, write_checksums
from rdm_jax.config import saved, validate
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import FORMATS, ImageSpec, open_image, to_uint8
from rdm_jax.data.manifest import MANIFEST
from rdm_jax.data.prepare import prepare
from rdm_jax.data.sources import open_source
from rdm_jax.evaluation import classifier, report
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.statistics import Statistics
from rdm_jax.evaluation.statistics_files import read_statistics, save_statistics
from rdm_jax.interop.import_export import open_weights
from rdm_jax.interop.torch_files import open_state_dict
from rdm_jax.runtime.npz import Npz
from rdm_jax.training import metric_writer
from tests.support.configs import tiny_config, write_images
from tests.support.evaluations import write_evaluation
from tests.support.published_files import write_pkl, write_pt, write_pth
from tests.support.torch_standins import dump_legacy, state_dict

SPACE = FeatureSpace("classifier", "digest", {"features": 4}, None, lambda params, images: images)
CLASSIFIER = {"dense": {"bias": np.ones(3, np.float32), "kernel": np.ones((2, 3), np.float32)}}
TENSORS = {"model.w": np.arange(4, dtype=np.float32), "model.b": np.ones((2, 3), np.float16)}


class Reader(NamedTuple):
    """A kind of file.

    Attributes:
      write: writes a valid file in a folder, and returns the path of the file to damage.
      read: reads all of it.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]


def _writer(write: Callable[[Path], object]) -> Callable[[Path], Path]:
    def of(folder: Path) -> Path:
        write(folder / "file")
        return folder / "file"

    return of


def _read_weights(path: Path) -> None:
    with open_weights(path) as weights:
        for name in weights.shapes:
            weights.read(name)


def _read_state_dict(path: Path) -> None:
    with open_state_dict(path) as tensors:
        for tensor in tensors.values():
            tensor.read()


def _read_npz(path: Path) -> None:
    with Npz(path) as file:
        for name in ("mu", "images"):
            file.read(name)


def _images(folder: Path) -> Path:
    write_images(folder / "images", count=4, size=4)
    return folder / "images"


def _archive(folder: Path, kind: str) -> Path:
    return Path(shutil.make_archive(str(folder / "images"), kind, _images(folder)))


def _labels(folder: Path) -> Path:
    names = [str(path.relative_to(folder / "images")) for path in _images(folder).glob("*/*.png")]
    (folder / "images/dataset.json").write_text(
        json.dumps({"labels": [[name, 0] for name in names]})
    )
    return folder / "images/dataset.json"


def _read_source(spec: str) -> None:
    source = open_source(spec)
    for index in range(len(source)):
        source.decode(index, channels=3, background=(0, 0, 0))


def _image(kind: str) -> Callable[[Path], Path]:
    """Of two frames, if the format supports it."""

    def write(path: Path) -> None:
        frames = [
            Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8))
            for n in range(2)
        ]
        frames[0].save(
            path,
            kind,
            **({"save_all": True, "append_images": frames[1:]} if kind != "jpeg" else {}),
        )

    return _writer(write)


def _read_image(path: Path) -> None:
    to_uint8(open_image(path.read_bytes()), 3, (0, 0, 0))


def _statistics(path: Path) -> None:
    random = np.random.default_rng(0).normal(size=(9, 4))
    gaussian = (random.mean(0), np.cov(random, rowvar=False))
    save_statistics(
        path,
        Statistics(
            {"set": "images", "images": 9}, 9, {"features": gaussian}, random.astype(np.float32)
        ),
        SPACE,
    )


def _classifier(path: Path) -> None:
    about = {
        "image_shape": [4, 4, 3],
        "class_names": ["a", "b"],
        "trained_on": {},
        "accuracy": None,
    }
    named = {
        jax.tree_util.keystr(at): leaf
        for at, leaf in jax.tree_util.tree_leaves_with_path(CLASSIFIER)
    }
    safetensors.numpy.save_file(named, path, {"about": json.dumps(about)})


def _prepared(name: str) -> Callable[[Path], Path]:
    return lambda folder: (
        prepare(f"folder:{_images(folder)}", folder / "set", ImageSpec(4, 4)) / name
    )


def _read_prepared(path: Path) -> None:
    images = open_prepared(path.parent)
    images.batch(range(len(images)))


def _config(path: Path) -> None:
    path.write_text(json.dumps(config.to_dict(tiny_config(path.parent))))


def _shard(folder: Path) -> Path:
    prepare(f"folder:{_images(folder)}", folder / "set", ImageSpec(4, 4))
    return next((folder / "set").glob("*.array_record-*"))


def _metrics(folder: Path) -> Path:
    writer = metric_writer.MetricWriter(folder, 0)
    for step in range(4):
        writer.write(step, images=8 * step, loss=0.5)
    writer.close()
    return folder / "metrics.jsonl"


def _checksums(folder: Path) -> Path:
    (folder / "data").write_bytes(b"some data")
    write_checksums(folder)
    return folder / CHECKSUMS


READERS = {
    "pickle": Reader(
        _writer(lambda path: write_pkl(path, "EDMPrecond", {"img_channels": 3}, TENSORS)),
        _read_weights,
    ),
    "torch zip": Reader(
        _writer(lambda path: write_pt(path, "EDMPrecond", {"img_channels": 3}, TENSORS)),
        _read_weights,
    ),
    "torch arguments": Reader(
        _writer(lambda path: write_pth(path, {"model": "JiT-B/16", "img_size": 256}, TENSORS)),
        _read_weights,
    ),
    "torch legacy": Reader(
        _writer(lambda path: dump_legacy(path, state_dict(TENSORS))), _read_state_dict
    ),
    "safetensors": Reader(
        _writer(lambda path: safetensors.numpy.save_file(TENSORS, path, {"settings": "{}"})),
        _read_weights,
    ),
    "npz": Reader(
        lambda folder: (
            np.savez(folder / "file.npz", mu=np.ones(3), images=np.ones((2, 4, 4, 3), np.uint8)),
            folder / "file.npz",
        )[1],
        _read_npz,
    ),
    "config": Reader(
        _writer(_config), lambda path: validate.check_config(config.parse(saved.read_saved(path)))
    ),
    "manifest": Reader(_prepared(MANIFEST), _read_prepared),
    "features": Reader(_prepared("features.json"), _read_prepared),
    "dataset info": Reader(_prepared("dataset_info.json"), _read_prepared),
    "shard": Reader(_shard, _read_prepared),
    "labels": Reader(_labels, lambda path: _read_source(f"folder:{path.parent}")),
    "zip": Reader(lambda folder: _archive(folder, "zip"), lambda path: _read_source(f"zip:{path}")),
    "tar": Reader(lambda folder: _archive(folder, "tar"), lambda path: _read_source(f"tar:{path}")),
    **{
        kind: Reader(_image(kind), _read_image)
        for kind in ("png", "jpeg", "webp", "gif", "tiff", "avif")
        if kind.upper() in FORMATS
    },
    "evaluation": Reader(
        lambda folder: write_evaluation(folder / "evaluation", "samples", frechet_distance=1.5),
        report.read_section,
    ),
    "statistics": Reader(_writer(_statistics), lambda path: read_statistics(path, SPACE)),
    "classifier": Reader(
        _writer(_classifier), lambda path: classifier.read_parameters(path, CLASSIFIER)
    ),
    "metrics": Reader(_metrics, metric_writer.read),
    "checksums": Reader(_checksums, lambda path: damage(path.parent)),
}

# Where, as a share of the length; how many bytes go; and what comes in their place.
COMES = st.one_of(st.binary(max_size=16), st.sampled_from([b"../", b"{", b"[" * 5000, b"\\u0000"]))
CHANGE = st.tuples(st.floats(0, 1), st.integers(0, 64), COMES)
CHANGES = st.lists(CHANGE, min_size=1, max_size=4)


def changed(content: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """The content of a file after some changes."""
    for where, gone, come in changes:
        place = int(where * len(content))
        content = content[:place] + come + content[place + gone :]
    return content
