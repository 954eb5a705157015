"""What makes networks fast on the machine at hand. None of it changes what they compute beyond rounding."""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from weakref import WeakKeyDictionary, ref

import einops._torch_specific
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.attention import FeedForward, TransformerBlock, use_attention

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
WORTH_PACKING = 2**14  # weights
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


def native_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Packed(nn.Linear):
    """A linear layer in fp32 that on a CPU runs by oneDNN, on weights laid out once, at the price of their memory.

    MKL, which torch's builds use, keeps its AVX-512 kernels to Intel's processors; elsewhere this is twice as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear's, and by it where gradients are wanted."""
        weight = self.weight
        if weight.is_inference() or not _by_hand(x, weight, torch.float32):
            return super().forward(x)
        state = (weight.data_ptr(), weight._version)  # an adapter may have changed it, or put another in its place
        packed = _PACKED.get(self)
        if packed is None or packed[0]() is not weight or packed[1] != state:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            packed = _PACKED[self] = (ref(weight), state, laid_out)
        answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed[2], self.bias, "none", [], "")
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


def _by_hand(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN may be called by name: on a CPU, without gradients, outside the compiler."""
    if weight.device.type != "cpu" or not x.dtype == weight.dtype == dtype or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


# Beside the modules, so that a copy of one does not carry it along.
_PACKED: WeakKeyDictionary[nn.Module, tuple[ref[Tensor], tuple[int, int], Tensor]] = WeakKeyDictionary()


def slow_blas() -> bool:
    """Whether torch multiplies fp32 matrices by MKL on a processor that is not Intel's."""
    try:
        vendor = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return torch.backends.mkl.is_available() and "AuthenticAMD" in vendor


def prepare(network: nn.Module, attention: str = "auto", compiled: bool = False) -> None:
    """Lay a network out for inference: convolutions channels-last, linear layers packed or fused where that pays.

    attention: see `use_attention`; compiled: compile its transformer blocks, at their first use. UserError for an
    attention that cannot be, or where there is nothing to compile with.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_attention(network, attention)
    packs, fuses = slow_blas(), native_bf16(torch.device("cpu"))
    for module in network.modules():
        if packs and type(module) is nn.Linear and module.weight.numel() >= WORTH_PACKING:
            module.__class__ = Packed
        if fuses and type(module) is FeedForward:
            module.__class__ = Fused
    if compiled:
        _compile(network)


def _compile(network: nn.Module) -> None:
    """Block by block: as fast as the whole and compiled in a fraction of its time, for blocks are alike."""
    if not torch._dynamo.is_dynamo_supported():  # type: ignore[attr-defined]
        raise UserError("--compile: this Python or torch cannot compile, leave it out")
    on_cpu = any(parameter.device.type == "cpu" for parameter in network.parameters())
    if on_cpu and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise UserError("--compile: there is no C++ compiler here (g++), leave it out")
    einops._torch_specific.allow_ops_in_compiled_graph()  # see ldm.models
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
    for module in network.modules():
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=False)
