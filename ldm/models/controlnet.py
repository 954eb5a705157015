"""Networks that steer a UNet by a picture: ControlNet (Zhang et al. 2023, arXiv:2302.05543), T2I-Adapter (Mou et al.
2023, arXiv:2302.08453), and the backbone that listens to them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.models.layers import Features, Middle
from ldm.models.unet import Control, Level, UNet, UNetConfig, contract, embed
from ldm.shapes import Sigma

Hint = Float[Tensor, "b c H W"]  # in [0, 1], at the picture's own size


class ControlNet(nn.Module):
    """net(z, label, cond, hint) -> Control: a UNet's half that goes down, and 1 x 1 convolutions that begin at zero.

    hint_widths: of the convolutions that bring the hint to the latent's size; each but the first halves it.
    """

    time: nn.Sequential
    vector: nn.Sequential | None
    conv_in: nn.Conv2d
    down: Sequence[Level]
    mid: Middle

    def __init__(
        self,
        config: UNetConfig,
        hint_channels: int = 3,
        hint_widths: tuple[int, ...] = (16, 32, 96, 256),
        *,
        unet: UNet | None = None,
    ) -> None:
        """unet: whose half it starts as (Sec. 3.1), a fresh one where there is none."""
        super().__init__()
        self.config, self.hint_channels, self.factor = config, hint_channels, 2 ** (len(hint_widths) - 1)
        for name in ("time", "vector", "conv_in", "down", "mid"):
            setattr(self, name, copy.deepcopy(getattr(unet, name)) if unet else getattr(UNet(config), name))
        convolutions = [nn.Conv2d(hint_channels, hint_widths[0], 3, padding=1)]
        for narrow, wide in pairwise(hint_widths):
            convolutions.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            convolutions.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        convolutions.append(nn.Conv2d(hint_widths[-1], config.channels[0], 3, padding=1))
        self.hint = nn.ModuleList(convolutions)
        widths = [
            width for width in config.channels for _ in range(config.res_blocks + 1)
        ]  # one more for each halving,
        widths = [config.channels[0], *widths[:-1]]  # of which the last level has none, and for the first features
        self.zero = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.zero_middle = nn.Conv2d(config.channels[-1], config.channels[-1], 1)
        for layer in (self.hint[-1], *self.zero, self.zero_middle):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, z: Features, label: Sigma, cond: Conditioning, hint: Hint) -> Control:
        """z, label, cond: the UNet's own; hint: `factor` times as large as z."""
        seen = hint.to(z.dtype)
        for convolution in self.hint[:-1]:
            seen = F.silu(convolution(seen))
        h = self.conv_in(z[:, : self.config.in_channels]) + self.hint[-1](seen)
        h, skips = contract(self, h, embed(self, label, cond, z.dtype), cond)
        return Control([layer(skip) for layer, skip in zip(self.zero, skips, strict=True)], self.zero_middle(h))


@dataclass(frozen=True)
class T2IConfig:
    """channels: of the features, one a level and maybe one for the middle; halves: before which the picture is halved.

    factor: pixels along each side that the first one sees as one.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    hint_channels: int = 3
    factor: int = 8
    halves: tuple[bool, ...] = (False, True, True, True)


class T2IBlock(nn.Module):
    """Convolution, ReLU, 1 x 1 convolution, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Features) -> Features:
        return x + self.block2(F.relu(self.block1(x)))


class T2IAdapter(nn.Module):
    """net(z, label, cond, hint) -> Control: the features follow from the hint alone."""

    def __init__(self, config: T2IConfig) -> None:
        super().__init__()
        self.config, self.hint_channels, widths = config, config.hint_channels, config.channels
        self.conv_in = nn.Conv2d(config.hint_channels * config.factor**2, widths[0], 3, padding=1)
        before = (widths[0], *widths[:-1])
        self.fits = nn.ModuleList(
            nn.Conv2d(i, o, 1) if i != o else nn.Identity() for i, o in zip(before, widths, strict=True)
        )
        self.body = nn.ModuleList(nn.Sequential(*(T2IBlock(width) for _ in range(config.blocks))) for width in widths)

    def forward(self, z: Features, label: Sigma, cond: Conditioning, hint: Hint) -> Control:
        h = self.conv_in(F.pixel_unshuffle(hint.to(z.dtype), self.config.factor))
        features = []
        for halve, fit, blocks in zip(self.config.halves, self.fits, self.body, strict=True):
            h = blocks(fit(F.avg_pool2d(h, 2, ceil_mode=True) if halve else h))
            features.append(h)
        return Control(inner=features)


class Steering(NamedTuple):
    """A network, the hint (b, c, H, W) it is shown, and how much it counts."""

    network: ControlNet | T2IAdapter
    hint: Hint
    weight: float = 1.0


class Controlled(nn.Module):
    """A UNet under the control of other networks, called as the UNet is. Hints serve every part of a guidance batch."""

    def __init__(self, backbone: UNet, steerings: Sequence[Steering]) -> None:
        super().__init__()
        self.backbone, self.steerings = backbone, steerings

    def forward(self, z: Features, label: Sigma, cond: Conditioning) -> Features:
        total = Control()
        for network, hint, weight in self.steerings:
            rows = hint.repeat(len(z) // len(hint), 1, 1, 1)
            total = _plus(total, network(z, label, cond, rows), weight)
        return self.backbone(z, label, cond, total)


def _plus(total: Control, more: Control, weight: float) -> Control:
    def add(mine: Sequence[Features], other: Sequence[Features]) -> Sequence[Features]:
        scaled = [feature * weight for feature in other]
        return [a + b for a, b in zip(mine, scaled, strict=True)] if mine and other else [*mine, *scaled]

    middle = total.middle + more.middle * weight
    return Control(add(total.skips, more.skips), middle, add(total.inner, more.inner))
