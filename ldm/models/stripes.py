"""An autoencoder on pictures of any size: its widest maps are worked out in stripes of rows, as if they were whole.

What a convolution sees beyond a stripe's edge goes along as further rows, and a group norm takes its statistics from
the whole map, so the result is that of one piece up to rounding. Peak memory is two maps, half of what the whole takes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.autoencoder import Autoencoder, Gaussian
from ldm.models.layers import Downsample, Features, ResBlock, Upsample
from ldm.shapes import Image, Latent

ROWS = 64


@torch.no_grad()
def decode(autoencoder: Autoencoder, latent: Latent, rows: int = ROWS) -> Image:
    """`autoencoder.decode(latent)`, in stripes of so many rows."""
    decoder = autoencoder.decoder
    z = autoencoder.raw(latent)
    z = z if decoder.codebook is None else decoder.codebook(z)
    h = decoder.mid(decoder.conv_in(decoder.expand(z)))
    for stage in decoder.up:
        for block in stage.blocks:
            h = _res(block, h, rows)
        if isinstance(stage.resample, Upsample):
            h = _striped(h, stage.resample, rows, scale=2)
    return F.pixel_shuffle(_normed(decoder.norm_out, decoder.conv_out, h, rows), decoder.patch)


@torch.no_grad()
def encode(autoencoder: Autoencoder, image: Image, rows: int = ROWS) -> Gaussian:
    """`autoencoder.encode(image)`, in stripes of so many rows."""
    encoder = autoencoder.encoder
    h = encoder.conv_in(F.pixel_unshuffle(image, encoder.patch))
    for stage in encoder.down:
        for block in stage.blocks:
            h = _res(block, h, rows)
        if isinstance(stage.resample, Downsample):
            h = _down(stage.resample, h, rows)
    return autoencoder.latents(encoder.moments(_normed(encoder.norm_out, encoder.conv_out, encoder.mid(h), rows)))


def _spans(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _striped(
    x: Features, work: Callable[[Features], Features], rows: int, *, scale: int = 1, into: Features | None = None
) -> Features:
    """What `work`, which ends in a 3 x 3 convolution, makes of a map. into: where it goes, which may be x itself."""
    above, height = x[:, :, :0], x.shape[2]
    for top, end in _spans(height, rows):
        part = torch.cat([above, x[:, :, top : end + 1]], dim=2)
        out = work(part)[:, :, above.shape[2] * scale :][:, :, : (end - top) * scale]
        above = x[:, :, end - 1 : end].clone()  # the next stripe still asks for it
        into = x.new_empty((*out.shape[:2], height * scale, out.shape[3])) if into is None else into
        into[:, :, top * scale : end * scale] = out
    assert into is not None
    return into


def _normed(norm: nn.GroupNorm, conv: nn.Conv2d, x: Features, rows: int, into: Features | None = None) -> Features:
    """conv(silu(norm(x))), the norm by the statistics of the whole map."""
    b, channels, height, width = x.shape
    total = torch.zeros((2, b, norm.num_groups), dtype=torch.float64, device=x.device)
    for top, end in _spans(height, rows):
        part = x[:, :, top:end].double().reshape(b, norm.num_groups, -1)
        total += torch.stack([part.sum(-1), part.square().sum(-1)])
    mean, square = total * norm.num_groups / (channels * height * width)
    inverse = (square - mean**2 + norm.eps).rsqrt()
    mean, inverse = (each.repeat_interleave(channels // norm.num_groups, 1).float() for each in (mean, inverse))
    scale = inverse * norm.weight.float()
    scale, shift = (each[:, :, None, None] for each in (scale, norm.bias.float() - mean * scale))
    return _striped(x, lambda part: conv(F.silu((part.float() * scale + shift).to(x.dtype))), rows, into=into)


def _res(block: ResBlock, x: Features, rows: int) -> Features:
    h = _normed(block.norm1, block.conv1, x, rows)
    h = _normed(block.norm2, block.conv2, h, rows, into=h)
    for top, end in _spans(x.shape[2], rows):
        part = x[:, :, top:end]
        h[:, :, top:end] += part if block.skip is None else block.skip(part)
    return h


def _down(down: Downsample, x: Features, rows: int) -> Features:
    b, channels, height, width = x.shape
    out = x.new_empty((b, channels, height // 2, width // 2))
    for top, end in _spans(height // 2, rows):
        part = F.pad(x[:, :, 2 * top : 2 * end + 1], (0, 1, 0, int(2 * end == height)))
        out[:, :, top:end] = down.conv(part)
    return out
