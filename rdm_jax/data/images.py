"""One image: from the bytes of a file to uint8 pixels of the requested size."""

import dataclasses
import errno
import io
import re
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, features

from rdm_jax.runtime.errors import BadImage, InputError

# Pillow decides by content which of these a file is; what it could also open (EPS by running
# Ghostscript, PDF, HDF5) is nothing to train on. The suffixes only decide which files of a folder
# are meant as images. AVIF needs Pillow 11.3, built with libavif.
_HAS_AVIF = "avif" in features.modules and features.check("avif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if _HAS_AVIF else ()))
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".avif")
# How files of these formats begin, for files with another suffix or none.
MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM....\0\0\0\0"
    rb"|II\*\0|MM\0\*|P[1-6]\s|....ftypavi[fs]",
    re.DOTALL,
)
MAGIC_BYTES = 16
# Bounds of what one image may take in memory, whatever its file says. Pillow only warns of more
# pixels; here they are refused.
MAX_PIXELS = 89_478_485
MAX_BYTES = 512 * 2**20
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# How an image becomes one of the requested size, in the words of a manifest.
CROPS = {
    "lanczos": "the central crop of the ratio asked for, then Lanczos",
    "adm": "halved by a box filter while both sides are at least twice those asked for, "
    "bicubic until one fits, central crop",
    "pad": "the whole image, by Lanczos, in the middle of the background colour",
    "none": "every image has the size asked for",
}


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The size and the channels that every image is converted to.

    Attributes:
      height, width: in pixels.
      channels: 1 (luma) or 3 (RGB).
      background: RGB from 0 to 255, behind transparent pixels.
      crop: one of CROPS.
    """

    height: int
    width: int
    channels: int = 3
    background: tuple[int, ...] = (255, 255, 255)
    crop: str = "lanczos"

    def check(self) -> None:
        """Raises InputError, naming the field, if a field is out of range."""
        for name, side in (("height", self.height), ("width", self.width)):
            if side < 1:
                raise InputError(f"{name}={side} is out of range", "Use 1 or more.")
        if self.channels not in (1, 3):
            raise InputError(
                f"channels={self.channels} is not supported", "Use 1 (grey) or 3 (RGB)."
            )
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise InputError(
                f"background={self.background} is not a colour", "Use three numbers from 0 to 255."
            )
        if self.crop not in CROPS:
            raise InputError(
                f"crop={self.crop!r} is unknown", f"Use {' or '.join(map(repr, CROPS))}."
            )


def is_image(head: bytes) -> bool:
    """Whether the first MAGIC_BYTES of a file are those of one of FORMATS, or of AVIF."""
    return MAGIC.match(head) is not None


def open_image(file: Path | bytes) -> Image.Image:
    """Decodes an image (the first frame of an animation) and turns it upright (EXIF).

    Raises:
      BadImage: it is damaged, empty, too large, or not an image.
      OSError: the file cannot be read, which says nothing about the image.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise BadImage(f"has {size:,} bytes", f"Use a file of 1 to {MAX_BYTES:,} bytes.")
    fewer_pixels = f"Use at most {MAX_PIXELS:,} pixels."
    readable = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(readable, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(
                    f"has too many pixels ({image.width:,} x {image.height:,})", fewer_pixels
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, before ours is checked
        raise BadImage(
            f"has too many pixels (more than {2 * MAX_PIXELS:,})", fewer_pixels
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        # An error of the system is no fault of the image, except for a seek to an offset that the
        # file gives.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        if not _HAS_AVIF and _is_avif(file):
            raise BadImage(
                "is an AVIF image, which the installed Pillow cannot decode",
                "Run `pip install 'pillow>=11.3'`.",
            ) from error
        raise BadImage(
            f"cannot be decoded ({error})", "Copy it again from an intact original, or remove it."
        ) from error


def _is_avif(file: Path | bytes) -> bool:
    head = file[:MAGIC_BYTES] if isinstance(file, bytes) else read_head(file)
    return head[4:11] == b"ftypavi"


def read_head(path: Path) -> bytes:
    """The first MAGIC_BYTES of a file."""
    with path.open("rb") as file:
        return file.read(MAGIC_BYTES)


def to_uint8(
    image: Image.Image, channels: int, background: tuple[int, ...]
) -> UInt8[np.ndarray, "h w c"]:
    """Converts a Pillow image of any mode to 8 bits per channel.

    16-bit grey is scaled by 255/65535 (Pillow alone would clip it), CMYK is converted without a
    colour profile, and transparent pixels are composited on the background before any resizing, so
    that no hidden colour bleeds in.

    Args:
      image: any mode but floating point.
      channels: 1 (luma) or 3 (RGB).
      background: RGB, 0 to 255.

    Raises:
      BadImage: the mode has no 8-bit conversion.
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
        raise BadImage(
            f"has mode {image.mode!r} ({error})", "Convert it to RGB, grey, palette or CMYK."
        ) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    # Mode 'I' is 32 bits wide; which value means white is unknown.
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(
            f"has grey values from {values.min()} to {values.max()}", "Convert it to 8 or 16 bits."
        )
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255)
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return grey


def fit(
    pixels: UInt8[np.ndarray, "h w c"], form: ImageSpec
) -> UInt8[np.ndarray, "{form.height} {form.width} c"]:
    """Crops and resizes by the rule `form.crop`; the identity for images that have the size.

    Raises:
      BadImage: the rule is 'none' and the image has another size.
    """
    rows, columns, _ = pixels.shape
    if (rows, columns) == (form.height, form.width):
        return pixels
    if form.crop == "none":
        raise BadImage(
            f"has size {rows} x {columns} (height x width)",
            f"Use images of {form.height} x {form.width}, or set another data.crop.",
        )
    if form.crop == "adm":
        return _fit_adm(pixels, form.height, form.width)
    if form.crop == "pad":
        return _fit_padded(pixels, form)
    return _fit_lanczos(pixels, form.height, form.width)


def _fit_lanczos(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns, _ = pixels.shape
    crop_rows = max(1, min(rows, round(columns * height / width)))
    crop_columns = max(1, min(columns, round(rows * width / height)))
    # Not ImageOps.fit, whose filter uses pixels outside the crop.
    cropped = _central(pixels, crop_rows, crop_columns)
    return _resize(cropped, height, width, Image.Resampling.LANCZOS)


def _fit_adm(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The crop of ADM (arXiv 2105.05233) and of EDM's ImageNet-64.

    Published for squares; here for any height and width.
    """
    while pixels.shape[0] >= 2 * height and pixels.shape[1] >= 2 * width:
        pixels = _resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, Image.Resampling.BOX)
    rows, columns, _ = pixels.shape
    scale = max(height / rows, width / columns)
    rows, columns = round(rows * scale), round(columns * scale)
    if rows * columns > MAX_PIXELS:
        raise BadImage(
            f"is too narrow for crop='adm', which enlarges it to {rows:,} x {columns:,}",
            "Set data.crop='lanczos'.",
        )
    return _central(_resize(pixels, rows, columns, Image.Resampling.BICUBIC), height, width)


def _fit_padded(pixels: np.ndarray, form: ImageSpec) -> np.ndarray:
    rows, columns, channels = pixels.shape
    scale = min(form.height / rows, form.width / columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    background = Image.new("RGB", (form.width, form.height), form.background)
    padded = np.array(background.convert("L" if channels == 1 else "RGB"))
    padded = padded.reshape(form.height, form.width, channels)
    top, left = (form.height - height) // 2, (form.width - width) // 2
    whole = _resize(pixels, height, width, Image.Resampling.LANCZOS)
    padded[top : top + height, left : left + width] = whole
    return padded


def _central(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _resize(
    pixels: np.ndarray, height: int, width: int, resampling: Image.Resampling
) -> np.ndarray:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((width, height), resampling)).reshape(height, width, -1)


def encode(pixels: UInt8[np.ndarray, "h w c"], encoding: str, quality: int) -> bytes:
    """Encodes as 'png' (`quality` is ignored), or as 'jpeg' without chroma subsampling."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    if encoding == "jpeg":
        image.save(file, format=encoding, quality=quality, subsampling=0)
    else:
        image.save(file, format=encoding)
    return file.getvalue()
