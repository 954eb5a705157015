"""What makes networks fast on the machine at hand. None of it changes what they compute beyond rounding."""

import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary, ref

import einops._torch_specific
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.attention import Attention, FeedForward, TransformerBlock, use_attention
from ldm.models.layers import Features, GroupNorm, Upsample
from ldm.models.processor import FLOATS, by_hand, multiplies, native_bf16, product, slow_blas, slow_fp16

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
WORTH_A_CALL = 2**14  # weights
TILE, LANES = 2**20, 16  # weights in fp32 that stay in the cache, and that a register holds
FEW = 2**11  # pixels x those of the kernel, for each of a batch: its company changes no picture
PLAIN = (1, (1, 1), "zeros")  # groups, dilation and padding of a convolution
WORTH_PHASES = 2**6  # pixels
SMALL = 2**10  # pixels of a map under which torch norms bf16 number by number
COMPILED_FORMS = 64  # a network has its blocks at several widths and resolutions, each a form of its own


def keep_memory() -> bool:
    """Let this process, as a whole, keep the memory it frees; True where that could be set (glibc).

    A network's activations are freed and asked for again at every layer, and glibc by default hands large ones back:
    fresh pages cost more time than the layer's work on them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def _laid_out(module: nn.Module, weight: Tensor, lay_out: Callable[[Tensor], Any]) -> Any:
    """A weight in another layout, made once, and anew where an adapter has changed it or put another in its place."""
    state = (weight.data_ptr(), weight._version)
    kept = _LAID_OUT.get(module)
    if kept is None or kept[0]() is not weight or kept[1] != state:
        kept = _LAID_OUT[module] = (ref(weight), state, lay_out(weight.detach()))
    return kept[2]


# Beside the modules, so that a copy of one does not carry it along.
_LAID_OUT: WeakKeyDictionary[nn.Module, tuple[ref[Tensor], tuple[int, int], Any]] = WeakKeyDictionary()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product`, in fp16 by way of fp32 where that is faster."""
    if weight.dtype != torch.float16 or not slow_fp16():
        return product(x, weight, bias)
    out, x, bias = x.new_empty((*x.shape[:-1], len(weight))), x.float(), None if bias is None else bias.float()
    for rows, tile in _tiles(weight):
        out[..., rows] = product(x, tile, None if bias is None else bias[rows])
    return out


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A weight in fp32, some rows at a time, so that it is not kept twice: always in the same room, still in cache."""
    size = weight[0].numel()
    count = max(1, TILE // size // LANES * LANES)
    if not hasattr(_ROOM, "wide") or len(_ROOM.wide) < count * size:
        with torch.inference_mode(False):
            _ROOM.wide = torch.empty(max(TILE, count * size))
    for first in range(0, len(weight), count):
        rows = weight[first : first + count]
        yield slice(first, first + len(rows)), _ROOM.wide[: rows.numel()].view(rows.shape).copy_(rows)


_ROOM = threading.local()


class Direct(nn.Linear):
    """A linear layer that on a CPU without gradients runs by oneDNN in fp32, and in fp16 too where only that is fast.

    MKL, by which torch does it, keeps its AVX-512 kernels to Intel's processors; elsewhere this is twice as fast. Fp16
    without instructions of its own is six times as fast, and rounded once.
    """

    def forward(self, x: Tensor) -> Tensor:
        slow = slow_fp16 if x.dtype == torch.float16 else slow_blas
        if not by_hand(x, self.weight, "cpu", torch.float32, torch.float16) or not slow():
            return super().forward(x)
        return _product(x, self.weight, self.bias)


class Unrolled(nn.Conv2d):
    """A convolution that on a CPU is one product with its channels-last weights where pixels are few, or 1 x 1.

    oneDNN's own takes 1.1 to 10 times as long there: it brings the weights into another order at every call.
    """

    def forward(self, x: Features) -> Features:
        if not by_hand(x, self.weight, "cpu", *FLOATS):
            return super().forward(x)
        (height, width), (down, across) = self.kernel_size, self.stride
        wide, weight = x.dtype == torch.float16 and slow_fp16(), self.weight.permute(0, 2, 3, 1)
        assert isinstance(self.padding, tuple)
        if x.shape[2] * x.shape[3] * height * width <= FEW and (wide or multiplies(x.dtype)):
            x = F.pad(x, (self.padding[1],) * 2 + (self.padding[0],) * 2).permute(0, 2, 3, 1)
            x = x.unfold(1, height, down).unfold(2, width, across).permute(0, 1, 2, 4, 5, 3).flatten(3)
            return _product(x, weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if not wide:
            return super().forward(x)
        x, bias = x.float(), torch.zeros(len(weight)) if self.bias is None else self.bias.float()
        tiles = ((rows, tile.permute(0, 3, 1, 2)) for rows, tile in _tiles(weight))
        return torch.cat([F.conv2d(x, t, bias[rows], self.stride, self.padding).half() for rows, t in tiles], 1)


class Joined(nn.MultiheadAttention):
    """The self-attention of a text tower, which in fp16 on a CPU takes the products of `Direct`."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        weight, same = self.in_proj_weight, query is key is value and given == {"need_weights": False}
        if not (same and slow_fp16() and self.batch_first and by_hand(query, weight, "cpu", torch.float16)):
            return super().forward(query, key, value, attn_mask=attn_mask, **given)
        joined = _product(query, weight, self.in_proj_bias).float().unflatten(2, (3, self.num_heads, -1))
        mask = None if attn_mask is None else attn_mask.float()
        q, k, v = joined.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2).half()
        return _product(out, self.out_proj.weight, self.out_proj.bias), None


class Fused(FeedForward):
    """A feed-forward layer that in bf16 on a CPU adds the bias and takes the GELU inside oneDNN's product."""

    def forward(self, x: Tensor) -> Tensor:
        expand = self.expand
        if type(expand) not in (nn.Linear, Direct) or not by_hand(x, expand.weight, "cpu", torch.bfloat16):
            return super().forward(x)
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        gated: Tensor = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
        return self.reduce(gated.mul_(product(x, value, value_bias)))


class Widened(GroupNorm):
    """A GroupNorm of small maps in bf16 by way of fp32 on a CPU, where torch's kernel for them takes 1.5 to 6 times as
    long."""

    def forward(self, x: Features) -> Features:
        if x.shape[2] * x.shape[3] >= SMALL or not by_hand(x, self.weight, "cpu", torch.bfloat16):
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Phased(Upsample):
    """Nearest neighbour and a 3 x 3 convolution as four 2 x 2 convolutions, one for each place in a doubled pixel.

    Neighbours that are copies of one pixel meet the sum of their weights: 4 products in place of 9.
    """

    def forward(self, x: Features) -> Features:
        conv, (b, _, h, w) = self.conv, x.shape
        # An adapter may have wrapped the layer.
        plain = type(conv) not in (nn.Conv2d, Unrolled) or conv.weight.is_inference() or h * w < WORTH_PHASES
        if plain or not by_hand(x, conv.weight, "cpu", torch.float32, torch.bfloat16):
            return super().forward(x)
        out = torch.empty((b, conv.out_channels, 2 * h, 2 * w), dtype=x.dtype, memory_format=torch.channels_last)
        for index, kernel in enumerate(_laid_out(self, conv.weight, _phases)):
            i, j = divmod(index, 2)
            out[:, :, i::2, j::2] = F.conv2d(x, kernel, conv.bias, padding=1)[:, :, i : i + h, j : j + w]
        return out


def _phases(weight: Tensor) -> list[Tensor]:
    """The four 2 x 2 kernels of a 3 x 3 one, for the upper and lower row by the left and right column."""
    first, second, third = weight.float().unbind(2)
    rows = [torch.stack(pair, 2) for pair in ((first, second + third), (first + second, third))]
    kernels = []
    for row in rows:
        first, second, third = row.unbind(3)
        kernels += [torch.stack(pair, 3) for pair in ((first, second + third), (first + second, third))]
    return [kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last) for kernel in kernels]


def prepare(network: nn.Module, attention: str = "auto", compiled: bool = False) -> None:
    """Lay a network out for inference: convolutions channels-last, products by oneDNN or fused where that pays.

    attention: see `use_attention`; compiled: compile its transformer blocks, at their first use, and on a GPU also
    take `kernels`, and replay a UNet as a graph. UserError where one of these cannot be.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_attention(network, attention)
    direct, fuses = slow_blas() or slow_fp16(), native_bf16(torch.device("cpu"))
    for module in network.modules():
        if direct and type(module) is nn.Linear and module.weight.numel() >= WORTH_A_CALL:
            module.__class__ = Direct
        if type(module) is nn.Conv2d and (module.groups, module.dilation, module.padding_mode) == PLAIN:
            module.__class__ = nn.Conv2d if isinstance(module.padding, str) else Unrolled
        if type(module) is nn.MultiheadAttention and module.in_proj_weight is not None:
            module.__class__ = Joined
        if fuses and type(module) is FeedForward:
            module.__class__ = Fused
        if fuses and type(module) is GroupNorm:
            module.__class__ = Widened
        if type(module) is Upsample:
            module.__class__ = Phased
    if compiled:
        _compile(network)


def _compile(network: nn.Module) -> None:
    """Block by block: as fast as the whole and compiled in a fraction of its time, for blocks are alike."""
    if not torch._dynamo.is_dynamo_supported():  # type: ignore[attr-defined]
        raise UserError("--compile: this Python or torch cannot compile, leave it out")
    on_cpu = any(parameter.device.type == "cpu" for parameter in network.parameters())
    if on_cpu and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise UserError("--compile: there is no C++ compiler here (g++), leave it out")
    if not on_cpu:
        if find_spec("triton") is None:
            raise UserError("--compile: on a GPU it needs Triton: pip install triton==3.7.1, or leave it out")
        from ldm.models import graphs, kernels

        kernels.install(network)
        graphs.install(network)
    einops._torch_specific.allow_ops_in_compiled_graph()  # see ldm.models
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
    for module in network.modules():
        if on_cpu and isinstance(module, Attention):
            module.attend = torch.compiler.disable(module.attend)  # its tiles are oneDNN's own
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=False)
