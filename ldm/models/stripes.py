"""An autoencoder on pictures of any size: its widest maps are worked out in stripes of rows, as if they were whole.

What a convolution sees beyond a stripe's edge goes along as further rows, and a group norm takes its statistics from
the whole map, so the result is that of one piece up to rounding. Peak memory is two maps, half of what the whole takes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import Autoencoder, Gaussian
from ldm.models.layers import Downsample, Features, ResBlock, Upsample
from ldm.shapes import Image, Latent

ROWS = 64
Affine = tuple[Tensor, Tensor]


@torch.no_grad()
def decode(autoencoder: Autoencoder, latent: Latent, rows: int = ROWS) -> Image:
    """`autoencoder.decode(latent)`, in stripes of so many rows."""
    decoder = autoencoder.decoder
    z = autoencoder.raw(latent)
    z = z if decoder.codebook is None else decoder.codebook(z)
    h = decoder.mid(decoder.conv_in(decoder.expand(z)))
    for stage in decoder.up:
        for block in stage.blocks:  # type: ignore[union-attr]
            h = _res(block, h, rows)
        if isinstance(stage.resample, Upsample):
            h = _up(stage.resample, h, rows)
    return F.pixel_shuffle(_tail(decoder.norm_out, decoder.conv_out, h, rows), decoder.patch)


@torch.no_grad()
def encode(autoencoder: Autoencoder, image: Image, rows: int = ROWS) -> Gaussian:
    """`autoencoder.encode(image)`, in stripes of so many rows."""
    encoder = autoencoder.encoder
    h = encoder.conv_in(F.pixel_unshuffle(image, encoder.patch))
    for stage in encoder.down:
        for block in stage.blocks:  # type: ignore[union-attr]
            h = _res(block, h, rows)
        if isinstance(stage.resample, Downsample):
            h = _down(stage.resample, h, rows)
    moments = encoder.moments(_tail(encoder.norm_out, encoder.conv_out, encoder.mid(h), rows))
    return autoencoder.latents(moments)


def _spans(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _affine(norm: nn.GroupNorm, x: Features, rows: int) -> Affine:
    """What a group norm multiplies each channel with and adds to it, from the statistics of the whole map."""
    b, channels, height, width = x.shape
    total = torch.zeros((2, b, norm.num_groups), dtype=torch.float64, device=x.device)
    for top, end in _spans(height, rows):
        part = x[:, :, top:end].double().reshape(b, norm.num_groups, -1)
        total += torch.stack([part.sum(-1), part.square().sum(-1)])
    mean, square = total * norm.num_groups / (channels * height * width)
    inverse = (square - mean**2 + norm.eps).rsqrt()
    mean, inverse = (each.repeat_interleave(channels // norm.num_groups, 1).float() for each in (mean, inverse))
    scale = inverse * norm.weight.float()
    return scale[:, :, None, None], (norm.bias.float() - mean * scale)[:, :, None, None]


def _normed(x: Features, affine: Affine) -> Features:
    return F.silu((x.float() * affine[0] + affine[1]).to(x.dtype))


def _across(x: Features, top: int, end: int, work: Callable[[Features], Features], scale: int = 1) -> Features:
    """A 3 x 3 convolution's output for rows top to end; work takes a row more on each side where there is one."""
    first, last = max(top - 1, 0), min(end + 1, x.shape[2])
    out = work(x[:, :, first:last])
    return out[:, :, (top - first) * scale : out.shape[2] - (last - end) * scale]


def _res(block: ResBlock, x: Features, rows: int) -> Features:
    first = _affine(block.norm1, x, rows)
    h = x.new_empty((x.shape[0], block.conv1.out_channels, *x.shape[2:]))
    for top, end in _spans(x.shape[2], rows):
        h[:, :, top:end] = _across(x, top, end, lambda part: block.conv1(_normed(part, first)))
    second = _affine(block.norm2, h, rows)
    above = h[:, :, :0]
    for top, end in _spans(x.shape[2], rows):  # in place: the row that the next stripe still asks for is put aside
        last = min(end + 1, x.shape[2])
        part = torch.cat([above, h[:, :, top:last]], dim=2)
        above = h[:, :, end - 1 : end].clone()
        out = block.conv2(_normed(part, second))[:, :, part.shape[2] - (last - top) :][:, :, : end - top]
        whole = x[:, :, top:end]
        h[:, :, top:end] = out + (whole if block.skip is None else block.skip(whole))
    return h


def _up(up: Upsample, x: Features, rows: int) -> Features:
    b, channels, height, width = x.shape
    out = x.new_empty((b, channels, 2 * height, 2 * width))
    for top, end in _spans(height, rows):
        out[:, :, 2 * top : 2 * end] = _across(x, top, end, up, scale=2)
    return out


def _down(down: Downsample, x: Features, rows: int) -> Features:
    b, channels, height, width = x.shape
    out = x.new_empty((b, channels, height // 2, width // 2))
    for top, end in _spans(height // 2, rows):
        part = F.pad(x[:, :, 2 * top : 2 * end + 1], (0, 1, 0, int(2 * end == height)))
        out[:, :, top:end] = down.conv(part)
    return out


def _tail(norm: nn.GroupNorm, conv: nn.Conv2d, x: Features, rows: int) -> Features:
    affine = _affine(norm, x, rows)
    spans = _spans(x.shape[2], rows)
    return torch.cat([_across(x, top, end, lambda part: conv(_normed(part, affine))) for top, end in spans], dim=2)
