"""Attention over pixels and text: the transformer inside the UNet (Rombach et al. 2022, Sec. 3.3)."""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import product as pairs

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import UserError, unknown
from ldm.models.layers import Features, norm
from ldm.models.processor import native_bf16, product, slow_blas, slow_fp16

Sequence = Float[Tensor, "b l d"]
Heads = Float[Tensor, "b n _ _"]
Mask = Bool[Tensor, "b 1 1 m"]
SHORT = 2**16  # scores a head
TILE = 512  # rows of scores that stay in the cache
FEWEST = 1e-30  # and 1e30: between them sums of powers of two are as exact as any


def attend(q: Heads, k: Heads, v: Heads, mask: Mask | None = None) -> Heads:
    """softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017, Eq. 1); mask: True where m may be seen.

    By torch's kernel but on a CPU: for short sequences its backward pass takes twelve times its forward, and for long
    ones it may leave the processor's widest units idle, where tiles are 1.5 to 4 times as fast.
    """
    if q.device.type != "cpu":
        return fused(q, k, v, mask)
    if q.dtype == torch.float16 and slow_fp16():
        return attend(q.float(), k.float(), v.float(), mask).half()
    if q.shape[2] * k.shape[2] > SHORT:
        forward = not (torch.is_grad_enabled() and q.requires_grad)
        tiles = q.shape[2] >= TILE and mask is None and _tiles_pay(q.dtype)
        return _tiled(q, k, v) if forward and tiles else fused(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


@cache
def _tiles_pay(dtype: torch.dtype) -> bool:
    return native_bf16(torch.device("cpu")) if dtype == torch.bfloat16 else dtype == torch.float32 and slow_blas()


def _tiled(q: Heads, k: Heads, v: Heads) -> Heads:
    """By oneDNN's products, which take what they multiply with row by row, as a linear layer its weights.

    A row of ones below the values sums what they are weighed with, and powers of two need no maximum taken from them
    first. Where they do not fit the numbers' range after all, the tile is done again by a softmax.
    """
    out, q = torch.empty_like(q), (q * (q.shape[-1] ** -0.5 * math.log2(math.e))).contiguous()
    k, v = k.contiguous(), F.pad(v, (0, 1), value=1.0).transpose(-1, -2).contiguous()
    for index in pairs(range(q.shape[0]), range(q.shape[1])):
        keys, values = k[index], v[index]
        for rows, answer in zip(q[index].split(TILE), out[index].split(TILE), strict=True):
            sums = product(product(rows, keys).exp2_(), values)
            weight = sums[:, -1:]
            if float(weight.min()) > FEWEST and float(weight.max()) < 1 / FEWEST:
                torch.div(sums[:, :-1], weight, out=answer)
            else:
                scores = product(rows, keys) * math.log(2)
                answer.copy_(product(scores.softmax(-1), values[:-1]))
    return out


def fused(q: Heads, k: Heads, v: Heads, mask: Mask | None = None) -> Heads:
    return F.scaled_dot_product_attention(q, k, v, mask)


def xformers(q: Heads, k: Heads, v: Heads, mask: Mask | None = None) -> Heads:
    """xformers' kernel, for GPUs; a mask, which its kernels take only as a matrix of scores, goes to torch's."""
    if mask is not None:
        return fused(q, k, v, mask)
    kernel = import_module("xformers.ops").memory_efficient_attention
    answer: Tensor = kernel(*(y.transpose(1, 2) for y in (q, k, v)))
    return answer.transpose(1, 2)


def sliced(q: Heads, k: Heads, v: Heads, mask: Mask | None = None) -> Heads:
    """torch's kernel for TILE queries at a time: where it must hold scores, it holds no more than theirs."""
    return torch.cat([fused(rows, k, v, mask) for rows in q.split(TILE, dim=2)], dim=2)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {"auto": attend, "sdpa": fused, "sliced": sliced, "xformers": xformers}


def use_attention(network: nn.Module, name: str) -> None:
    """Let every Attention of a network compute in one of these ways. UserError for one that is not, or not here."""
    if name not in ATTENTIONS:
        raise unknown("attention", name, ATTENTIONS)
    if name == "xformers":
        try:
            import_module("xformers.ops")
        except ImportError:
            raise UserError("attention xformers: xformers is not installed here, choose auto or sdpa") from None
        if any(parameter.device.type != "cuda" for parameter in network.parameters()):
            raise UserError("attention xformers: its kernels need a GPU, choose auto or sdpa")
    for module in network.modules():
        if isinstance(module, Attention):
            module.attend = ATTENTIONS[name]


class Attention(nn.Module):
    """Multi-head attention from x to a context, or to itself (Vaswani et al. 2017, Sec. 3.2)."""

    def __init__(self, width: int, heads: int, *, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.attend = ATTENTIONS["auto"]
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim or width, width, bias=bias)
        self.to_v = nn.Linear(context_dim or width, width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, x: Sequence, context: Float[Tensor, "b m e"] | None = None, mask: Bool[Tensor, "b m"] | None = None
    ) -> Sequence:
        """x: (b, l, width); context: (b, m, context_dim), x itself where None; mask: True where m may be seen."""
        context = x if context is None else context
        rows = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=self.heads) for y in rows)
        visible = None if mask is None else rearrange(mask, "b m -> b 1 1 m")
        return self.to_out(rearrange(self.attend(q, k, v, visible), "b n l d -> b l (n d)"))


class FeedForward(nn.Module):
    """GEGLU, four times as wide (Shazeer 2020, arXiv:2002.05202; the erf form of GELU)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 8 * width)
        self.reduce = nn.Linear(4 * width, width)

    def forward(self, x: Sequence) -> Sequence:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.reduce(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each behind its LayerNorm and with a residual."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, context_dim=context_dim)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Sequence, cond: Conditioning) -> Sequence:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond.tokens, cond.mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, residual as a whole.

    `linear` chooses how pixels are projected in and out: linear layers (SD 2, SDXL) or 1 x 1 convolutions (SD 1).
    They compute the same; the files differ.
    """

    def __init__(self, width: int, heads: int, *, depth: int, context_dim: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.norm = norm(width, groups, eps=1e-6)
        self.linear = linear
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Features, cond: Conditioning) -> Features:
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, cond)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))
