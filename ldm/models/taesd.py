"""TAESD, a tiny autoencoder distilled from Stable Diffusion's (Ollin Boer Bohan, github.com/madebyollin/taesd).

It speaks the same latents, already normalised, at a hundredth of the work: for previews, or in place of the whole.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import Gaussian
from ldm.models.layers import Features
from ldm.shapes import Image, Latent


@dataclass(frozen=True)
class TinyConfig:
    """z_channels: 4 for SD 1, 2 and XL, 16 for SD 3; width: of every layer."""

    z_channels: int = 4
    width: int = 64

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each side."""
        return 8


class Block(nn.Module):
    """Three convolutions and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Features) -> Features:
        return F.relu(self.conv(x) + x)


class Squash(nn.Module):
    """Outliers of a latent, drawn in to within 3 deviations."""

    def forward(self, z: Features) -> Features:
        return torch.tanh(z / 3) * 3


def _encoder(config: TinyConfig) -> nn.Sequential:
    width = config.width
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False), *(Block(width) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(width, config.z_channels, 3, padding=1))


def _decoder(config: TinyConfig) -> nn.Sequential:
    width = config.width
    layers: list[nn.Module] = [Squash(), nn.Conv2d(config.z_channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        up = nn.Conv2d(width, width, 3, padding=1, bias=False)
        layers += [*(Block(width) for _ in range(3)), nn.Upsample(scale_factor=2), up]
    return nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1))


class TinyAutoencoder(nn.Module):
    """Called as `Autoencoder` is: images in [-1, 1], normalised latents; what it encodes has no spread."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    @property
    def factor(self) -> int:
        return self.config.factor

    def encode(self, image: Image) -> Gaussian:
        """image: (b, 3, H, W) in [-1, 1], H and W multiples of 8."""
        mean: Tensor = self.encoder((image + 1) / 2)
        return Gaussian(mean, torch.full_like(mean, -30.0))

    def decode(self, latent: Latent) -> Image:
        """latent: (b, z, h, w), normalised. The image is not clamped."""
        return self.decoder(latent) * 2 - 1
