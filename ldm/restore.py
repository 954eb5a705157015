"""What was done to a picture before it was measured: blurred, made small, or stripped of its colours."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.canvas import Canvas
from ldm.errors import UserError, unknown
from ldm.shapes import Image


class Damage(NamedTuple):
    """apply: the damage to a picture, linear; again: whether a damaged one may go through it again, and stay as it is.

    enlarge: how many times larger than what was measured the whole picture is.
    """

    apply: Callable[[Image], Image]
    again: bool = True
    enlarge: int = 1

    def measured(self, image: Image) -> Float[Tensor, "b 3 _ _"]:
        """What was measured, of the picture that `enlarged` gives."""
        return self.apply(image) if self.again else image


def blur(deviation: float) -> Damage:
    """A Gaussian blur of so many pixels."""
    reach = math.ceil(3 * deviation)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = (line / line.sum()).view(1, 1, 1, -1)

    def apply(image: Image) -> Image:
        k = kernel.to(image).repeat(3, 1, 1, 1)
        wide = F.pad(image, (reach, reach, reach, reach), mode="replicate")
        return F.conv2d(F.conv2d(wide, k, groups=3), k.transpose(2, 3), groups=3)

    return Damage(apply, again=False)


def small(factor: float) -> Damage:
    """A picture of a whole number of times fewer pixels a side, each the mean of those that it stands for."""
    return Damage(lambda image: F.avg_pool2d(image, int(factor)), enlarge=int(factor))


def grey(_: float) -> Damage:
    """A picture without colours (luma of BT.601)."""

    def apply(image: Image) -> Image:
        weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (image * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)

    return Damage(apply)


DAMAGES: dict[str, tuple[Callable[[float], Damage], float, tuple[float, float]]] = {
    "blur": (blur, 2.0, (0.1, 32)),  # what it is, its usual size, and the sizes that it may have
    "small": (small, 4.0, (2, 16)),
    "grey": (grey, 1.0, (1, 1)),
}


def parse(text: str) -> Damage:
    """`blur:2`, `small:4` or `grey`. UserError for another."""
    name, _, size = text.partition(":")
    if name not in DAMAGES:
        raise unknown("damage", name, DAMAGES)
    make, usual, (least, most) = DAMAGES[name]
    try:
        value = float(size) if size else usual
    except ValueError:
        value = math.nan
    if not least <= value <= most or (name == "small" and value % 1):
        raise UserError(f"damage {text!r}: give {name}:{usual:g}, from {least:g} to {most:g}")
    return make(value)


def enlarged(canvas: Canvas, damage: Damage) -> Canvas:
    """The measured picture in the size of the whole one, which measures just so. UserError under a mask."""
    if canvas.mask is not None:
        raise UserError("--restore is of a whole picture: leave --mask and --expand out")
    if damage.enlarge == 1:
        return canvas
    grown = F.interpolate(canvas.image, scale_factor=float(damage.enlarge), mode="bicubic").clamp(-1, 1)
    return Canvas(grown + F.interpolate(canvas.image - damage.apply(grown), scale_factor=float(damage.enlarge)))
