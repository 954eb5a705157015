"""The autoencoder (VAE) between images and latents, in Stable Diffusion's layout.

After Esser et al. 2021 (arXiv:2012.09841) and Rombach et al. 2022 (arXiv:2112.10752).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.models.attention import Attention
from ldm.models.layers import Downsample, Features, Middle, ResBlock, Upsample, norm
from ldm.shapes import Image, Latent


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths of an autoencoder, and the statistics of its latents; the defaults are Stable Diffusion's.

    channels: one width a level from the finest down, each level but the last halves h and w. decoder_channels: the
    decoder's, where they differ. quant_convs: whether 1 x 1 convolutions stand on both sides of the latent. patch: the
    finest level sees patch x patch pixels as one, which saves most of the work (LTX-Video, arXiv:2501.00103); SD has 1.
    codebook: how many codes the decoder rounds latents to (VQGAN, arXiv:2012.09841), 0 for none.
    mean, std: of each latent channel (one value serves all), measured on data after training; SD states only a scale:
    std = 1 / 0.18215.
    """

    z_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] = ()
    res_blocks: int = 2
    mid_attention: bool = True
    quant_convs: bool = True
    patch: int = 1
    codebook: int = 0
    groups: int = 32
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.decoder_channels and len(self.decoder_channels) != len(self.channels):
            raise ValueError(f"channels {self.channels} and decoder_channels {self.decoder_channels} differ in length")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.z_channels):
                raise ValueError(f"{name} has {len(values)} values: give 1 or {self.z_channels} (z_channels)")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0")

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each side."""
        return self.patch * 2 ** (len(self.channels) - 1)


class Gaussian(NamedTuple):
    """A diagonal normal distribution over latents, (b, c, h, w)."""

    mean: Latent
    logvar: Latent

    @property
    def mode(self) -> Latent:
        return self.mean

    def sample(self, noise: Latent) -> Latent:
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self, free: float = 0.0) -> Float[Tensor, " b"]:
        """Divergence from the standard normal in nats, summed over c, h, w (Kingma & Welling 2014, App. B).

        free: what each channel's mean counts as at least (Kingma et al. 2016, Eq. 15).
        """
        nats = 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar)
        return nats.mean((2, 3)).clamp(min=free).sum(1) * nats[0, 0].numel()


class Codebook(nn.Module):
    """Rounds a latent cell to the nearest of n vectors (van den Oord et al. 2017); gradients pass as if it did not."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(n, width).uniform_(-1 / n, 1 / n))

    def ids(self, z: Latent) -> Int[Tensor, "b h w"]:
        cells, codes = rearrange(z, "b c h w -> b h w c").float(), self.codes.float()
        return (codes.square().sum(1) - 2 * cells @ codes.T).argmin(-1)

    def nearest(self, z: Latent) -> Latent:
        """The codes themselves; their gradient is the codebook's."""
        return rearrange(self.codes[self.ids(z)], "b h w c -> b c h w")

    def forward(self, z: Latent) -> Latent:
        return z + (self.nearest(z).to(z.dtype) - z).detach()


class SelfAttention(nn.Module):
    """One-head attention over all pixels, residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups, eps=1e-6)
        self.attn = Attention(width, heads=1, bias=True)

    def forward(self, x: Features) -> Features:
        h = self.attn(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.Module):
    """ResBlocks of one resolution, then the way to the next."""

    def __init__(self, widths: list[int], groups: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(i, o, groups=groups, eps=1e-6) for i, o in pairwise(widths))
        self.resample = resample

    def forward(self, x: Features) -> Features:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


def _stages(config: AutoencoderConfig, widths: Sequence[int], blocks: int, resample: Callable[..., nn.Module]) -> Any:
    """One for each width, the first as wide as what comes in, all but the last with a way to the next."""
    return nn.ModuleList(
        Stage([before] + [width] * blocks, config.groups, resample(width) if level < len(widths) else None)
        for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False), 1)
    )


def _middle(config: AutoencoderConfig, width: int) -> Middle:
    attn = partial(SelfAttention, width, config.groups) if config.mid_attention else None
    return Middle(width, attn, groups=config.groups, eps=1e-6)


class Encoder(nn.Module):
    """Image (b, 3, H, W) to the moments of its latent (b, 2 z, H / factor, W / factor)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.channels
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        self.down = _stages(config, widths, config.res_blocks, partial(Downsample, symmetric=False))
        self.mid = _middle(config, widths[-1])
        self.norm_out = norm(widths[-1], config.groups, eps=1e-6)
        moments = 2 * config.z_channels
        self.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)
        self.moments = nn.Conv2d(moments, moments, 1) if config.quant_convs else nn.Identity()

    def forward(self, image: Image) -> Features:
        h = self.conv_in(F.pixel_unshuffle(image, self.patch))
        for stage in self.down:
            h = stage(h)
        return self.moments(self.conv_out(self.norm_out.activated(self.mid(h))))


class Decoder(nn.Module):
    """Latent (b, z, h, w) to image (b, 3, h * factor, w * factor)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = (config.decoder_channels or config.channels)[::-1]
        self.codebook = Codebook(config.codebook, config.z_channels) if config.codebook else None
        self.expand = nn.Conv2d(config.z_channels, config.z_channels, 1) if config.quant_convs else nn.Identity()
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(config, widths[0])
        self.up = _stages(config, widths, config.res_blocks + 1, Upsample)
        self.norm_out = norm(widths[-1], config.groups, eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)
        self.patch = config.patch

    def forward(self, z: Features) -> Image:
        z = z if self.codebook is None else self.codebook(z)
        h = self.mid(self.conv_in(self.expand(z)))
        for stage in self.up:
            h = stage(h)
        return F.pixel_shuffle(self.conv_out(self.norm_out.activated(h)), self.patch)


class Autoencoder(nn.Module):
    """encode(image) -> Gaussian over normalised latents; decode(normalised latent) -> image.

    Nothing outside knows the latent's own scale: mean and std of the config are taken out here and put back here.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        return self.config.factor

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        def row(values: tuple[float, ...]) -> Tensor:  # filled on the device: a copy from the host would stop a GPU
            return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)

        return row(self.config.mean), row(self.config.std)

    def encode(self, image: Image) -> Gaussian:
        """image: (b, 3, H, W) in [-1, 1], H and W multiples of `factor`."""
        return self.latents(self.encoder(image))

    def latents(self, moments: Features) -> Gaussian:
        """The encoder's moments as a distribution over normalised latents."""
        mean, logvar = moments.chunk(2, dim=1)
        if self.config.codebook:  # a point, that the decoder rounds
            logvar = torch.full_like(logvar, -30)
        shift, scale = self._statistics(mean)
        return Gaussian((mean - shift) / scale, logvar.clamp(-30, 20) - 2 * scale.log())

    def decode(self, latent: Latent) -> Image:
        """latent: (b, z, h, w), normalised. The image is not clamped."""
        return self.decoder(self.raw(latent))

    def raw(self, latent: Latent) -> Latent:
        """A normalised latent in the decoder's own scale."""
        shift, scale = self._statistics(latent)
        return latent * scale + shift


def normalised(config: AutoencoderConfig) -> bool:
    """Whether latent statistics were measured (or are known): False for a fresh config."""
    return not (set(config.mean) == {0.0} and set(config.std) == {1.0}) and all(map(math.isfinite, config.std))
