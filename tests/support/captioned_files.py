"""A folder of three images, a.png to c.png, with captions in each of the ways that are read."""

import json
from pathlib import Path

from PIL import Image

from rdm_jax.data.images import ImageSpec

FORM = ImageSpec(8, 12)
CAPTIONS = {"a": "a red apple", "b": "a  sleeping\ncat", "c": "a red apple"}
LONG = r"has a caption of 9 tokens, more than config.data.text_tokens=8"


def write_pictures(folder: Path) -> Path:
    """Writes the images, without captions."""
    folder.mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (12, 8), (80 * number, 0, 0)).save(folder / f"{name}.png")
    return folder


def in_texts(folder: Path) -> None:
    """In files beside the images."""
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption)


def in_jsonl(folder: Path) -> None:
    """In metadata.jsonl."""
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def in_csv(folder: Path) -> None:
    """In metadata.csv, with a third column."""
    rows = [f'{name}.png,"{text}",1' for name, text in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption,score", *rows]))


def in_dataset_json(folder: Path) -> None:
    """In dataset.json, without labels."""
    captions = [[f"{name}.png", text] for name, text in CAPTIONS.items()]
    (folder / "dataset.json").write_text(json.dumps({"captions": captions}))


def with_long_captions(folder: Path) -> str:
    """With captions of 9, 1 and 12 words; returns the source."""
    for name, words in {"a": 9, "b": 1, "c": 12}.items():
        (folder / f"{name}.txt").write_text("word " * words)
    return f"folder:{folder}"
