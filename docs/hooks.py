"""What mkdocs does besides rendering: the tables of docs/configuration.md, and links out of docs/.

`config_reference` writes one table per dataclass of `rdm_jax.config.Config` from its fields,
defaults, bounds and docstring, in place of the line `<!-- fields -->`. Links such as
`../experiments/digits/README.md` work in a checkout; on the site they lead to the repository, and
the images among them are copied into it.
"""

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIELDS = "<!-- fields -->"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)\s]+)\)")


def on_files(files, config):
    """Adds the images of experiments/ to the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in (".png", ".jpg"):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fills in the configuration's tables and redirects links that leave docs/."""
    if FIELDS in markdown:
        markdown = markdown.replace(FIELDS, config_reference())
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def redirect(match: re.Match) -> str:
        image, text, target = match.groups()
        name, hash_sign, anchor = target.partition("#")
        path = (folder / name).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return match.group()
        place = path.relative_to(ROOT).as_posix()
        if image:
            up = "../" * (len(Path(page.file.src_uri).parts) - 1)
            return f"![{text}]({up}{place})"
        kind = "tree" if path.is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{place}{hash_sign}{anchor})"

    return LINK.sub(redirect, markdown)


def config_reference() -> str:
    """All fields that a config has, as Markdown: a section per dataclass, one table in each."""
    if str(ROOT) not in sys.path:  # a checkout need not be installed
        sys.path.insert(0, str(ROOT))
    from rdm_jax.config import Config

    sections, done = [], set()
    for path, cls, kind in _sections(Config, "config"):
        if cls in done:
            sections.append(f"### `{path}`{kind}\n\nThe fields of `{cls.__name__}`, above.")
            continue
        done.add(cls)
        sections.append(f"### `{path}`{kind}\n\n{_summary(cls)}\n\n{_table(cls)}")
    return "\n\n".join(sections)


def _sections(cls: type, path: str, kind: str = "") -> typing.Iterator[tuple[str, type, str]]:
    """(path in a config, dataclass, its kind as a heading says it), outer ones first."""
    yield path, cls, kind
    from rdm_jax.config.codec import field_types

    hints = field_types(cls)
    for field in dataclasses.fields(cls):
        for inner in _dataclasses(hints[field.name]):
            name = "stageN" if field.name == "stages" else field.name
            several = len(_dataclasses(hints[field.name])) > 1
            label = f", kind `{_kind(inner)}`" if several else ""
            yield from _sections(inner, f"{path}.{name}", label)


def _dataclasses(hint: typing.Any) -> list[type]:
    """The dataclasses that a field's type names: itself, a union's, or a tuple's."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [each for part in typing.get_args(hint) for each in _dataclasses(part)]


def _kind(cls: type) -> str:
    from rdm_jax.config import kind_of

    return kind_of(cls)


def _summary(cls: type) -> str:
    """The docstring up to its sections, as one paragraph per paragraph."""
    doc = re.split(r"\n(?=(?:Attributes|Args|Raises|Returns):\n)", inspect.getdoc(cls))[0]
    return _escape(doc.strip())


def _escape(text: str) -> str:
    """Text that Markdown takes neither for a cell's end nor for a link, as in Block[s](e)."""
    return text.replace("|", "\\|").replace("](", "]\\(")


def _table(cls: type) -> str:
    """Field, type, default, bounds and meaning of every field that is no section of its own."""
    from rdm_jax.config.codec import field_types

    hints, meanings = field_types(cls), _meanings(cls)
    rows = ["| field | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if _dataclasses(hints[field.name]) and not field.metadata.get("listed"):
            continue
        cells = (
            f"`{field.name}`",
            f"`{_type(hints[field.name])}`",
            f"`{_default(field)}`",
            str(field.metadata.get("bounds", "")),
            meanings.get(field.name, ""),
        )
        rows.append("| " + " | ".join(map(_escape, cells)) + " |")
    return "\n".join(rows) if len(rows) > 2 else "No fields of its own."


def _type(hint: typing.Any) -> str:
    """A field's type as a user writes it."""
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return "list of kinds" if _dataclasses(item) else f"tuple of {_type(item)}"
    return getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if callable(field.default_factory) else "required"


def _meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.getdoc(base) if dataclasses.is_dataclass(base) else None
        _, _, attributes = (doc or "").partition("Attributes:\n")
        # A field begins two spaces in; lines that belong to it are indented further.
        for names, text in re.findall(
            r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", attributes, re.MULTILINE
        ):
            found |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
    return found
