"""Hints for ControlNets, drawn from a picture: what a person would trace. By scikit-image, where it is installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError, unknown
from ldm.shapes import Image


def canny(grey: Any) -> Any:
    """Thin white edges on black (Canny 1986)."""
    from skimage import feature

    return feature.canny(grey, sigma=1.0, low_threshold=0.1, high_threshold=0.2)


def soft_edges(grey: Any) -> Any:
    """The size of the gradient, as a soft line (Farid & Simoncelli 2004), the strongest of the picture at 1."""
    from skimage import filters

    edges = filters.farid(filters.gaussian(grey, 1.0))
    return edges / max(edges.max(), 1e-6)


def lineart(grey: Any) -> Any:
    """Strokes: what is darker than its surroundings, by a difference of Gaussians (Marr & Hildreth 1980)."""
    from skimage import filters

    return (8 * (filters.gaussian(grey, 2.5) - filters.gaussian(grey, 0.8))).clip(0, 1)


HINTS: dict[str, Callable[[Any], Any]] = {"canny": canny, "soft_edges": soft_edges, "lineart": lineart}


def draw(name: str, image: Image) -> Tensor:
    """The hint (b, 3, h, w) in [0, 1] of pictures; `none`: themselves. UserError for what is not known or installed."""
    if name == "none":
        return image.clamp(-1, 1) / 2 + 0.5
    if name not in HINTS:
        raise unknown("hint", name, ["none", *HINTS])
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise UserError(f"the hint {name!r} needs scikit-image: pip install scikit-image") from None
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
    greys = ((image.detach().cpu().float().clamp(-1, 1) / 2 + 0.5) * weights).sum(1).numpy()
    drawn = torch.stack([torch.as_tensor(HINTS[name](grey)).float() for grey in greys])
    return drawn[:, None].expand(-1, 3, -1, -1).to(image.device)


def agreement(edges: Tensor, others: Tensor, within: float = 2.0) -> float:
    """F1 of two pictures' edges (h, w): found is what the other has within so many pixels. 1 where neither has any."""
    from scipy.ndimage import distance_transform_edt as distance

    def found(mine: Tensor, theirs: Tensor) -> float:
        near = torch.as_tensor(distance(~theirs.numpy())) <= within if theirs.any() else torch.zeros_like(mine)
        return float((near & mine).sum() / mine.sum()) if mine.any() else float(not theirs.any())

    precision, recall = found(edges, others), found(others, edges)
    return 2 * precision * recall / max(precision + recall, 1e-9)
