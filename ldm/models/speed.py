"""What makes networks fast on the machine at hand. None of it changes what they compute beyond rounding."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary, ref

import einops._torch_specific
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.attention import Attention, FeedForward, TransformerBlock, use_attention
from ldm.models.layers import Features, Upsample
from ldm.models.processor import native_bf16, slow_blas

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
WORTH_PACKING = 2**14  # weights
WORTH_PHASES = 2**6  # pixels
COMPILED_FORMS = 64  # a network has its blocks at several widths and resolutions, each a form of its own


def keep_memory() -> bool:
    """Let this process keep the memory it frees; True where that could be set (glibc).

    A network's activations are freed and asked for again at every layer, and glibc by default hands large ones back:
    fresh pages cost more time than the layer's work on them. It acts on the whole process, so scripts call it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def _by_hand(x: Tensor, weight: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether oneDNN may be called by name: on a CPU, without gradients, outside the compiler."""
    if weight.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in dtypes or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _laid_out(module: nn.Module, weight: Tensor, lay_out: Callable[[Tensor], Any]) -> Any:
    """A weight in another layout, made once, and anew where an adapter has changed it or put another in its place."""
    state = (weight.data_ptr(), weight._version)
    kept = _LAID_OUT.get(module)
    if kept is None or kept[0]() is not weight or kept[1] != state:
        kept = _LAID_OUT[module] = (ref(weight), state, lay_out(weight.detach()))
    return kept[2]


# Beside the modules, so that a copy of one does not carry it along.
_LAID_OUT: WeakKeyDictionary[nn.Module, tuple[ref[Tensor], tuple[int, int], Any]] = WeakKeyDictionary()


class Packed(nn.Linear):
    """A linear layer in fp32 that on a CPU runs by oneDNN, on weights laid out once, at the price of their memory.

    MKL, which torch's builds use, keeps its AVX-512 kernels to Intel's processors; elsewhere this is twice as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear's, and by it where gradients are wanted."""
        if self.weight.is_inference() or not _by_hand(x, self.weight, torch.float32):
            return super().forward(x)
        weight = _laid_out(self, self.weight, lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, None))
        answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return answer


class Fused(FeedForward):
    """A feed-forward layer that in bf16 on a CPU adds the bias and takes the GELU inside oneDNN's product."""

    def forward(self, x: Tensor) -> Tensor:
        """As FeedForward's, and by it where gradients are wanted or an adapter has wrapped the layer."""
        expand = self.expand
        if type(expand) not in (nn.Linear, Packed) or not _by_hand(x, expand.weight, torch.bfloat16):
            return super().forward(x)
        product = torch.ops.mkldnn._linear_pointwise
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        gated: Tensor = product(x, gate, gate_bias, "gelu", [], "none")
        return self.reduce(gated.mul_(product(x, value, value_bias, "none", [], "")))


class Phased(Upsample):
    """Nearest neighbour and a 3 x 3 convolution as four 2 x 2 convolutions, one for each place in a doubled pixel.

    Neighbours that are copies of one pixel meet the sum of their weights: 4 products in place of 9.
    """

    def forward(self, x: Features) -> Features:
        """As Upsample's, and by it where gradients are wanted, an adapter has wrapped the layer, or x is small."""
        conv, (b, _, h, w) = self.conv, x.shape
        plain = type(conv) is not nn.Conv2d or conv.weight.is_inference() or h * w < WORTH_PHASES
        if plain or not _by_hand(x, conv.weight, torch.float32, torch.bfloat16):
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
    """Lay a network out for inference: convolutions channels-last, linear layers packed or fused where that pays.

    attention: see `use_attention`; compiled: compile its transformer blocks, at their first use, and on a GPU also
    take `kernels`, and replay a UNet as a graph. UserError for an attention that cannot be, or where there is nothing
    to compile with.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_attention(network, attention)
    packs, fuses = slow_blas(), native_bf16(torch.device("cpu"))
    for module in network.modules():
        if packs and type(module) is nn.Linear and module.weight.numel() >= WORTH_PACKING:
            module.__class__ = Packed
        if fuses and type(module) is FeedForward:
            module.__class__ = Fused
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
