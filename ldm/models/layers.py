"""The convolutional parts that the UNet and the autoencoder share (Rombach et al. 2022, arXiv:2112.10752)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Features = Float[Tensor, "b _ _ _"]


def sinusoid(label: Float[Tensor, " b"], width: int) -> Float[Tensor, "b d"]:
    """[cos, sin] features of a timestep, in fp32 (Vaswani et al. 2017, Sec. 3.5; periods 2 pi .. 2 pi * 10,000)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=label.device, dtype=torch.float32))
    angles = label.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018), and SiLU with it: a place where one kernel may do both."""

    def activated(self, x: Features) -> Features:
        return F.silu(self(x))


def norm(channels: int, groups: int, eps: float) -> GroupNorm:
    """A norm, with an error that says which widths work."""
    if channels % groups:
        raise ValueError(f"{channels} channels are not divisible by {groups} groups: choose another width or `groups`")
    return GroupNorm(groups, channels, eps=eps)


class ResBlock(nn.Module):
    """Two convolutions with a residual path; the time embedding enters between them where `time_dim` is given."""

    def __init__(self, channels: int, out: int, *, groups: int, eps: float, time_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = norm(channels, groups, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time_dim, out) if time_dim else None
        self.norm2 = norm(out, groups, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Features, time: Float[Tensor, "b d"] | None = None) -> Features:
        """x: (b, channels, h, w); time: (b, time_dim), already through SiLU."""
        h = self.conv1(self.norm1.activated(x))
        if self.time is not None and time is not None:
            h = h + self.time(time)[:, :, None, None]
        h = self.conv2(self.norm2.activated(h))
        return h + (x if self.skip is None else self.skip(x))


class Middle(nn.Module):
    """ResBlock, attention where there is one, ResBlock, at the lowest resolution."""

    def __init__(self, width: int, attn: Callable[[], nn.Module] | None, *, groups: int, eps: float, time_dim: int = 0):
        super().__init__()
        self.res1 = ResBlock(width, width, groups=groups, eps=eps, time_dim=time_dim)
        self.attn = attn() if attn else None
        self.res2 = ResBlock(width, width, groups=groups, eps=eps, time_dim=time_dim)

    def forward(self, x: Features, time: Float[Tensor, "b d"] | None = None, *cond: Any) -> Features:
        """cond: what the attention is called with beside the map."""
        h = self.res1(x, time)
        return self.res2(h if self.attn is None else self.attn(h, *cond), time)


class Downsample(nn.Module):
    """Halve h and w by a strided convolution. The UNet pads all sides; the autoencoder only right and below."""

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.padding = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Features) -> Features:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double h and w: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Features) -> Features:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
