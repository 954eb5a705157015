"""Image bytes -> RGB pictures: allowed formats only, upright, in sRGB, alpha laid on a colour."""

import functools
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
READABLE = (*FORMATS, "GIF", "BMP", "TIFF", "AVIF")  # those that a preparation may allow
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ALPHA = ("LA", "PA", "RGBA")


def decode(data: bytes) -> Image.Image:
    """The picture as RGB. ValueError, in words, for anything that is not a whole PNG, JPEG or WebP."""
    return finish(start(data))


def start(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The picture with its header read and no pixel decoded. ValueError, in words, for what is none of the formats."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=tuple(formats))
    except UnidentifiedImageError:
        named = [{"JPEG": "JPEG", "WEBP": "WebP"}.get(name, name) for name in formats]
        raise ValueError(f"not a {' or '.join(filter(None, [', '.join(named[:-1]), named[-1]]))} image") from None
    except Image.DecompressionBombError:
        raise ValueError("more pixels than is safe to decode") from None
    except _BROKEN as error:
        raise ValueError(f"broken image: {error}") from None
    if image.mode not in _MODES:
        raise ValueError(f"colours of kind {image.mode} are not supported")
    return image


def finish(image: Image.Image, background: str = "white") -> Image.Image:
    """The pixels of a picture that was started: upright RGB in sRGB, alpha on the background. ValueError as `start`."""
    try:
        image.load()
        profile = image.info.get("icc_profile")
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        if profile:
            image = _in_srgb(image, profile)
        if has_alpha(image):
            return laid_on(image, background)
        return image if image.mode == "RGB" else image.convert("RGB")
    except _BROKEN as error:
        raise ValueError(f"broken image: {error}") from None


_BROKEN = (OSError, SyntaxError, EOFError, OverflowError)  # what Pillow raises on broken files


def has_alpha(image: Image.Image) -> bool:
    """Whether some pixels may be transparent."""
    return image.mode in _ALPHA or "transparency" in image.info


def laid_on(image: Image.Image, background: str) -> Image.Image:
    """Lay a picture with alpha on a colour."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def other_colours(image: Image.Image) -> bool:
    """Whether a picture that was started has a colour profile other than sRGB's."""
    profile = image.info.get("icc_profile")
    return bool(profile) and _to_srgb(profile, image.mode) is not None


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if has_alpha(image) else "RGB")
    transform = _to_srgb(profile, image.mode)
    if transform is None:
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha else image
    image = ImageCms.applyTransform(colours, transform) or colours
    if alpha:
        image.putalpha(alpha)
    return image


@functools.lru_cache(64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; None where there is none to go: sRGB itself, broken, or for other modes."""
    kinds = {"RGB": "RGB ", "RGBA": "RGB ", "P": "RGB ", "PA": "RGB ", "L": "GRAY", "LA": "GRAY", "CMYK": "CMYK"}
    try:
        known = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if known.profile.xcolor_space != kinds.get(mode) or "sRGB" in ImageCms.getProfileDescription(known):
            return None
        read = {"LA": "L", "RGBA": "RGB", "P": "RGB", "PA": "RGB"}.get(mode, mode)
        return ImageCms.buildTransform(known, ImageCms.createProfile("sRGB"), read, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def planes(image: Image.Image) -> UInt8[np.ndarray, "3 h w"]:
    """The pixels of an RGB picture, colour by colour: Pillow packs them so in less time than numpy reorders them."""
    data = b"".join(image.tobytes("raw", band) for band in "RGB")
    return np.frombuffer(data, np.uint8).reshape(3, image.height, image.width)


def square(image: Image.Image, size: int, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """The largest square of a picture, at (x, y) in [0, 1] of the room it has, resized to `size` pixels a side."""
    side = min(image.size)
    left, top = round((image.width - side) * x), round((image.height - side) * y)
    box = (left, top, left + side, top + side)
    if side == size:
        return image if image.width == image.height else image.crop(box)
    return image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
