"""Pictures of one thing in other colours, so that a colour word means the same whatever it stands before."""

import hashlib

import numpy as np
from PIL import Image

PAINTS = {
    "red": (208, 32, 38),
    "orange": (240, 132, 28),
    "yellow": (246, 208, 48),
    "green": (56, 160, 64),
    "teal": (28, 156, 160),
    "blue": (44, 100, 212),
    "purple": (130, 66, 182),
    "pink": (240, 128, 180),
    "brown": (124, 80, 48),
}
_LUMA = (0.299, 0.587, 0.114)


def another(colour: str, key: str) -> str:
    """The name of a paint other than `colour`, always the same one for a key."""
    names = [name for name in PAINTS if name != colour]
    return names[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(names)]


def painted(image: Image.Image, name: str) -> Image.Image:
    """An RGB picture in the shades of a paint: what was as bright as most of the thing gets the paint itself, what was
    darker or brighter goes on to black or white, so a white ground and black tyres stay. `name`: of PAINTS."""
    paint = np.array(PAINTS[name], np.float32)
    pixels = np.asarray(image, np.float32)
    luma = pixels @ np.array(_LUMA, np.float32)
    thing = luma[(luma > 20) & (luma < 235)]
    middle = float(np.median(thing)) if thing.size else 128.0
    dark, light = luma / middle, (luma - middle) / (255 - middle)
    shades = np.where(light[..., None] < 0, paint * dark[..., None], paint + (255 - paint) * light.clip(0)[..., None])
    return Image.fromarray(shades.round().clip(0, 255).astype(np.uint8))
