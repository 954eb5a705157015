"""A kernel for GPUs, in Triton: GroupNorm with SiLU over channels-last maps. Forward only.

To import this is to import Triton, so only who uses it does. torch's own form is the reference, and what runs where a
gradient is wanted, a map is on another device or a compiler looks on, which fuses the rest (GEGLU) by itself. Tested by
Triton's interpreter, and compiled for sm_80 and sm_90; measured on no GPU yet.
"""

from functools import cache
from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ldm.models.layers import Features, GroupNorm
from ldm.models.processor import FLOATS, by_hand

DEVICE = "cuda"
PARTS, PROGRAMS = 64, 256  # parts of a map at most, each with statistics of its own; more where that makes few programs
LARGE = 2**14  # pixels of a map whose programs take twice as much at a time


@triton.jit
@no_type_check
def _measure(
    x, means, squares, pixels, channels, part_size,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Of part_size pixels by GROUPS groups, each group's mean, and the sum of squares of its differences from that.

    Channel by channel, tile by tile, merged as Chan, Golub & LeVeque (1983) do: a large mean costs no digits.
    """
    part, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, group = tl.arange(0, LANES), tl.arange(0, PADDED)
    channel = block * GROUPS * WIDTH + lane
    inside = (lane < GROUPS * WIDTH) & (channel < channels)
    start = part * part_size
    count = tl.minimum(part_size, pixels - start)
    x += (image * pixels + start) * channels
    mean, square = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for done in range(0, count, ROWS):
        row = done + tl.arange(0, ROWS)
        seen = (row < count)[:, None] & inside[None, :]
        tile = tl.load(x + row[:, None] * channels + channel[None, :], mask=seen, other=0).to(tl.float32)
        more = tl.minimum(ROWS, count - done).to(tl.float32)
        here = tl.sum(tile, 0) / more
        away = tl.where(seen, tile - here[None, :], 0)
        share = more / (done + more)
        square += tl.sum(away * away, 0) + (here - mean) * (here - mean) * (done * share)
        mean += (here - mean) * share
    member = (lane[:, None] // WIDTH == group[None, :]) & inside[:, None]
    middle = tl.sum(tl.where(member, mean[:, None], 0), 0) / WIDTH
    away = tl.where(member, mean[:, None] - middle[None, :], 0)
    square_sum = tl.sum(tl.where(member, square[:, None], 0), 0) + count * tl.sum(away * away, 0)
    groups, number = channels // WIDTH, block * GROUPS + group
    at, known = (image * tl.num_programs(0) + part) * groups + number, (group < GROUPS) & (number < groups)
    tl.store(means + at, middle, mask=known)
    tl.store(squares + at, square_sum, mask=known)


@triton.jit
@no_type_check
def _normalise(
    x, means, squares, pixels, channels, part_size,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr,
    y, weight, bias, eps, SILU: tl.constexpr, MERGED: tl.constexpr
):  # fmt: skip
    """The same pixels and groups normalised, from the statistics of all parts, which each program merges anew."""
    part, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, group, other = tl.arange(0, LANES), tl.arange(0, PADDED), tl.arange(0, MERGED)
    groups, parts, number = channels // WIDTH, tl.num_programs(0), block * GROUPS + group
    at = (image * parts + other[:, None]) * groups + number[None, :]
    known = (other < parts)[:, None] & ((group < GROUPS) & (number < groups))[None, :]
    count = tl.where(known, tl.minimum(part_size, pixels - other * part_size)[:, None], 0).to(tl.float32)
    mean = tl.load(means + at, mask=known, other=0)
    middle = tl.sum(mean * (count / pixels), 0)
    away = tl.where(known, mean - middle[None, :], 0)
    square = tl.sum(tl.load(squares + at, mask=known, other=0) + count * WIDTH * away * away, 0)
    scale = 1 / tl.sqrt(square / (pixels * WIDTH) + eps)

    channel = block * GROUPS * WIDTH + lane
    inside = (lane < GROUPS * WIDTH) & (channel < channels)
    member = lane[:, None] // WIDTH == group[None, :]
    centre = tl.sum(tl.where(member, middle[None, :], 0), 1)
    factor = tl.sum(tl.where(member, scale[None, :], 0), 1)
    factor *= tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    start = part * part_size
    here = tl.minimum(part_size, pixels - start)
    base = (image * pixels + start) * channels
    for done in range(0, here, ROWS):
        row = done + tl.arange(0, ROWS)
        seen = (row < here)[:, None] & inside[None, :]
        place = base + row[:, None] * channels + channel[None, :]
        tile = tl.load(x + place, mask=seen, other=0).to(tl.float32)
        tile = (tile - centre[None, :]) * factor[None, :] + offset[None, :]
        if SILU:
            tile = tile / (1 + tl.exp(-tile))
        tl.store(y + place, tile.to(y.dtype.element_ty), mask=seen)


class Blocks(NamedTuple):
    """How a map is shared out: programs of `groups` whole groups, each `lanes` wide, and of one of so many parts."""

    groups: int
    lanes: int
    rows: int
    part_size: int
    parts: int
    warps: int


@cache
def blocks(pixels: int, channels: int, groups: int) -> Blocks:
    """By the shape of one picture alone: company in a batch must not change its numbers.

    A program's channels are a power of two, so groups are put together such that few lanes are idle, that rows begin
    where 16 bytes do, and that a row is about 128 wide.
    """
    width = channels // groups
    most = max(256, triton.next_power_of_2(width))

    def cost(n: int) -> tuple[bool, int, int]:
        lanes = triton.next_power_of_2(n * width)
        return n * width % 8 > 0, triton.cdiv(groups, n) * lanes, abs(lanes - 128)

    together = min((n for n in range(1, min(groups, 32) + 1) if n * width <= most), key=cost)
    lanes = triton.next_power_of_2(together * width)
    warps = 8 if pixels >= LARGE else 4
    rows = max(1024 * warps // lanes, 1)
    parts = max(PARTS, PROGRAMS // triton.cdiv(groups, together))
    part_size = triton.cdiv(triton.cdiv(pixels, parts), rows) * rows
    return Blocks(together, lanes, rows, part_size, triton.cdiv(pixels, part_size), warps)


def group_norm(x: Features, norm: nn.GroupNorm, *, silu: bool = False) -> Features:
    """norm(x), and SiLU of that, in two passes over x: channels-last, in x's dtype, worked out in fp32."""
    x = x.contiguous(memory_format=torch.channels_last)
    (b, channels, h, w), y = x.shape, torch.empty_like(x)
    cut = blocks(h * w, channels, norm.num_groups)
    means, squares = torch.empty((2, b, cut.parts, norm.num_groups), dtype=torch.float32, device=x.device)
    form: dict[str, Any] = {"WIDTH": channels // norm.num_groups, "GROUPS": cut.groups, "ROWS": cut.rows}
    form |= {"LANES": cut.lanes, "PADDED": triton.next_power_of_2(cut.groups), "num_warps": cut.warps}
    grid, given = (cut.parts, triton.cdiv(norm.num_groups, cut.groups), b), (x, means, squares, h * w, channels)
    with torch.cuda.device_of(x):
        _measure[grid](*given, cut.part_size, **form)
        form |= {"y": y, "weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        _normalise[grid](*given, cut.part_size, **form, SILU=silu, MERGED=triton.next_power_of_2(cut.parts))
    return y


def _serves(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0 and by_hand(x, weight, DEVICE, *FLOATS)


class FusedNorm(GroupNorm):
    """GroupNorm by these kernels, together with the SiLU behind it."""

    def forward(self, x: Features) -> Features:
        return group_norm(x, self) if x.ndim == 4 and _serves(x, self.weight) else super().forward(x)

    def activated(self, x: Features) -> Features:
        return group_norm(x, self, silu=True) if _serves(x, self.weight) else F.silu(super().forward(x))


def install(network: nn.Module) -> None:
    """Let a network's norms go by these kernels."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.__class__ = FusedNorm
