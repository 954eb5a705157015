"""The denoising UNet with cross-attention, in Stable Diffusion's layout (Rombach et al. 2022, Sec. 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.models.attention import SpatialTransformer
from ldm.models.layers import Downsample, Features, Middle, ResBlock, Upsample, norm, sinusoid
from ldm.shapes import Sigma


@dataclass(frozen=True)
class UNetConfig:
    """Widths and depths of a UNet; the defaults are Stable Diffusion 1.

    channels, depth and heads have one value a level, from full resolution down: the width, the transformer blocks after
    each ResBlock (0: none), and the attention heads. vector_dim: width of `Conditioning.vector`, 0 without one (SDXL
    2816).
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    res_blocks: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    vector_dim: int = 0
    linear_projection: bool = False
    groups: int = 32

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.depth) == len(self.heads):
            raise ValueError(f"channels {self.channels}, depth {self.depth} and heads {self.heads} differ in length")

    @property
    def factor(self) -> int:
        """Height and width of the latent must be multiples of this."""
        return 2 ** (len(self.channels) - 1)


class Control(NamedTuple):
    """Features added to a UNet's own: to each that goes across and the middle's, or one a level on the way down."""

    skips: Sequence[Features] = ()  # with the middle's ControlNet's
    middle: Features | float = 0.0
    inner: Sequence[Features] = ()  # T2I-Adapter's


class Block(nn.Module):
    """One ResBlock, and the transformer behind it where the level has one."""

    def __init__(self, config: UNetConfig, channels: int, out: int, level: int) -> None:
        super().__init__()
        self.res = ResBlock(channels, out, groups=config.groups, eps=1e-5, time_dim=4 * config.channels[0])
        depth = config.depth[level]
        self.attn = _transformer(config, out, config.heads[level], depth) if depth else None

    def forward(self, x: Features, time: Tensor, cond: Conditioning) -> Features:
        h = self.res(x, time)
        return h if self.attn is None else self.attn(h, cond)


class Level(nn.Module):
    """The blocks of one resolution, then the way to the next."""

    def __init__(self, blocks: list[Block], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(nn.Module):
    """net(z, label, cond): from a scaled noisy latent, what the network is told of its noise, and the conditions.

    ValueError where a width does not fit its groups or heads.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, last = config.channels, len(config.channels) - 1
        time_dim = 4 * channels[0]

        def embedding(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))

        self.time = embedding(channels[0])
        self.vector = embedding(config.vector_dim) if config.vector_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)

        skips, width = [channels[0]], channels[0]
        down = []
        for level, out in enumerate(channels):
            blocks = []
            for _ in range(config.res_blocks):
                blocks.append(Block(config, width, out, level))
                skips.append(width := out)
            down.append(Level(blocks, Downsample(out, symmetric=True) if level < last else None))
            if level < last:
                skips.append(out)
        self.down: Sequence[Level] = nn.ModuleList(down)  # type: ignore[assignment]
        attn = partial(_transformer, config, channels[-1], config.heads[-1], config.mid_depth)
        self.mid = Middle(
            channels[-1], attn if config.mid_depth else None, groups=config.groups, eps=1e-5, time_dim=time_dim
        )
        up = []
        for level, out in reversed(list(enumerate(channels))):
            blocks = []
            for _ in range(config.res_blocks + 1):
                blocks.append(Block(config, width + skips.pop(), out, level))
                width = out
            up.append(Level(blocks, Upsample(out) if level > 0 else None))
        self.up: Sequence[Level] = nn.ModuleList(up)  # type: ignore[assignment]
        self.norm_out = norm(width, config.groups, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Zero the last layer of each residual branch and of the network (Ho et al. 2020; Dhariwal & Nichol 2021)."""
        for module in self.modules():
            if isinstance(module, (ResBlock, SpatialTransformer)):
                layer = module.conv2 if isinstance(module, ResBlock) else module.proj_out
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, z: Features, label: Sigma, cond: Conditioning, control: Control | None = None) -> Features:
        """z: (b, in_channels, h, w), h and w multiples of `config.factor`; label: (b,) -> (b, out_channels, h, w)."""
        time = embed(self, label, cond, z.dtype)
        h, skips = contract(self, self.conv_in(z), time, cond, control.inner if control else ())
        if control and control.skips:
            skips = [skip + more for skip, more in zip(skips, control.skips, strict=True)]
            h = h + control.middle
        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time, cond)
            if level.resample is not None:
                h = level.resample(h)
        return self.conv_out(self.norm_out.activated(h))


@runtime_checkable
class Contracting(Protocol):
    """The half of a UNet that goes down, as a UNet and a ControlNet have it."""

    config: UNetConfig
    time: nn.Sequential
    vector: nn.Sequential | None
    down: Sequence[Level]
    mid: Middle


def embed(net: Contracting, label: Sigma, cond: Conditioning, dtype: torch.dtype) -> Tensor:
    """What every ResBlock is told of the time, and of SDXL's vector: (b, 4 * channels[0])."""
    time = net.time(sinusoid(label, net.config.channels[0]).to(dtype))
    if net.vector is not None:
        time = time + net.vector(cond.vector)
    return F.silu(time)


def contract(
    net: Contracting, h: Features, time: Tensor, cond: Conditioning, inner: Sequence[Features] = ()
) -> tuple[Features, list[Features]]:
    """From the first features to the middle's, and every one on the way, which the way up will see again.

    inner: features added on the way, one a level: before the halving where the level attends to the text, else after;
    one more is the middle's.
    """
    skips = [h]
    for index, level in enumerate(net.down):
        attends = net.config.depth[index] > 0
        for number, block in enumerate(level.blocks, 1):
            h = block(h, time, cond)
            if inner and attends and number == len(level.blocks):
                h = h + inner[index]
            skips.append(h)
        if level.resample is not None:
            h = level.resample(h)
            skips.append(h)
        if inner and not attends:
            skips[-1] = h = h + inner[index]
    h = net.mid(h, time, cond)
    return (h + inner[-1] if len(inner) > len(net.down) else h), skips


def _transformer(config: UNetConfig, width: int, heads: int, depth: int) -> SpatialTransformer:
    return SpatialTransformer(
        width, heads, depth=depth, context_dim=config.context_dim, groups=config.groups, linear=config.linear_projection
    )
