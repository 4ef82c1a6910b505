"""Random images that several processes measure: `python -m tests.support.measured_images` is one of
two processes."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.gathering import Gatherer
from rdm_jax.evaluation.image_streams import ImageStream
from rdm_jax.runtime import console, distributed
from rdm_jax.runtime.errors import Interrupted
from rdm_jax.runtime.signals import StopOnSignal

COUNT, BATCH, SIZE, CLASSES = 75, 8, 6, 3
FEW = 5  # one batch, of which another process has none


def project(params, images):
    flat = images.reshape(len(images), -1) / 255.0
    return {
        "features": flat @ params[:, :SIZE],
        "spatial": flat @ params[:, 3:7],
        "logits": flat @ params[:, -CLASSES:],
    }


def space() -> FeatureSpace:
    params = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    sizes = {"features": SIZE, "spatial": 4, "logits": CLASSES}
    return FeatureSpace("projection", "0" * 64, sizes, params, project, ("a", "b", "c"))


class RandomStream(ImageStream):
    """75 images, the first of which are shown. A signal comes in the batch that has image `stops`,
    which one process alone reads."""

    names, batch_size = ("random",), BATCH

    def __init__(self, stop: StopOnSignal, stops: int = COUNT, count: int = COUNT):
        self.count = count
        random = np.random.default_rng(1)
        self._images = random.integers(0, 256, (COUNT, 4, 4, 1), np.uint8)
        self._labels = random.integers(-1, CLASSES, COUNT).astype(np.int32)
        self._stop, self._stops, self.about = stop, stops, {"set": "random"}
        self.read: list[int] = []

    def batch(self, first, count):
        self.read += range(first, first + count)
        if self._stops in range(first, first + count):
            self._stop.requested = 15
        here = slice(first, first + count)
        return {"random": self._images[here]}, self._labels[here]

    def shown(self):
        return np.asarray([n for n in (0, 9, 70) if n < self.count])


def gathered(folder: Path, stops: int = COUNT, count: int = COUNT):
    """The accumulator of all images, and the indices of those that this process has read."""
    stop = StopOnSignal()
    stream = RandomStream(stop, stops, count)
    return Gatherer(space(), 20, stop).gather(stream, folder)["random"], stream.read


def main() -> None:
    """Measures once straight, once stopped and resumed, and once stopped; prints the results."""
    port, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    console.show_log(quiet=number > 0)
    distributed.join(f"localhost:{port}", 2, number)
    found, read = gathered(folder / "straight")
    resumed = None
    for name in ("resumed", "left"):
        try:
            gathered(folder / name, stops=30)
        except Interrupted:
            continue
        raise AssertionError("not stopped")
    resumed, more = gathered(folder / "resumed")
    few, _ = gathered(folder / "few", count=FEW)
    random = np.random.default_rng(number)
    mine = random.standard_normal(1000) * 10.0 ** random.integers(-3, 4, 1000)
    sums = {"sum": distributed.add_up({"a": mine})["a"], "parts": distributed.allgather(bits(mine))}
    if number == 0:
        arrays = {f"straight/{k}": v for k, v in as_arrays(found).items()}
        arrays |= {f"resumed/{k}": v for k, v in as_arrays(resumed).items()}
        arrays |= {f"few/{k}": v for k, v in as_arrays(few).items()}
        np.savez(folder / "found.npz", **arrays)
        np.savez(folder / "sums.npz", **sums)
    print(json.dumps([read, more]))


def bits(values: np.ndarray) -> np.ndarray:
    """The bits of float64 as uint32, as JAX would round the values to float32."""
    return values.view(np.uint32)


def as_arrays(accumulator) -> dict[str, np.ndarray]:
    """The statistics of an accumulator and its pictures."""
    found = accumulator.statistics({})
    arrays = {"features": found.features, "energy": np.asarray(found.energy)}
    arrays["count"] = np.asarray(found.count)
    arrays |= {f"score {name}": np.asarray(value) for name, value in found.scores.items()}
    for name, (mean, covariance) in found.gaussians.items():
        arrays |= {f"mean {name}": mean, f"covariance {name}": covariance}
    shown = accumulator.pictures
    return arrays | {"pictures": np.stack([shown[n] for n in sorted(shown)])}


if __name__ == "__main__":
    main()
    jax.distributed.shutdown()
