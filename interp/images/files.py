"""Images from files, bytes and arrays, as the models' processors want them.

What comes in from outside is opened with care: raster formats only (a PostScript file would be
run), size known before any pixel is decoded, and every fault of a decoder becomes one line.
"""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike = Any
"""A path, the bytes of a file, a PIL image, or an array [height, width] or [height, width, 3|4]."""

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def open_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> "Image":
    """An image in RGB, upright.

    The orientation that a camera noted in EXIF is applied. Transparent pixels are shown on white.
    Grey values of 16 bits are scaled to 8. Of several frames the first is taken.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array of 8-bit levels.
        max_pixels: the greatest area that is decoded.

    Raises:
        InputError: no such file, not an image, cut off, or larger than `max_pixels`.
    """
    from PIL.Image import Image, fromarray

    if isinstance(source, Image):
        return _rgb(source, "the image", max_pixels)
    if isinstance(source, str | Path):
        return _from_file(source, str(source), max_pixels)
    if isinstance(source, bytes | bytearray):
        return _from_file(io.BytesIO(source), f"{len(source)} bytes", max_pixels)
    if hasattr(source, "__array__"):
        return _rgb(fromarray(_levels(np.asarray(source), max_pixels)), "the array", max_pixels)
    raise InputError(
        f"an image is a path, the bytes of a file, a PIL image or an array; got "
        f"{type(source).__name__}"
    )


def _from_file(file: str | Path | io.BytesIO, name: str, max_pixels: int) -> "Image":
    from PIL import Image, UnidentifiedImageError

    if not isinstance(file, io.BytesIO):
        if "://" in name:
            raise InputError(
                f"an image must be a file on this machine; got {name}", hint="download it first"
            )
        if not Path(file).is_file():
            what = "that is a folder" if Path(file).is_dir() else "there is no such file"
            raise InputError(f"an image must be in a file; {name}: {what}")
    Image.init()
    formats = [f for f in FORMATS if f in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Decoders warn of what they mend, and of sizes that `max_pixels` judges.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=formats) as image:
                return _rgb(image, name, max_pixels)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"{name} must be an image; it is none that can be read here",
            hint=f"save it as one of {', '.join(formats)}",
        ) from None
    except Image.DecompressionBombError:
        raise InputError(_too_large(name, "far more", max_pixels), hint=_SMALLER) from None
    except Exception as error:  # noqa: BLE001 - decoders fail with errors of every kind
        raise InputError(
            f"{name} must be a whole image; it cannot be decoded: {_line(error)}",
            hint="the file may be cut off or damaged",
        ) from None


_SMALLER = "make it smaller first, or raise max_pixels"


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"an image may have {max_pixels} pixels; {name} has {size}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _rgb(image: "Image", name: str, max_pixels: int) -> "Image":
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > max_pixels:
        raise InputError(_too_large(name, f"{width} x {height}", max_pixels), hint=_SMALLER)
    if width == 0 or height == 0:
        raise InputError(f"an image must have pixels; {name} is {width} x {height}")
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - decoders fail with errors of every kind
        raise InputError(
            f"{name} must be a whole image; it cannot be decoded: {_line(error)}",
            hint="the file may be cut off or damaged",
        ) from None
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(
            f"levels must be whole numbers; {name} has floating-point pixels",
            hint="scale them to 0..255 and save 8 bits",
        )
    if image.mode in _SIXTEEN_BITS:
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise InputError(
                f"levels must lie in 0..65535; {name} has {levels.min()} to {levels.max()}"
            )
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _levels(array: np.ndarray, max_pixels: int) -> np.ndarray:
    shape = array.shape
    if array.dtype != np.uint8:
        raise InputError(
            f"an array must hold levels 0..255 of dtype uint8; got {array.dtype}",
            hint="(255 * x).round().astype('uint8') for values in 0..1",
        )
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))) or 0 in shape:
        raise InputError(
            f"an array must be [height, width] or [height, width, 3 or 4]; got {list(shape)}",
            hint="move the channels to the last axis",
        )
    if shape[0] * shape[1] > max_pixels:
        size = f"{shape[1]} x {shape[0]}"
        raise InputError(_too_large("the array", size, max_pixels), hint=_SMALLER)
    return array
