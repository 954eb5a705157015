"""Image bytes -> RGB pictures: only the allowed formats, upright, alpha laid on white."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ALPHA = ("LA", "PA", "RGBA")


def decode(data: bytes) -> Image.Image:
    """The picture as RGB. ValueError, in words, for anything that is not a whole PNG, JPEG or WebP."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.mode not in _MODES:
            raise ValueError(f"colours of kind {image.mode} are not supported")
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        return on_white(image) if has_alpha(image) else image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or WebP image") from None
    except Image.DecompressionBombError:
        raise ValueError("more pixels than is safe to decode") from None
    except (OSError, SyntaxError, EOFError, OverflowError) as error:  # what Pillow raises on broken files
        raise ValueError(f"broken image: {error}") from None


def has_alpha(image: Image.Image) -> bool:
    """Whether some pixels may be transparent."""
    return image.mode in _ALPHA or "transparency" in image.info


def on_white(image: Image.Image) -> Image.Image:
    """Lay a picture with alpha on white."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def square(image: Image.Image, size: int, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """The largest square of a picture, at (x, y) in [0, 1] of the room it has, resized to `size` pixels a side."""
    side = min(image.size)
    left, top = round((image.width - side) * x), round((image.height - side) * y)
    box = (left, top, left + side, top + side)
    if side == size:
        return image if image.width == image.height else image.crop(box)
    return image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
