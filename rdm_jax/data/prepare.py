"""Any source -> array_record files with a manifest, once, in the format of tensorflow-datasets and
without TensorFlow."""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.data.content import set_hash, total
from rdm_jax.data.images import CROPS, ImageSpec
from rdm_jax.data.left_out import by_reason, check_left_out, what_of
from rdm_jax.data.manifest import MANIFEST, VERSION, read_manifest, verify_files
from rdm_jax.data.records import Encoding, Shard, versions
from rdm_jax.data.source_record import Record, has_changed, record_of, save_record
from rdm_jax.data.sources import Source, check_apart, cores, open_source, same_source
from rdm_jax.runtime import locks
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.signals import obey_parent_alone

tfds = lazy_import("tensorflow_datasets", "data")
tfds_builder = lazy_import("rdm_jax.data.tfds_builder", "data")

# Images a shard, until there are so many shards; so that a kill costs seconds, and a large set is
# not a million files.
SHARD_IMAGES, MANY_SHARDS = 256, 1024
# Seconds of work in this process before others, which take a few to start, are started to help.
ALONE_SECONDS = 3.0
# What the listings that processes keep for themselves may take in all.
LISTINGS_BYTES = 8 * 2**30
# Pixels of no real image take a smaller share of themselves than one in so many, encoded.
LEAST_SHARE = {"raw": 20, "png": 20, "jpeg": 60}


def prepare(
    spec: str,
    directory: str | os.PathLike,
    form: ImageSpec,
    *,
    encoding: Encoding = Encoding(),  # noqa: B008
    skin_tones: str = "",
    classes: str = "auto",
    skip_bad: bool = False,
    max_left_out: float = 0.1,
    verify: bool = False,
    update: bool = False,
    apart_from: Sequence[Path] = (),
    check_stop: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a source as records, unless that is done already.

    The directory appears at the end, by one rename, or not at all. What a killed or refused run has
    finished stays in a hidden sibling of it, from which the next one goes on; the result is the
    same to the last bit. One process of a run calls this, the others wait for it.

    Args:
      spec, skin_tones, classes: as for `sources.open_source`; the spec is compared with that of an
        earlier run by `sources.same_source`.
      directory: what is to become the data set, as `tfds.builder_from_directory` and
        `image_sets.open_prepared` read it.
      form, encoding: what every image is brought to, and how it is kept.
      skip_bad: leave out images that cannot be used, and list them in the manifest, instead of
        refusing the set.
      max_left_out: the share of files that may be left out; a set without more of them, or without
        a whole class, is refused unless this is 1.
      verify: compare a set that was there already with the hashes in its manifest.
      update: compare a set that was there already with its source, and prepare it again where that
        has changed; the former one stays until the new one is complete.
      apart_from: folders that this program writes to, which must not be within the source, nor the
        source within them.
      check_stop: called after every shard; what it raises ends the work.

    Returns:
      The absolute path of the directory.

    Raises:
      InputError: a setting or an image cannot be used, the directory holds something else or a set
        prepared from other settings, it cannot be written, or the disk is full.
    """
    form.check()
    encoding.check()
    settings = _settings(spec, form, encoding, skin_tones, classes)
    directory = local_path(directory, "directory").resolve()
    try:
        _check_place(directory)
        if _is_prepared(directory, settings) and not update:
            _log_made(
                directory,
                "was prepared before; its source is not looked at (--mode=prepare --update compares the two)",
            )
            if verify:
                verify_files(directory)
            with contextlib.suppress(InputError, OSError):
                _remove_left_over(directory)
            return directory
        check_apart(spec, (directory, *apart_from))
        with _staging(directory) as staging:
            _restore_former(directory)
            prepared = _is_prepared(
                directory, settings
            )  # if not before, then by another process, which has let go of the lock
            if update or not prepared:
                source = open_source(
                    spec, skin_tones=skin_tones, classes=classes, skip_bad=skip_bad
                )
                record = record_of(source)
            if not prepared or (
                update and has_changed(directory, record, source.class_names, spec)
            ):
                check_left_out(source.skipped, len(source), source.lost, max_left_out, spec)
                shards = _shards(source, form, encoding, skip_bad, staging / "parts")
                about = _write_shards(shards, f"preparing {spec}", check_stop)
                _check_written(source, about, max_left_out, spec)
                _put(_assemble(source, record, settings, shards, about, staging / "set"), directory)
                os.rename(staging / "parts", staging / "used")
            shutil.rmtree(staging)
        _log_made(directory, "is prepared")
        if verify and prepared:
            verify_files(directory)
    except OSError as error:
        would_do = "space, or another place, would do."
        raise InputError(
            f"the data directory {directory} cannot be written ({error}); {would_do}"
        ) from error
    return directory


def _settings(
    spec: str, form: ImageSpec, encoding: Encoding, skin_tones: str, classes: str
) -> dict[str, Any]:
    """What two sets must have in common to be the same."""
    quality = {"quality": encoding.quality} if encoding.kind == "jpeg" else {}
    settings = {
        "source": spec,
        **dataclasses.asdict(form),
        "encoding": encoding.kind,
        **quality,
        "skin_tones": skin_tones,
    }
    return json.loads(json.dumps(settings | {"classes": classes}))


def _is_prepared(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether this very set is there; what else is there is refused, never overwritten."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    found = read_manifest(directory)["settings"]
    if same_source(str(found.get("source")), settings["source"]):
        found["source"] = settings["source"]
    keys = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
    if keys:
        differences = " and ".join(
            f"{key}={found.get(key)!r}, not {settings.get(key)!r}" for key in keys
        )
        raise InputError(
            f"{directory} was prepared with {differences}; another directory, or deleting it, would do."
        )
    return True


def _check_place(directory: Path) -> None:
    """Refuses a directory that could not appear by renaming another one."""
    if os.path.ismount(directory):
        raise InputError(
            f"the data directory {directory} is where a file system is mounted; a folder in it would do."
        )


def _hidden(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.incomplete")


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A hidden sibling of the directory, ours alone while a lock beside it is held (the lock dies
    with its process)."""
    staging = _hidden(directory)
    lock = staging.with_suffix(".lock")  # a folder's own lock is no other host's on NFS
    with contextlib.ExitStack() as held:
        try:
            while not _is_locked(lock, held):
                pass
        except locks.InUse as error:
            raise InputError(
                f"{directory} is being prepared by another process; waiting for that would do."
            ) from error
        staging.mkdir(exist_ok=True)
        try:
            yield staging
        finally:
            with contextlib.suppress(OSError):
                staging.rmdir()  # which only an empty one lets happen
            lock.unlink(
                missing_ok=True
            )  # while it is held; whoever has it open already looks again


def _is_locked(lock: Path, held: contextlib.ExitStack) -> bool:
    """Locks a file, which is made if need be; False where the process that had the lock has removed
    it meanwhile."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(lock.open("a"))
    if not locks.try_flock(file.fileno()):
        held.enter_context(locks.owner_file(lock.with_suffix(".owner")))
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _former(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.former")


def _put(made: Path, directory: Path) -> None:
    """Puts a set in its place; one that is there goes once the new one is there."""
    if directory.exists():
        os.rename(directory, _former(directory))
    os.rename(made, directory)
    shutil.rmtree(_former(directory), ignore_errors=True)


def _restore_former(directory: Path) -> None:
    """Mends what a kill between the two renames of `_put`, or after them, has left."""
    if _former(directory).exists() and not directory.exists():
        os.rename(_former(directory), directory)
    shutil.rmtree(_former(directory), ignore_errors=True)


def _remove_left_over(directory: Path) -> None:
    """Removes what a run that was killed in its last moment left beside a finished set; an update
    that goes on stays."""
    if _hidden(directory).exists() or _former(directory).exists():
        with _staging(directory) as staging:
            _restore_former(directory)
            if finished := len(list((staging / "parts").glob("*.array_record"))):
                about = (directory, f"{finished:,}", staging)
                log.info(
                    "data: an update of %s was interrupted; --update goes on with the %s files finished in %s",
                    *about,
                )
            else:
                shutil.rmtree(staging)


def _shards(
    source: Source, form: ImageSpec, encoding: Encoding, skip_bad: bool, parts: Path
) -> list[Shard]:
    """Divides a source into files to be written; what others left in their folder is removed."""
    parts.mkdir(exist_ok=True)
    each = max(SHARD_IMAGES, -(-len(source) // MANY_SHARDS))
    count = -(-len(source) // each)
    names = [f"{i:05d}-of-{count:05d}" for i in range(count)]
    for left_over in parts.iterdir():
        if left_over.stem not in names:
            left_over.unlink()
    _check_space(len(source), form, encoding, parts)
    return [
        Shard(
            source.part(places.tolist()), form, encoding, parts / f"{name}.array_record", skip_bad
        )
        for name, places in zip(names, np.array_split(np.arange(len(source)), count), strict=True)
    ]


def _check_written(
    source: Source, about: list[dict[str, Any]], max_left_out: float, spec: str
) -> None:
    """Refuses a set of which decoding has left too little, or nothing of a class."""
    skipped = _skipped(source, about)
    if len(skipped) == len(source.skipped):
        return
    left = np.sum([shard["of_class"] for shard in about], axis=0, dtype=int)
    lost = {source.class_names[label] for label in set(source.labels) if not left[label]}
    check_left_out(
        skipped, sum(shard["records"] for shard in about), {*lost, *source.lost}, max_left_out, spec
    )


def _skipped(source: Source, about: list[dict[str, Any]]) -> dict[str, str]:
    return {
        **source.skipped,
        **{name: reason for shard in about for name, reason in shard["skipped"].items()},
    }


def _assemble(
    source: Source,
    record: Record,
    settings: dict[str, Any],
    shards: list[Shard],
    about: list[dict[str, Any]],
    made: Path,
) -> Path:
    """Makes a data set, with its manifest, of finished shards; gives its directory."""
    skipped = _skipped(source, about)
    count = sum(shard["records"] for shard in about)
    if not count:
        reason = next(iter(skipped.values()))
        raise InputError(
            f"no image of {settings['source']} can be used ({reason}); another source would do."
        )
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    finished = [(shard["records"], part.path) for shard, part in zip(about, shards, strict=True)]
    builder = tfds_builder.RelayImages(finished, shards[0].features, settings["source"], made)
    with contextlib.redirect_stdout(io.StringIO()):  # It prints to stdout what we say better.
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    shape = (settings["height"], settings["width"], settings["channels"])
    manifest = {
        "version": VERSION,
        "settings": settings,
        "count": count,
        "classes": {
            name: sum(shard["of_class"][i] for shard in about)
            for i, name in enumerate(source.class_names)
        },
        "enlarged": sum(shard["enlarged"] for shard in about),
        "resampling": CROPS[settings["crop"]],
        "made_by": versions(),
        "content": set_hash(total(shard["content"] for shard in about), shape, source.class_names),
        "skipped": skipped,
        "skipped_by_reason": {reason: len(names) for reason, names in by_reason(skipped).items()},
        "class_numbers": {name: number for number, name in enumerate(source.class_names)},
        "shards": [
            {"file": path.name, **{key: shard[key] for key in ("records", "bytes", "sha256")}}
            for path, shard in zip(builder.shard_paths, about, strict=True)
        ],
    }
    save_record(Path(builder.data_path), record)
    with atomic_write(Path(builder.data_path) / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1))
    return Path(builder.data_path)


def _log_made(directory: Path, what: str) -> None:
    manifest = read_manifest(directory)
    log.info(
        "data: %s %s: %s images, files: %d",
        directory,
        what,
        f"{manifest['count']:,}",
        len(manifest["shards"]),
    )
    if manifest["enlarged"]:
        log.info(
            "data: %s of them are smaller than the size asked for and were enlarged",
            f"{manifest['enlarged']:,}",
        )
    if skipped := manifest["skipped"]:
        name, reason = next(iter(skipped.items()))
        most, total = (
            log.warning if 10 * len(skipped) > manifest["count"] else log.info,
            len(skipped) + manifest["count"],
        )
        about = (
            f"{len(skipped):,}",
            f"{total:,}",
            what_of(skipped),
            directory / MANIFEST,
            name,
            reason,
        )
        most("data: %s left out, of %s %s, listed in %s; the first: %s %s", *about)
    if lost := [name for name, count in manifest["classes"].items() if not count]:
        log.warning("data: there is no image of %d classes, such as %r", len(lost), lost[0])


def _check_space(count: int, form: ImageSpec, encoding: Encoding, parts: Path) -> None:
    """Catches what cannot go well; how much smaller than its pixels an encoded image is, nobody
    knows beforehand."""
    needed = count * form.height * form.width * form.channels // LEAST_SHARE[encoding.kind]
    needed, free = (
        needed - sum(file.stat().st_size for file in parts.iterdir()),
        shutil.disk_usage(parts).free,
    )
    if free < needed:
        raise OSError(f"{free / 2**20:.1f} MB free, {needed / 2**20:.1f} MB needed at the least")


def _write_shards(
    shards: list[Shard], description: str, check_stop: Callable[[], None]
) -> list[dict[str, Any]]:
    """Writes all shards, over the cores where that pays; those that were finished before are left
    as they are."""
    about: list[dict[str, Any]] = [{}] * len(shards)
    waiting, began = list(enumerate(shards)), time.perf_counter()
    with progress(sum(len(shard.source) for shard in shards), description) as bar:

        def note(number: int, written: dict[str, Any]) -> None:
            about[number] = written
            bar.update(len(shards[number].source))
            check_stop()

        processes = _process_count(shards)
        while (
            len(waiting) == 1
            or waiting
            and (processes == 1 or time.perf_counter() - began < ALONE_SECONDS)
        ):
            number, shard = waiting.pop(0)
            note(number, shard.write())
        if waiting:
            with _processes(min(processes, len(waiting)), check_stop) as pool:
                # Processes inherit what is blocked, so that Ctrl-C is this one's alone from their
                # first moment.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    futures = {pool.submit(shard.write): number for number, shard in waiting}
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                for future in concurrent.futures.as_completed(futures):
                    note(futures[future], future.result())
    return about


def _process_count(shards: list[Shard]) -> int:
    """One a core, but for fewer where each has to keep a large listing in memory."""
    each = sum(len(shard.source) for shard in shards) * shards[0].source.reader.memory_per_image
    return cores() if not each else max(1, min(cores(), LISTINGS_BYTES // each))


@contextlib.contextmanager
def _processes(count: int, check_stop: Callable[[], None]) -> Iterator[concurrent.futures.Executor]:
    # Spawned: a forked copy of a process whose threads hold locks may wait for them for ever.
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=obey_parent_alone
    )
    try:
        yield pool
    except BaseException as error:
        for process in (
            multiprocessing.active_children()
        ):  # What they have not finished counts for nothing: why wait?
            if process not in others:
                process.kill()
        check_stop()
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            would_do = (
                "more memory, or (in a script) `if __name__ == '__main__':`, and the same once more"
            )
            raise InputError(
                f"a process that was to read images has ended; {would_do} would do."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
