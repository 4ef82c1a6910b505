"""Images per second from every kind of source, and how long training waits for them, as tables.

    python -m experiments.benchmarks.data --folder PATH --emoji package/assets

Without --folder the images are random, with a spectrum like a photograph's. The pipeline is that of
training, in batches of 32. All files are written to a temporary directory, and read from the file
system's cache; the overhead of records weighs more the fewer there are. A config whose data is
missing is listed instead of measured.
"""

import collections
import dataclasses
import importlib.metadata
import itertools
import json
import platform
import tempfile
import time
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from PIL import Image

from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.config.load import load_config
from rdm_jax.data.cell_sums import folder_of
from rdm_jax.data.image_sets import ImageSet, open_prepared
from rdm_jax.data.images import ImageSpec, encode, fit
from rdm_jax.data.pipeline import TrainIterator, train_iterator
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import ENCODINGS, Encoding
from rdm_jax.data.source import DecodedSource
from rdm_jax.data.sources import cores, open_source
from rdm_jax.data.write_sums import add_sums
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.random_streams import root_key
from rdm_jax.stage_datasets import open_sets
from rdm_jax.training.metric_buffer import STEPS_IN_FLIGHT
from rdm_jax.training.program import PROGRAMS

_FOLDER = flags.DEFINE_string("folder", "", "Images to read; '' for random ones.")
_IMAGES = flags.DEFINE_integer("images", 256, "How many of them, evenly chosen.")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "How long to time each thing.")
_CONFIGS = flags.DEFINE_list(
    "configs", ["configs/digits.py", "configs/emoji_small.py:tiny"], "Their training is timed."
)
_EMOJI = flags.DEFINE_string(
    "emoji", "", "Folder of emoji, for the configs that train on them; '' for their own."
)

SIZES, BATCH, QUALITY, WORKERS = (64, 256), 32, 95, 2
WARM_UP = 16  # batches or steps that are not timed: more than workers prefetch


def random_pictures(count: int) -> Iterator[np.ndarray]:
    """Images that PNG and JPEG compress about as well as photographs.

    They have a falling spectrum, little colour, and less noise.
    """
    rng, size = np.random.default_rng(0), max(SIZES)
    frequency = np.maximum(np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)), 1 / size)
    for _ in range(count):
        smooth = np.fft.irfft2(
            np.fft.rfft2(rng.standard_normal((4, size, size))) / frequency**1.5, (size, size)
        )
        smooth /= smooth.std((1, 2), keepdims=True)
        pixels = 128 + 60 * smooth[:1] + 10 * smooth[1:] + rng.standard_normal((3, size, size))
        yield np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def pictures() -> tuple[str, Iterator[np.ndarray]]:
    """What the images are, and their pixels."""
    if not _FOLDER.value:
        return f"{_IMAGES.value} random images", random_pictures(_IMAGES.value)
    source = open_source(f"folder:{_FOLDER.value}", skip_bad=True)
    chosen = np.linspace(0, len(source) - 1, min(_IMAGES.value, len(source))).astype(int).tolist()
    decoded = (source.decode(index, channels=3, background=(255, 255, 255)) for index in chosen)
    return f"{len(chosen)} of {len(source):,} images of {_FOLDER.value}", decoded


def write_files(images: Iterator[np.ndarray], root: Path) -> None:
    """Writes folders of PNG and JPEG of every size, and zips of the PNGs in EDM's layout."""
    places = [(size, kind, root / f"{size}" / kind) for size in SIZES for kind in ("png", "jpeg")]
    for _, _, place in places:
        place.mkdir(parents=True)
    for number, pixels in enumerate(images):
        for size, kind, place in places:
            (place / f"img{number:08d}.{kind}").write_bytes(
                encode(fit(pixels, ImageSpec(size, size)), kind, QUALITY)
            )
    for size in SIZES:
        files = files_in(root / f"{size}" / "png")
        with zipfile.ZipFile(root / f"{size}" / "png.zip", "w", zipfile.ZIP_STORED) as archive:
            for file in files:
                archive.write(file, f"00000/{file.name}")
            labels = [[f"00000/{file.name}", number % 10] for number, file in enumerate(files)]
            archive.writestr("dataset.json", json.dumps({"labels": labels}))


def files_in(place: Path) -> list[Path]:
    """A file itself, or the images or shards in a folder, in order."""
    return (
        [place]
        if place.is_file()
        else sorted(path for path in place.iterdir() if path.is_file() and path.suffix != ".json")
    )


def mean_bytes(place: Path, images: int) -> float:
    """Bytes per image on the disk."""
    return sum(file.stat().st_size for file in files_in(place)) / images


def pillow_alone(files: list[Path]) -> Generator[None]:
    """Decodes files endlessly, and yields after every batch."""
    endless = itertools.cycle(files)
    while True:
        for file in itertools.islice(endless, BATCH):
            with Image.open(file) as image:
                np.asarray(image.convert("RGB"))
        yield


def speed(batches: Generator | TrainIterator) -> float:
    """Images per second; closes the iterator."""
    for _ in range(WARM_UP):
        next(batches)
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < _SECONDS.value:
        next(batches)
        count += 1
    batches.close()
    return count * BATCH / seconds


def set_cells(images: ImageSet, place: Path) -> list[str]:
    """Cells of a set that is read from a path by the pipeline of training."""
    iterators = (
        train_iterator(images, batch_size=BATCH, seed=0, workers=workers)
        for workers in (0, WORKERS)
    )
    return [
        f"{mean_bytes(place, len(images)):,.0f}",
        *(f"{speed(iterator):,.0f}" for iterator in iterators),
    ]


def decoding_set(spec: str, form: ImageSpec) -> ImageSet:
    """A set whose images are decoded each time they are read."""
    source = open_source(spec)
    return ImageSet(
        DecodedSource(source, form), (form.height, form.width, form.channels), source.class_names
    )


def cells_by_kind(root: Path, size: int) -> dict[str, list[str]]:
    """Bytes per image, and images per second without and with workers, by kind of source."""
    form, cells = ImageSpec(size, size), {}
    for kind in ("png", "jpeg"):
        files = files_in(root / kind)
        alone = f"{speed(pillow_alone(files)):,.0f}"
        cells[f"Pillow alone, one thread, {kind}"] = [
            f"{mean_bytes(root / kind, len(files)):,.0f}",
            alone,
            "-",
        ]
        cells[f"folder of {kind}"] = set_cells(
            decoding_set(f"folder:{root / kind}", form), root / kind
        )
    cells["zip of png"] = set_cells(decoding_set(f"zip:{root / 'png.zip'}", form), root / "png.zip")
    for kind in ENCODINGS:
        place = prepare(
            f"folder:{root / 'png'}",
            root / f"records_{kind}",
            form,
            encoding=Encoding(kind, QUALITY),
        )
        cells[f"records, {kind}"] = set_cells(open_prepared(place), place)
    images = open_prepared(place, cache_bytes=2**40)
    in_memory = f"{speed(train_iterator(images, batch_size=BATCH, seed=0)):,.0f}"
    cells["decoded in memory"] = [f"{images.nbytes / len(images):,.0f}", in_memory, "-"]
    return cells


def first_stage_rows(root: Path) -> Iterator[list[str]]:
    """Cells of what stage 1 can read of a prepared set: the full records, or sums of cells."""
    small, large = SIZES
    places = {kind: root / f"records_{kind}" for kind in ENCODINGS}
    sets = {f"records, {kind}": (open_prepared(place), place) for kind, place in places.items()}
    cell, place = large // small, places["raw"]
    add_sums(place, [cell], check_stop=lambda: None)
    sums = open_prepared(place, cells=[cell]).of_cells(cell)
    sets[f"sums of {cell} x {cell}"] = (sums, folder_of(place, cell))
    for name, (images, folder) in sets.items():
        stored, *rates = set_cells(images, folder)
        yield [name, stored, f"{images.nbytes // len(images):,}", *rates]


def load(name: str, folder: Path) -> configs.Config:
    """A config by its name on the command line; data that is not prepared goes to the folder."""
    config = load_config(name)
    data, elsewhere = config.data, str(folder / Path(name.partition(":")[0]).stem)
    if data.source.startswith("emoji:") and _EMOJI.value:
        data = dataclasses.replace(data, source=f"emoji:{_EMOJI.value}", directory=elsewhere)
    elif data.directory and not (Path(data.directory) / "dataset_info.json").is_file():
        data = dataclasses.replace(data, directory=elsewhere)
    return dataclasses.replace(config, data=data)


def training_speed(config: configs.Config, number: int, images: ImageSet) -> tuple[float, float]:
    """Images per second in training, and the share of time spent waiting for them."""
    stage = config.stage(number)
    images = images.of_cells(images.image_shape[0] // stage.resolution[0])
    size = stage.training.batch_size
    mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp)
    program = PROGRAMS[config.parallel.mode](
        stage,
        images.image_shape,
        len(images.class_names),
        root_key(0),
        mesh,
        cell=images.cell,
    )
    state = program.place(program.init(root_key(0)))
    program.compile()
    iterator = train_iterator(
        images,
        batch_size=size,
        seed=0,
        process_index=0,
        process_count=1,
        workers=config.data.workers,
        worker_timeout=config.data.worker_timeout,
    )
    position = np.arange(size, dtype=np.int32)
    pending: collections.deque = collections.deque()
    began, waited = float("inf"), 0.0
    for step in itertools.count():
        asked = time.perf_counter()
        if step == WARM_UP:
            began, waited = asked, 0.0
        if asked - began > _SECONDS.value:
            break
        batch = program.put(next(iterator) | {"position": position})
        waited += time.perf_counter() - asked
        state, values = program(state, batch)
        pending.append(values)
        if len(pending) > STEPS_IN_FLIGHT:
            jax.device_get(pending.popleft())
    iterator.close()
    seconds = asked - began
    return (step - WARM_UP) * size / seconds, waited / seconds


def training_rows(name: str, folder: Path) -> Iterator[list[str]]:
    """Cells of every stage of a config, or the reason why it is not measured."""
    try:
        config = load(name, folder)
        sets = open_sets(config, range(1, len(config.stages) + 1))
    except InputError as error:
        yield [f"{name}: not measured: {error}"]
        return
    for number, images in sets.items():
        rate, share = training_speed(config, number, images)
        kept = "memory" if images.is_cached else f"records, {config.data.encoding}"
        yield [
            name,
            str(number),
            " x ".join(map(str, images.image_shape)),
            kept,
            f"{rate:,.0f}",
            f"{share:.2%}",
        ]


def main() -> None:
    """Prints the tables."""
    logging.set_verbosity(logging.WARNING)
    what, images = pictures()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("pillow", "grain", "jax")]
    print(
        ", ".join([f"{cores()} cores", f"python {platform.python_version()}", *versions, what])
        + "\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_files(images, Path(folder))
        by_size = [cells_by_kind(Path(folder, f"{size}"), size) for size in SIZES]
        headings = [
            f"{size} x {size}: bytes | images/s, {cores()} threads | images/s, {WORKERS} workers"
            for size in SIZES
        ]
        print("| | " + " | ".join(headings) + " |\n|" + "---|" * (1 + 3 * len(SIZES)))
        for kind in by_size[0]:
            print(
                "| "
                + " | ".join([kind, *itertools.chain(*(cells[kind] for cells in by_size))])
                + " |"
            )
        columns = ("stage 1 reads", "bytes stored", "bytes to the device")
        print(f"\n| {' | '.join((*columns, *headings[-1].split(' | ')[1:]))} |\n|{'---|' * 5}")
        for row in first_stage_rows(Path(folder, f"{max(SIZES)}")):
            print("| " + " | ".join(row) + " |", flush=True)
        print(f"\n{jax.device_count()} x {jax.devices()[0].device_kind}\n")
        columns = ("config", "stage", "images", "read from", "images/s", "waiting for data")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in itertools.chain.from_iterable(
            training_rows(name, Path(folder)) for name in _CONFIGS.value
        ):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    command(main)
