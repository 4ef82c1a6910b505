"""Prepares a source once, as array_record files with a manifest.

The format is that of tensorflow-datasets; TensorFlow is not needed.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.data import cell_sums
from rdm_jax.data.cell_sums import cells_in, fix_of, folder_of
from rdm_jax.data.content import set_hash, total
from rdm_jax.data.images import CROPS, ImageSpec
from rdm_jax.data.latents import verify_latents
from rdm_jax.data.left_out import by_reason, check_left_out, reasons
from rdm_jax.data.manifest import DAMAGED, MANIFEST, VERSION, read_manifest, verify_files
from rdm_jax.data.records import Encoding, ImageShard
from rdm_jax.data.shards import versions
from rdm_jax.data.source import Source
from rdm_jax.data.source_record import Record, has_changed, record_of, save_record
from rdm_jax.data.sources import check_apart, open_source, same_source
from rdm_jax.data.staging import (
    PARTS,
    check_place,
    publish,
    remove_leftovers,
    restore_former,
    staging_folder,
)
from rdm_jax.data.text_table import verify_tables
from rdm_jax.data.write_shards import write_shards
from rdm_jax.data.write_sums import add_sums, write_sums
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, remedy
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.lazy import import_library, lazy_import
from rdm_jax.text.encoders import TextEncoder

tfds = lazy_import("tensorflow_datasets", "data")
tfds_builder = lazy_import("rdm_jax.data.tfds_builder", "data")

DEFAULT_ENCODING = Encoding()
# Images per shard, up to so many shards: a kill costs seconds, and a large set is not a million
# files.
SHARD_IMAGES = 256
MANY_SHARDS = 1024
# The highest compression ratio of real images, by encoding.
MAX_COMPRESSION = {"raw": 20, "png": 20, "jpeg": 60}


def prepare(
    spec: str,
    directory: str | os.PathLike,
    form: ImageSpec,
    *,
    encoding: Encoding = DEFAULT_ENCODING,
    skin_tones: str = "",
    classes: str = "auto",
    captions: str = "none",
    encoder: TextEncoder | None = None,
    skip_bad: bool = False,
    max_left_out: float = 0.1,
    verify: bool = False,
    update: bool = False,
    cells: Sequence[int] = (),
    apart_from: Sequence[Path] = (),
    check_stop: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a source as records, unless that is done already.

    The directory is created atomically at the end. If a run is killed or refused, finished shards
    are kept in a hidden sibling of it, and the next run resumes with the same result, bit for bit.
    Only one process of a run calls this; the others wait for it.

    Args:
      spec, skin_tones, classes, captions, encoder: as for `sources.open_source`; the spec is
        compared with that of an earlier run by `sources.same_source`.
      directory: the data set to make, for `tfds.builder_from_directory` and
        `image_sets.open_prepared`.
      form, encoding: size and channels of every image, and how pixels are stored.
      skip_bad: leave out images that cannot be used, and list them in the manifest, instead of
        raising.
      max_left_out: the largest share of files that may be left out; unless it is 1, a lost class is
        refused as well.
      verify: compare an existing set with the hashes in its manifests, and add what it lacks of
        `cells`.
      update: compare an existing set with its source, and prepare it again if that has changed; the
        previous set stays until the new one is complete.
      cells: sides of the cells of pixels whose sums are written beside the images (`cell_sums`).
      apart_from: folders that this program writes to, which must not overlap with the source.
      check_stop: called after every shard; an exception ends the work.

    Returns:
      The absolute path of the directory.

    Raises:
      InputError: a setting or an image cannot be used, the directory holds something else or a set
        prepared with other settings, it cannot be written, or the disk is full.
    """
    form.check()
    encoding.check()
    settings = _settings(spec, form, encoding, skin_tones, classes, captions)
    directory = local_path(directory, "directory").resolve()
    for library in ("array_record", "tensorflow_datasets"):  # before a long listing is made
        import_library(library, "data")
    try:
        check_place(directory)
        if _is_prepared(directory, settings) and not update:
            _log_made(
                directory,
                "was prepared before; its source is not read (--mode=prepare --update compares "
                "them)",
            )
            if verify:
                _verify(directory)
                add_sums(directory, cells, check_stop)
            with contextlib.suppress(InputError, OSError):
                remove_leftovers(directory)
            return directory
        check_apart(spec, (directory, *apart_from))
        with staging_folder(directory) as staging:
            restore_former(directory)
            # Again: another process may have prepared it before it released the lock.
            prepared = _is_prepared(directory, settings)
            if update or not prepared:
                source = open_source(
                    spec,
                    skin_tones=skin_tones,
                    classes=classes,
                    captions=captions,
                    skip_bad=skip_bad,
                    encoder=encoder,
                )
                record = record_of(source)
            if not prepared or (
                update and has_changed(directory, record, source.class_names, spec)
            ):
                unlisted = reasons(source.skipped)
                check_left_out(unlisted, len(source), source.lost, max_left_out, spec)
                shards = _shards(source, form, encoding, skip_bad, staging / PARTS)
                written = write_shards(shards, f"preparing {spec}", check_stop)
                _check_written(source, written, max_left_out, spec)
                made = _assemble(source, record, settings, shards, written, staging / "set")
                for cell in sorted({*cells, *cells_in(directory)}):
                    write_sums(made, cell, staging, check_stop)
                publish(made, directory)
                for parts in staging.glob(f"{PARTS}*"):
                    os.rename(parts, staging / f"used_{parts.name}")
            shutil.rmtree(staging)
        _log_made(directory, "is prepared")
        if verify and prepared:
            _verify(directory)
            add_sums(directory, cells, check_stop)
    except OSError as error:
        raise InputError(
            f"the data directory {directory} cannot be written ({error})",
            remedy(error, "Free space, or use another directory."),
        ) from error
    return directory


def _verify(directory: Path) -> None:
    """Raises InputError for a file of a set that differs from its hash in a manifest."""
    verify_files(directory, read_manifest(directory)["shards"], DAMAGED)
    for cell in cells_in(directory):
        folder = folder_of(directory, cell)
        verify_files(folder, cell_sums.read_manifest(folder)["shards"], fix_of(folder))
    verify_tables(directory)
    verify_latents(directory)


def _settings(
    spec: str, form: ImageSpec, encoding: Encoding, skin_tones: str, classes: str, captions: str
) -> dict[str, Any]:
    """The settings that decide the content of a set, as JSON holds them."""
    quality = {"quality": encoding.quality} if encoding.kind == "jpeg" else {}
    settings = {
        "source": spec,
        **dataclasses.asdict(form),
        "encoding": encoding.kind,
        **quality,
        "skin_tones": skin_tones,
        "classes": classes,
    }
    if captions != "none":
        settings["captions"] = captions
    return json.loads(json.dumps(settings))


def _is_prepared(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether this set exists. Raises InputError for anything else, which is never overwritten."""
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
            f"{directory} was prepared with {differences}",
            "Use another data.directory, or delete this one.",
        )
    return True


def _shards(
    source: Source, form: ImageSpec, encoding: Encoding, skip_bad: bool, parts: Path
) -> list[ImageShard]:
    """Divides a source into files to write; removes other files from their folder."""
    parts.mkdir(exist_ok=True)
    each = max(SHARD_IMAGES, -(-len(source) // MANY_SHARDS))
    count = -(-len(source) // each)
    names = [f"{i:05d}-of-{count:05d}" for i in range(count)]
    for left_over in parts.iterdir():
        if left_over.stem not in names:
            left_over.unlink()
    _check_space(len(source), form, encoding, parts)
    return [
        ImageShard(
            source=source.part(indices.tolist()),
            form=form,
            encoding=encoding,
            path=parts / f"{name}.array_record",
            skip_bad=skip_bad,
        )
        for name, indices in zip(names, np.array_split(np.arange(len(source)), count), strict=True)
    ]


def _check_written(
    source: Source, written: list[dict[str, Any]], max_left_out: float, spec: str
) -> None:
    """Raises InputError if too many images could not be decoded, or all of a class."""
    skipped = _skipped(source, written)
    if len(skipped) == len(source.skipped):
        return
    count = sum(shard["records"] for shard in written)
    left = np.sum([shard["of_class"] for shard in written], axis=0, dtype=int)
    lost = {source.class_names[label] for label in set(source.labels) if not left[label]}
    check_left_out(skipped, count, {*lost, *source.lost}, max_left_out, spec)


def _skipped(source: Source, written: list[dict[str, Any]]) -> dict[str, str]:
    """Reasons by the names of all that is left out, by the listing and by decoding."""
    skipped = reasons(source.skipped)
    for shard in written:
        skipped |= shard["skipped"]
    return skipped


def _assemble(
    source: Source,
    record: Record,
    settings: dict[str, Any],
    shards: list[ImageShard],
    written: list[dict[str, Any]],
    made: Path,
) -> Path:
    """Makes a data set with its manifest from finished shards; returns its directory."""
    skipped = _skipped(source, written)
    count = sum(shard["records"] for shard in written)
    if not count:
        reason = next(iter(skipped.values()))
        raise InputError(
            f"no image of {settings['source']} can be used ({reason})", "Use another source."
        )
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    finished = [(shard["records"], part.path) for shard, part in zip(written, shards, strict=True)]
    builder = tfds_builder.RelayImages(finished, shards[0].features, settings["source"], made)
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its own report
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    shape = (settings["height"], settings["width"], settings["channels"])
    manifest = {
        "version": VERSION,
        "settings": settings,
        "count": count,
        "classes": {
            name: sum(shard["of_class"][i] for shard in written)
            for i, name in enumerate(source.class_names)
        },
        "enlarged": sum(shard["enlarged"] for shard in written),
        "resampling": CROPS[settings["crop"]],
        "made_by": versions(),
        "content": set_hash(
            total(shard["content"] for shard in written), shape, source.class_names
        ),
        "skipped": skipped,
        "skipped_by_reason": {reason: len(names) for reason, names in by_reason(skipped).items()},
        "class_numbers": {name: number for number, name in enumerate(source.class_names)},
        "shards": [
            {"file": path.name, **{key: shard[key] for key in ("records", "bytes", "sha256")}}
            for path, shard in zip(builder.shard_paths, written, strict=True)
        ],
    }
    save_record(Path(builder.data_path), record)
    with atomic_write(Path(builder.data_path) / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1))
    return Path(builder.data_path)


def _log_made(directory: Path, what: str) -> None:
    """Logs the size of a set, and what was enlarged, left out or lost."""
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
            "data: %s of them are smaller than the requested size and were enlarged",
            f"{manifest['enlarged']:,}",
        )
    if skipped := manifest["skipped"]:
        name, reason = next(iter(skipped.items()))
        show = log.warning if 10 * len(skipped) > manifest["count"] else log.info
        show(
            "data: %s of %s entries are left out, listed in %s; the first: %s %s",
            f"{len(skipped):,}",
            f"{len(skipped) + manifest['count']:,}",
            directory / MANIFEST,
            name,
            reason,
        )
    if lost := [name for name, count in manifest["classes"].items() if not count]:
        log.warning("data: there is no image of %d classes, such as %r", len(lost), lost[0])


def _check_space(count: int, form: ImageSpec, encoding: Encoding, parts: Path) -> None:
    """Raises OSError if the set cannot fit, even at the highest compression ratio."""
    needed = count * form.height * form.width * form.channels // MAX_COMPRESSION[encoding.kind]
    needed -= sum(file.stat().st_size for file in parts.iterdir())
    free = shutil.disk_usage(parts).free
    if free < needed:
        raise OSError(f"{free / 2**20:.1f} MB free, at least {needed / 2**20:.1f} MB needed")
