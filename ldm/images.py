"""Pictures as files: tensors in [-1, 1] to pixels, grids, and PNGs that appear whole or not at all."""

import io
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, ImageOps
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.errors import UserError, reason
from ldm.files import replacing
from ldm.shapes import Image

Pixels = UInt8[Tensor, "b h w 3"]
FORMATS, MAX_SIDE = ("PNG", "JPEG", "WEBP"), 8192
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError)  # what a broken file has raised


def to_pixels(images: Image) -> Pixels:
    """(b, 3, h, w) in [-1, 1] -> (b, h, w, 3) bytes on the CPU, rounded; what lies outside is clipped."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def grid(pixels: Pixels, columns: int = 0) -> UInt8[Tensor, "1 height width 3"]:
    """(b, h, w, 3) -> (1, height, width, 3): row by row, 2 pixels of white between; 0 columns: as square as may be."""
    b, h, w, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(b))
    rows, gap = math.ceil(b / columns), 2
    sheet = torch.full((1, rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[0, top : top + h, left : left + w] = picture
    return sheet


def png(pixels: UInt8[Tensor, "h w 3"], text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of one picture, with text chunks (Latin-1 where it suffices, else UTF-8)."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    file = io.BytesIO()
    Pillow.fromarray(pixels.numpy()).save(file, format="png", pnginfo=info)
    return file.getvalue()


def read_picture(path: str | Path) -> Pillow.Image:
    """A picture from anybody's file, turned as its EXIF says: RGBA where anything may be transparent, else RGB.

    UserError where it is none, or one of too many pixels.
    """
    try:
        with warnings.catch_warnings(), Pillow.open(path, formats=FORMATS) as picture:
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)  # refused here, in one line
            if max(picture.size) > MAX_SIDE:
                raise UserError(f"{str(path)!r} is {picture.width}x{picture.height}: at most {MAX_SIDE} pixels a side")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits a grey pixel, which Pillow would clip to 255
                upright = Pillow.fromarray((np.asarray(upright, dtype=np.float32) / 257).round().astype(np.uint8))
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except UserError:
        raise
    except PILLOW_ERRORS as error:
        raise UserError(f"cannot read {str(path)!r} as a picture (PNG, JPEG or WebP): {reason(error)}") from None


def to_image(picture: Pillow.Image) -> Image:
    """(1, 3, h, w) in [-1, 1] of an RGB picture, or an RGBA one laid on white."""
    if picture.mode == "RGBA":
        picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1


def read_text(path: str | Path) -> dict[str, str]:
    """What is written in a picture beside its pixels, which are not decoded: a PNG's text chunks; of a JPEG or WebP the
    comment that A1111 writes, as `parameters`, and the `name:value` that ComfyUI writes. UserError for another file."""
    try:
        with Pillow.open(path, formats=FORMATS) as picture:
            if picture.format == "PNG":
                return {str(key): str(value) for key, value in picture.info.items() if isinstance(value, str)}
            exif = picture.getexif()
            comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            named = (str(exif.get(tag, "")).partition(":") for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
            text = {name: value for name, colon, value in named if colon}
            return text | ({"parameters": _comment(comment)} if comment else {})
    except PILLOW_ERRORS as error:
        raise UserError(f"cannot read {str(path)!r} as a picture (PNG, JPEG or WebP): {reason(error)}") from None


def _comment(value: bytes | str) -> str:
    """EXIF's user comment: eight letters that name its code, then the text."""
    if isinstance(value, str):
        return value
    code = {b"UNICODE\0": "utf-16-be"}.get(value[:8], "utf-8")
    return value[8:].decode(code, errors="replace")


def folder(path: str | Path) -> Path:
    """Make a folder for pictures; UserError where it cannot be one."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write pictures to {str(path)!r}: {error.strerror}") from None
    return Path(path)


def save_next(data: bytes, into: Path, prefix: str = "", digits: int = 5) -> Path:
    """Write a PNG under the next free number, `into/{prefix}{number}.png`, and return its path.

    The file appears whole or not at all, and never in place of another, however many processes write.
    """
    name = re.compile(re.escape(prefix) + r"(\d+)\.png")
    try:
        number = 1 + max((int(m[1]) for p in into.iterdir() if (m := name.fullmatch(p.name))), default=-1)
        while True:
            path = into / f"{prefix}{number:0{digits}d}.png"
            try:
                with replacing(path, replace=False) as temporary:
                    temporary.write_bytes(data)
                return path
            except FileExistsError:  # somebody else took the number meanwhile
                number += 1
    except OSError as error:
        raise UserError(f"cannot write a picture to {str(into)!r}: {error.strerror}") from None
