"""Faults 13 to 15: the order of the data under kills, failing workers, and damaged images and
archives."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.tiers import one_of_many
from tests.support import commands
from tests.support.checkpoints import assert_equal, state, steps
from tests.support.commands import GIB, STAGE, bounded, logged, run, start, wait_for
from tests.support.configs import write_images

NOTICED = 60  # seconds that a worker may take; on a busy machine it needs many to start
NOT_IN_MEMORY = ("--config.data.cache_gib=0",)

# Writes the index of every image, a line a batch, until it is killed.
READ_ON = """
import sys
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.pipeline import train_iterator
if __name__ == "__main__":
    directory, workers, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    batches = train_iterator(open_prepared(directory), batch_size=4, seed=9, workers=workers)
    batches.set_state({"next_index": first})
    for batch in batches:
        print(*batch["image"][:, 0, 0, 0], flush=True)
"""


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """23 prepared images; the colour of each is its index."""
    from rdm_jax.data.images import ImageSpec
    from rdm_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("numbered") / "images"
    folder.mkdir()
    for number in range(23):
        Image.new("RGB", (4, 4), (number,) * 3).save(folder / f"{number:02d}.png")
    return prepare(f"folder:{folder}", f"{folder}_prepared", ImageSpec(4, 4))


def read_until(numbered, script, workers: int, lines: list[int]) -> list[int]:
    """The indices delivered by a process that is killed after so many batches, and by the processes
    that resume."""
    script.write_text(READ_ON)
    seen: list[int] = []
    for count in lines:
        command = [sys.executable, str(script), str(numbered), str(workers), str(len(seen) // 4)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=commands.environment()
        ) as process:
            seen += [
                int(index)
                for line in itertools.islice(process.stdout, count)
                for index in line.split()
            ]
            children = workers_of(process)
            process.kill()
        assert all(ends(child) for child in children)
    return seen


def ends(process: int) -> bool:
    """Whether a process that is not our child ends, or becomes a zombie, within ten seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.long  # tests/data/test_pipeline.py has workers that are killed
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_13_order_of_two_epochs_with_kills(numbered, tmp_path, fault, workers):
    """12 batches of 4: two epochs of 23 images, and two images more."""
    seen = read_until(numbered, tmp_path / "read_on.py", workers, [3, 6, 3])
    assert seen == read_until(numbered, tmp_path / "read_on.py", 0, [12])
    assert sorted(seen[:23]) == sorted(seen[23:46]) == list(range(23))
    fault(13, 2, f"{workers} workers: every index once per epoch, in the undisturbed order")


def workers_of(process) -> list[int]:
    """The ids of the processes that a command started for decoding."""
    children = [
        c
        for task in Path(f"/proc/{process.pid}/task").glob("*/children")
        for c in task.read_text().split()
    ]
    return [
        int(child)
        for child in children
        if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_13_kill_training_with_workers(image_folder, tmp_path, fault, workers):
    """A kill in each epoch but the last (24 images, 3 batches of 8). Images that were decoded but
    not trained on are decoded again."""
    flags = (
        *STAGE,
        "--config.stage1.training.checkpoint_every=8",
        "--config.stage1.training.keep_newest=20",
    )
    run(image_folder, tmp_path / "undisturbed", *flags)  # which has the images in memory
    flags += (*NOT_IN_MEMORY, f"--config.data.workers={workers}")
    for epoch in range(6):
        process = start(image_folder, tmp_path / "run", *flags)

        def after(epoch=epoch):
            return any(step > 3 * epoch for step in steps(tmp_path / "run", sound=False))

        assert wait_for(after, process), process.communicate()
        children = workers_of(process)
        process.kill()
        process.communicate()
        assert len(children) >= workers and all(ends(child) for child in children)
    run(image_folder, tmp_path / "run", *flags)
    assert_equal(state(tmp_path / "run"), state(tmp_path / "undisturbed"))
    fault(
        13,
        6,
        f"training with {workers} workers, killed in 6 epochs: the end is bit-equal to one without workers",
    )


@pytest.mark.long  # tests/data/test_pipeline.py has the same within a process
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_14_worker_killed_or_hanging(image_folder, tmp_path, fault, sent, workers):
    flags = (
        *STAGE,
        *NOT_IN_MEMORY,
        f"--config.data.worker_timeout={NOTICED}",
        "--config.stage1.training.images=800",
    )
    run(image_folder, tmp_path / "undisturbed", *flags, "--config.data.workers=0")
    log = tmp_path / "log"
    with log.open("w") as stdout:
        process = start(
            image_folder,
            tmp_path / "run",
            *flags,
            f"--config.data.workers={workers}",
            stdout=stdout,
        )

    def noticed():
        return "restarting the workers" in log.read_text()

    assert wait_for(logged(tmp_path / "run", 16), process), process.communicate()
    assert not noticed()
    os.kill(workers_of(process)[-1], sent)
    began = time.monotonic()
    assert wait_for(noticed, process), (log.read_text(), process.communicate())
    took = time.monotonic() - began
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0 and took < 2 * NOTICED, (took, log.read_text(), stderr)
    assert_equal(state(tmp_path / "run", 100), state(tmp_path / "undisturbed", 100))
    what = f"one of {workers} {'killed' if sent == signal.SIGKILL else 'hanging'}"
    fault(
        14,
        1,
        f"{what}: noticed after {took:.0f} s of {NOTICED}, the others continue, the end is bit-equal",
    )


def encoded(kind: str) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).save(
            file, kind
        )
        return file.getvalue()


def bomb(side: int = 13_000) -> bytes:
    """A valid PNG of side x side pixels, one bit each, in some kilobytes; just within Pillow's own
    limit."""

    def chunk(name, data):
        return (
            len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes(side * (1 + -(-side // 8))))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def archive(**members: bytes) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
            for name, content in members.items():
                made.writestr(zipfile.ZipInfo(name) if name.startswith("/") else name, content)
        return file.getvalue()


IMAGES = {
    "empty": b"",
    **{
        f"a truncated {kind}": encoded(kind)[: len(encoded(kind)) // 2]
        for kind in ("png", "jpeg", "webp", "gif", "tiff", "ppm")
    },
    "of noise": np.random.default_rng(0).bytes(1000),
    "a text": b"no image at all",
    "a bomb": bomb(),
    "a flipped bit": encoded("png")[:100] + bytes([encoded("png")[100] ^ 1]) + encoded("png")[101:],
}
# What is in them (None: what is made when it is needed), and what the refusal names.
ARCHIVES = {
    "truncated": (archive(**{"a/0.png": encoded("png")})[:-30], "hostile.zip"),
    "not one": (b"PK but no archive", "hostile.zip"),
    "a member outside": (
        archive(**{"../../outside.png": encoded("png"), "a/0.png": encoded("png")}),
        "../../outside.png",
    ),
    "an absolute member": (
        archive(**{"/tmp/outside.png": encoded("png"), "a/0.png": encoded("png")}),
        "/tmp/outside.png",
    ),
    "a bomb": (None, "a/0.png"),
    "a damaged member": (
        archive(**{"a/0.png": encoded("png")}).replace(encoded("png")[40:60], bytes(20)),
        "a/0.png",
    ),
    "labels of no file": (
        archive(**{"dataset.json": b'{"labels": [["nothing.png", 1]]}', "a.png": encoded("png")}),
        "nothing.png",
    ),
    "hostile labels": (
        archive(**{"dataset.json": b"[" * 10**6, "a.png": encoded("png")}),
        "dataset.json",
    ),
    "no images": (archive(**{"a.txt": b"text"}), "hostile.zip"),
}
PREPARE = ("--mode=prepare",)


def refused(folder, source: str, name: str) -> str:
    """The error message, within limits of time and memory; asserts that no files are left
    behind."""
    before = set(folder.rglob("*"))
    flags = (*PREPARE, f"--config.data.source={source}", f"--config.data.directory={folder / name}")
    stderr = bounded(folder / "images", folder / "run", *flags)
    left = {
        path
        for path in set(folder.rglob("*")) - before
        if "run" not in path.parts and ".incomplete" not in str(path)
    }
    assert not left, left
    return stderr


@pytest.mark.parametrize("kind", one_of_many(IMAGES, "a bomb", pytest.mark.second))
def test_15_damaged_image(tmp_path, fault, kind):
    write_images(tmp_path / "images", count=4)
    (tmp_path / "images/a/bad.png").write_bytes(IMAGES[kind])
    refusal = refused(tmp_path, f"folder:{tmp_path / 'images'}", "set")
    assert "a/bad.png" in refusal and (kind != "a bomb" or "Use at most" in refusal)
    fault(
        15,
        1,
        f"an image that is {kind}: refused by its name, in bounded time and memory, nothing written",
    )


@pytest.mark.parametrize("kind", one_of_many(ARCHIVES, "a member outside"))
def test_15_damaged_archive(tmp_path, fault, kind):
    content, named = ARCHIVES[kind]
    content = archive(**{"a/0.png": bytes(2 * GIB)}) if content is None else content
    (tmp_path / "hostile.zip").write_bytes(content)
    assert named in refused(tmp_path, f"zip:{tmp_path / 'hostile.zip'}", "set")
    assert not Path("/tmp/outside.png").exists() and not (tmp_path.parent / "outside.png").exists()
    fault(
        15,
        1,
        f"an archive, {kind}: refused by its name, in bounded time and memory, nothing written",
    )
