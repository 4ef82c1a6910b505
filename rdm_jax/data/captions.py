"""Captions of a source's images: from files beside them, from metadata, or from their names."""

import csv
import io
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rdm_jax.data.listing import LABELS_FILE, SIDE_NAME
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import parse_json

if TYPE_CHECKING:  # workers that prepare images need no JAX
    from rdm_jax.text.encoders import TextEncoder

RULES = ("none", "auto", "txt", "metadata", "names")
METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt", "description")
FILE_BYTES = 2**16  # the most in a caption's own file
SURROGATE = re.compile("[\ud800-\udfff]")
ROW_BYTES = 4096  # the most per image in a metadata file


class Captioned(NamedTuple):
    """What was found.

    Attributes:
      captions: by the names of images.
      skipped: images without a usable caption, and captions without an image, with the reason.
    """

    captions: Mapping[str, str]
    skipped: Mapping[str, BadImage]


def by_rule(
    rule: str,
    images: Sequence[str],
    files: Sequence[str],
    read: Callable[[str, int], bytes],
    spec: str,
) -> Captioned:
    """The captions of a listing of files.

    Args:
      rule: one of RULES except for 'none'. 'auto' takes metadata if there are any, else the files
        beside the images.
      images: their names.
      files: the names of all files, images included.
      read: a file's bytes, by its name and the most that it may have.
      spec: of the source, for errors.

    Raises:
      InputError: there are no captions of this kind, or a metadata file cannot be read.
    """
    texts = sorted(name for name in files if name.lower().endswith(".txt"))
    tables = [name for name in files if _base(name) in (*METADATA, LABELS_FILE)]
    if rule == "names":
        return usable(images, {name: from_name(name) for name in images}, {}, "in its name")
    if rule in ("auto", "metadata"):
        found = _from_tables(sorted(tables), images, read)
        if found is not None:
            return usable(images, *found, "in the metadata")
    if rule in ("auto", "txt"):
        found = _from_texts(texts, images, read)
        if found is not None:
            return usable(images, *found, "in a .txt file beside it")
    kinds = {
        "auto": "metadata.jsonl, metadata.csv, dataset.json with 'captions', or .txt files",
        "metadata": "metadata.jsonl, metadata.csv, or dataset.json with 'captions'",
        "txt": ".txt files beside the images",
    }
    raise InputError(
        f"config.data.captions={rule!r}, but {spec} has no captions",
        f"Add {kinds[rule]}, or use 'names' or 'none'.",
    )


def plain(text: str) -> str:
    """A caption in one line, with single spaces."""
    return " ".join(text.split())


def from_name(name: str) -> str:
    """The words of a file's name: 'red_apple-02.png' is 'red apple'."""
    stem = posixpath.splitext(_base(name))[0]
    words = plain(re.sub(r"[\W_]+", " ", stem))
    return re.sub(r"( ?\d+)+$", "", words) or words


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def usable(
    images: Sequence[str], found: Mapping[str, str], skipped: Mapping[str, BadImage], where: str
) -> Captioned:
    """Sorts out images whose caption is missing, empty or not valid Unicode."""
    without = BadImage(f"has no caption {where}", "Add one.")
    empty = BadImage(f"has an empty caption {where}", "Write one.")
    invalid = BadImage(f"has a caption {where} that is not valid Unicode", "Write it again.")
    skipped = dict(skipped)
    for name in images:
        if name in skipped:
            continue
        if not found.get(name):
            skipped[name] = empty if name in found else without
        elif SURROGATE.search(found[name]):  # as JSON may have; UTF-8 cannot hold it
            skipped[name] = invalid
    return Captioned({n: found[n] for n in images if n not in skipped}, skipped)


def unfit(captions: Iterable[str], encoder: "TextEncoder") -> dict[str, BadImage]:
    """The captions that an encoder does not take, and why: too many tokens, or none."""
    distinct = list(dict.fromkeys(captions))
    lengths = encoder.lengths(distinct)
    found = {}
    for caption, length in zip(distinct, lengths, strict=True):
        if length > encoder.tokens:
            found[caption] = BadImage(
                f"has a caption of {length} tokens, more than config.data.text_tokens="
                f"{encoder.tokens}",
                "Shorten it, or set config.data.text_tokens (the longest caption has "
                f"{max(lengths)} tokens).",
            )
        elif not length:
            found[caption] = BadImage("has a caption without tokens", "Write one with words.")
    return found


def _from_texts(
    texts: Sequence[str], images: Sequence[str], read: Callable[[str, int], bytes]
) -> tuple[dict[str, str], dict[str, BadImage]] | None:
    """Captions from 'x.txt' or 'x.png.txt' beside 'x.png'; None if no image has such a file."""
    image_of: dict[str, list[str]] = {}
    for name in images:
        image_of.setdefault(posixpath.splitext(name)[0], []).append(name)
    known, any_found = set(images), False
    found: dict[str, str] = {}
    skipped: dict[str, BadImage] = {}
    for text in texts:
        stem = posixpath.splitext(text)[0]
        owners = image_of.get(stem) or ([stem] if stem in known else [])
        if not owners:
            if not SIDE_NAME.fullmatch(_base(stem).lower()):
                skipped[text] = BadImage("is a caption without an image", "Remove it.")
            continue
        any_found = True
        try:
            caption = plain(read(text, FILE_BYTES).decode("utf-8-sig"))
        except UnicodeDecodeError:
            bad = BadImage(f"has a caption that is not UTF-8 ({text})", "Convert it.")
            skipped |= dict.fromkeys(owners, bad)
            continue
        except BadImage as error:
            bad = BadImage(f"has a caption ({text}) that {error.reason}", error.fix)
            skipped |= dict.fromkeys(owners, bad)
            continue
        found |= dict.fromkeys(owners, caption)
    return (found, skipped) if any_found else None


def _from_tables(
    tables: Iterable[str], images: Sequence[str], read: Callable[[str, int], bytes]
) -> tuple[dict[str, str], dict[str, BadImage]] | None:
    """Captions from metadata files, whose names are relative to each; None if there are none."""
    known, any_found = set(images), False
    found: dict[str, str] = {}
    skipped: dict[str, BadImage] = {}
    for table in tables:
        try:
            content = read(table, ROW_BYTES * len(images) + 2**20)
        except BadImage as error:
            raise InputError(f"{table} {error.reason}", error.fix) from error
        try:
            rows = _rows(_base(table), content.decode("utf-8-sig"))
        except (ValueError, csv.Error) as error:
            raise InputError(
                f"{table} cannot be read ({error!s:.200})",
                f"Write UTF-8 with the columns file_name and {COLUMNS[0]}.",
            ) from error
        any_found = any_found or rows is not None
        for name, caption in rows or ():
            image = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
            if image not in known:
                image = SURROGATE.sub("?", image)
                skipped[image] = BadImage(f"is listed in {table} but missing", "Add the file.")
            elif found.setdefault(image, plain(caption)) != plain(caption):
                raise InputError(f"{table} has two captions for {name!r}", "Keep one of them.")
    return (found, skipped) if any_found else None


def _rows(base: str, content: str) -> list[tuple[str, str]] | None:
    """The pairs of a name and a caption; None for a labels file without captions."""
    if base == LABELS_FILE:
        values = parse_json(content)
        captions = values.get("captions") if isinstance(values, dict) else None
        if captions is None:
            return None
        if not isinstance(captions, dict | list):
            raise ValueError("captions is not a list of names and captions")
        pairs = captions.items() if isinstance(captions, dict) else captions
        return [_pair(pair) for pair in pairs]
    if base.endswith(".csv"):
        rows: list[Any] = list(csv.DictReader(io.StringIO(content), strict=True))
    else:  # not splitlines, which splits captions at U+2028 and others that JSON may contain
        rows = [parse_json(line) for line in content.split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "file_name" not in row:
            raise ValueError(f"row {number} has no file_name")
    if not rows:
        return []
    column = next((name for name in COLUMNS if any(name in row for row in rows)), None)
    if column is None:
        raise ValueError(f"it has no column {' or '.join(COLUMNS)}")
    return [_pair((row["file_name"], row.get(column))) for row in rows]


def _pair(pair: Any) -> tuple[str, str]:
    match pair:
        case (str(name), str() | None as caption):
            return name, caption or ""
    raise ValueError(f"{str(pair)[:80]} is not a name and a caption")
