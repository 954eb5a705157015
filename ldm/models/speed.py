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
from ldm.models.attention import TransformerBlock, use_attention

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
        other = weight.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32
        other = other or torch.compiler.is_compiling()  # which would take its weights for inputs
        if other or weight.is_inference() or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return super().forward(x)
        state = (weight.data_ptr(), weight._version)  # an adapter may have changed it, or put another in its place
        packed = _PACKED.get(self)
        if packed is None or packed[0]() is not weight or packed[1] != state:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            packed = _PACKED[self] = (ref(weight), state, laid_out)
        answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed[2], self.bias, "none", [], "")
        return answer


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
    """Lay a network out for inference: its convolutions channels-last, its linear layers packed where that pays.

    attention: see `use_attention`; compiled: compile its transformer blocks, at their first use. UserError for an
    attention that cannot be, or where there is nothing to compile with.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_attention(network, attention)
    if slow_blas():
        for module in network.modules():
            if type(module) is nn.Linear and module.weight.numel() >= WORTH_PACKING:
                module.__class__ = Packed
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
