"""The Inception network of 2015 whose features FID is defined by (Szegedy et al. 2015, arXiv:1512.00567).

It differs from later ones in places that change the figures: an average pool does not count the padding, the last
block pools by maximum, pictures are resized as TensorFlow 1 did. Keys are pytorch-fid's; a file without the 1,008-way
classifier `fc` gives features but no Inception score.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.errors import UserError

SIDE = 299
Kernel = int | tuple[int, int]
Branches = dict[str, tuple[tuple[int, Kernel | None], ...]]  # width and kernel of each convolution of a branch
_ROW, _COLUMN = (1, 7), (7, 1)
_FORK = None  # in place of a kernel: two convolutions beside each other, 1 x 3 and 3 x 1
_STEM = {  # width, kernel, stride, padding
    "Conv2d_1a_3x3": (32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3, 1, 1),
    "Conv2d_3b_1x1": (80, 1, 1, 0),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
}
_HALVED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")  # a pool follows these
_A: Branches = {
    "branch1x1": ((64, 1),),
    "branch5x5": ((48, 1), (64, 5)),
    "branch3x3dbl": ((64, 1), (96, 3), (96, 3)),
}
_B: Branches = {"branch3x3": ((384, 3),), "branch3x3dbl": ((64, 1), (96, 3), (96, 3))}
_D: Branches = {
    "branch3x3": ((192, 1), (320, 3)),
    "branch7x7x3": ((192, 1), (192, _ROW), (192, _COLUMN), (192, 3)),
}
_E: Branches = {
    "branch1x1": ((320, 1),),
    "branch3x3": ((384, 1), (384, _FORK)),
    "branch3x3dbl": ((448, 1), (384, 3), (384, _FORK)),
}


def _c(width: int) -> Branches:
    return {
        "branch1x1": ((192, 1),),
        "branch7x7": ((width, 1), (width, _ROW), (192, _COLUMN)),
        "branch7x7dbl": ((width, 1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)),
    }


_MIXED = {  # branches, kind of pool, width of the convolution after it; 0: the block halves the picture instead
    "Mixed_5b": (_A, "mean", 32),
    "Mixed_5c": (_A, "mean", 64),
    "Mixed_5d": (_A, "mean", 64),
    "Mixed_6a": (_B, "max", 0),
    "Mixed_6b": (_c(128), "mean", 192),
    "Mixed_6c": (_c(160), "mean", 192),
    "Mixed_6d": (_c(160), "mean", 192),
    "Mixed_6e": (_c(192), "mean", 192),
    "Mixed_7a": (_D, "max", 0),
    "Mixed_7b": (_E, "mean", 192),
    "Mixed_7c": (_E, "max", 192),
}


class Features(NamedTuple):
    """pool: (b, 2048); logits: (b, 1008), without the classifier's bias, None where the weights hold no classifier."""

    pool: Float[Tensor, "b 2048"]
    logits: Float[Tensor, "b 1008"] | None


class Convolution(nn.Module):
    def __init__(self, narrow: int, wide: int, kernel: Kernel, stride: int = 1, padding: int | str = "same") -> None:
        super().__init__()
        self.conv = nn.Conv2d(narrow, wide, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(wide, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches beside each other, joined along the channels; their convolutions are named `{branch}_{place}`."""

    def __init__(self, narrow: int, branches: Branches, pool: str, after_pool: int) -> None:
        super().__init__()
        self.pool, self.halves, self.width = pool, not after_pool, after_pool or narrow
        self.chains: list[list[list[str]]] = []  # of branches, of steps, of what stands beside each other
        for branch, chain in branches.items():
            width, steps = narrow, list[list[str]]()
            for place, (wide, kernel) in enumerate(chain, 1):
                beside = {"": kernel} if kernel else {"a": (1, 3), "b": (3, 1)}
                down = {"stride": 2, "padding": 0} if self.halves and place == len(chain) else {}
                steps.append([branch + (f"_{place}" if len(chain) > 1 else "") + end for end in beside])
                for name, size in zip(steps[-1], beside.values(), strict=True):
                    self.add_module(name, Convolution(width, wide, size, **down))
                width = wide * len(beside)
            self.chains.append(steps)
            self.width += width
        if after_pool:
            self.branch_pool = Convolution(narrow, after_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for steps in self.chains:
            y = x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            joined.append(y)
        if self.halves:
            return torch.cat([*joined, F.max_pool2d(x, 3, 2)], 1)
        mean = self.pool == "mean"
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if mean else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*joined, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """`Inception.load(path)(pixels)`: features of pictures of any size, in fp32."""

    def __init__(self, classifier: bool = False) -> None:
        super().__init__()
        width = 3
        for name, (wide, *shape) in _STEM.items():
            self.add_module(name, Convolution(width, wide, *shape))
            width = wide
        for name, parts in _MIXED.items():
            block = Mixed(width, *parts)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, 1008, bias=False) if classifier else None
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str | Path) -> "Inception":
        """Read a safetensors file. UserError where it is not there or holds other keys or shapes."""
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            hint = "get them by `make weights`"
            raise UserError(f"cannot read Inception weights {str(path)!r}, {hint}: {error}") from None
        state.pop("fc.bias", None)
        with torch.device("meta"):
            model = cls("fc.weight" in state)
        counters = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
        try:
            model.load_state_dict(state | dict.fromkeys(counters, torch.tensor(0)), assign=True)
        except RuntimeError as error:
            raise UserError(f"{str(path)!r} does not hold the 2015 Inception's weights: {error}") from None
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: UInt8[Tensor, "b 3 h w"], side: int = SIDE) -> Features:
        """side: what the pictures are resized to; FID's is 299, and less is faster."""
        x = ((resize(pixels.float(), side) - 128) / 128).contiguous(memory_format=torch.channels_last)
        for name in (*_STEM, *_MIXED):
            x = self.get_submodule(name)(x)
            x = F.max_pool2d(x, 3, 2) if name in _HALVED else x
        pool = x.float().mean((2, 3))
        return Features(pool, None if self.fc is None else self.fc(pool))


def resize(x: Float[Tensor, "b c h w"], side: int = SIDE) -> Float[Tensor, "b c {side} {side}"]:
    """Bilinear as in TensorFlow 1: the first pixels of both grids coincide, and nothing is smoothed before."""
    for dim in (2, 3):
        size = x.shape[dim]
        scale = torch.tensor(size / side, dtype=torch.float32)  # as there: the last bit decides at whole numbers
        place = torch.arange(side, device=x.device, dtype=torch.float32) * scale
        low = place.long()
        share = (place - low).view(-1, *[1] * (3 - dim))
        left = x.index_select(dim, low)
        x = left + (x.index_select(dim, (low + 1).clamp(max=size - 1)) - left) * share
    return x
