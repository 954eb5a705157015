"""Numbers as tensors, each made once and shared: never change one in place.

A step of a sampler is a handful of operations of 2 microseconds each, and to wrap a Python float anew costs half of
one. On a GPU this also spares copying a level there, and waiting to read it back.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ldm.shapes import Sigma


@lru_cache(maxsize=4096)
def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A factor: 0-d and on the CPU, from where it multiplies tensors of any device."""
    with torch.inference_mode(False):  # else it would be of no use to autograd later
        return torch.tensor(value, dtype=dtype, device="cpu")


@lru_cache(maxsize=4096)
def uniform(value: float, n: int, dtype: torch.dtype, device: torch.device) -> Sigma:
    """n times one value, which `level` reads without asking the device."""
    with torch.inference_mode(False):
        filled = torch.full((n,), value, dtype=dtype, device=device)
    filled.level = float(scalar(value, dtype))  # type: ignore[attr-defined]
    return filled


def forget() -> None:
    """Drop them all: where tensors without data were computed with, some of these have none either."""
    scalar.cache_clear()
    uniform.cache_clear()


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def column(values: Tensor, like: Tensor) -> Tensor:
    """A value of each sample as (b, 1, 1, 1), to multiply a tensor such as `like` with."""
    return values.view((-1,) + (1,) * (like.ndim - 1))


def level(sigma: Sigma) -> float | None:
    """The one noise level of a whole batch, as its dtype has it; None where its samples differ."""
    known: float | None = getattr(sigma, "level", None)
    if known is None:
        levels = set(sigma.tolist())
        known = levels.pop() if len(levels) == 1 else None
    return known


def first(sigma: Sigma) -> float:
    """The noise level of the first sample."""
    one = level(sigma)
    return float(sigma[0]) if one is None else one
