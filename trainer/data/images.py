"""Images from files to 8-bit RGB, with nothing clipped, dropped or turned without being asked."""

import stat
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Window = tuple[float, float] | None
DAMAGE = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)
"""What Pillow's readers raise for damaged files: found by damaging files of every format that it writes."""


def load_image(path: Path, grey_window: Window = None) -> Image.Image:
    """Decode one image as 8-bit RGB, turned upright as its EXIF orientation says.

    Args:
        path: a file that Pillow reads.
        grey_window: (low, high) intensities that become black and white in images of more than 8 bits.

    Raises:
        ValueError: says what is wrong with the image: missing, damaged, too large (`Image.MAX_IMAGE_PIXELS`), several
            frames, transparent, or of more than 8 bits without a window or with intensities outside of it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("a folder or a device, no file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                unfit = _unfit(image)
                if not unfit:
                    image.load()
                    upright = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"image {path}: no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"image {path}: more than {most} pixels; scale it down, or cut out what matters") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"image {path}: does not decode (in no format that Pillow reads)") from error
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"image {path}: does not decode ({reason})") from error
    if unfit:
        raise ValueError(f"image {path}: {unfit}")
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        upright = _windowed(upright, path, grey_window)
    if upright.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        if upright.getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"image {path}: transparent pixels; flatten it onto a background")
    if upright.mode not in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"image {path}: colours of mode {upright.mode}; save it as RGB or grey")
    return upright.convert("RGB")


def _unfit(image: Image.Image) -> str | None:
    """Why an image would lose something by being decoded, seen before it is."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        return f"{frames} frames; save the one to be used"
    if not image.mode.startswith("I") and any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        return "16 bits in each of several channels; save it with 8, or as 16-bit grey"
    return None


def _windowed(image: Image.Image, path: Path, grey_window: Window) -> Image.Image:
    """Scale intensities in the window linearly to 0..255."""
    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if grey_window is None:
        raise ValueError(
            f"image {path}: grey of more than 8 bits (intensities {low:g}..{high:g}); state grey_window, for example "
            f"--set grey_window=[{low:g},{high:g}]"
        )
    if low < grey_window[0] or high > grey_window[1]:
        raise ValueError(
            f"image {path}: intensities {low:g}..{high:g} outside grey_window "
            f"{grey_window[0]:g}..{grey_window[1]:g} would be clipped"
        )
    scaled = (pixels - grey_window[0]) / (grey_window[1] - grey_window[0]) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8), mode="L")


def parse_window(text: str | None) -> Window:
    """Read what `--grey-window` was given: two numbers with a comma between them, or nothing."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f"--grey-window {text}: two numbers, such as 0,4095") from error
    if not low < high:
        raise ValueError(f"--grey-window {text}: the first is to be the lower one")
    return low, high
