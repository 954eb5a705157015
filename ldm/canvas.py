"""A picture to start from, and which of its pixels are painted anew."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as Pillow
from torch import Tensor

from ldm.errors import UserError
from ldm.images import read_picture, to_image
from ldm.request import Request
from ldm.shapes import Image

Mask = Float[Tensor, "1 1 H W"]
ALPHA = "alpha"  # in place of a mask's file: what is transparent


@dataclass(frozen=True)
class Canvas:
    """image: (1, 3, H, W) in [-1, 1]; mask: 1 where it is painted, 0 where each pixel stays, between a mixture.

    Without a mask all is painted, and may resemble what was there.
    """

    image: Image
    mask: Mask | None = None

    @property
    def digest(self) -> str:
        """The sha256 of what the picture starts from."""
        parts = [part.contiguous().numpy().tobytes() for part in (self.image, self.mask) if part is not None]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def request(self, request: Request) -> Request:
        """The request for a picture of this size; strength 0.75 where it says none, 1 under a mask or to restore."""
        height, width = self.image.shape[2:]
        usual = 0.75 if self.mask is None and not request.restore else 1.0
        strength = usual if request.strength is None else request.strength
        return replace(request, width=width, height=height, strength=strength)

    def padded(self, height: int, width: int) -> "Canvas":
        """The same at the top left of a larger one, its last row and column repeated."""
        sides = (0, width - self.image.shape[3], 0, height - self.image.shape[2])
        grow = partial(F.pad, pad=sides, mode="replicate")
        return Canvas(grow(self.image), None if self.mask is None else grow(self.mask))

    def finish(self, pictures: Image) -> Float[Tensor, "b 3 _ _"]:
        """Pictures (b, 3, h, w) cut to this one's size, every pixel where the mask is 0 as it was here."""
        height, width = self.image.shape[2:]
        cut = pictures[:, :, :height, :width]
        if self.mask is None:
            return cut
        image, mask = self.image.to(cut), self.mask.to(cut)
        return torch.where(mask == 0, image, image.lerp(cut.clamp(-1, 1), mask))


def read_canvas(
    picture: str | Path,
    mask: str | Path | None = None,
    expand: str | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> Canvas:
    """Read a picture, and a mask of its size, white where it is painted; or `alpha`, what is transparent in it.

    expand: pixels to paint around it, one number for all sides or LEFT,TOP,RIGHT,BOTTOM. size: (width, height) to scale
    both to first, None as it is. UserError for what cannot be read, and for a mask of another size or an empty one.
    """
    first = read_picture(picture)
    cover = None
    if mask is not None:
        cover = _alpha(first, picture) if str(mask) == ALPHA else _grey(mask, first.size)
        if cover.getextrema() == (0, 0):
            raise UserError(f"the mask {str(mask)!r} is empty, so nothing would change: white is what is painted")
    wanted = (size[0] or first.width, size[1] or first.height)
    if wanted != first.size:
        first = first.resize(wanted, Pillow.Resampling.LANCZOS)
        cover = cover and cover.resize(wanted, Pillow.Resampling.BOX)
    painted = None if cover is None else torch.from_numpy(np.array(cover))[None, None] / 255
    canvas = Canvas(to_image(first), painted)
    return canvas if expand is None else _expand(canvas, expand)


def _alpha(picture: Pillow.Image, path: str | Path) -> Pillow.Image:
    if picture.mode != "RGBA":
        raise UserError(f"{str(path)!r} has nothing transparent: --mask {ALPHA} needs an alpha channel, or give a file")
    return picture.getchannel("A").point(lambda a: 255 - a)


def _grey(path: str | Path, size: tuple[int, int]) -> Pillow.Image:
    mask = read_picture(path)
    if mask.size != size:
        what = f"is {mask.width}x{mask.height}, the picture {size[0]}x{size[1]}"
        raise UserError(f"the mask {str(path)!r} {what}: give one of the same size")
    grey = (to_image(mask).mean(1)[0] + 1) * 127.5
    return Pillow.fromarray(grey.round().to(torch.uint8).numpy())


def _expand(canvas: Canvas, text: str) -> Canvas:
    try:
        sides = [int(part) for part in text.split(",")]
    except ValueError:
        sides = []
    sides = sides * 4 if len(sides) == 1 else sides
    if len(sides) != 4 or min(sides) < 0 or not any(sides):
        raise UserError(f"expand is {text!r}: give pixels for all sides, such as 32, or LEFT,TOP,RIGHT,BOTTOM")
    left, top, right, bottom = sides
    around = (left, right, top, bottom)
    known = torch.zeros_like(canvas.image[:, :1]) if canvas.mask is None else canvas.mask
    return Canvas(F.pad(canvas.image, around, mode="replicate"), F.pad(known, around, value=1.0))
