"""What the processor at hand is good at."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def native_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def slow_blas() -> bool:
    """Whether torch multiplies fp32 matrices by MKL on a processor that is not Intel's."""
    try:
        vendor = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return torch.backends.mkl.is_available() and "AuthenticAMD" in vendor


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of a type on this CPU: fp32 everywhere, halves by instructions of their own."""
    if dtype not in FLOATS or not torch.backends.mkldnn.is_available():
        return False
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype == torch.float32 or bool(getattr(torch.ops.mkldnn, asked[dtype])())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias by oneDNN, of x (..., d)."""
    answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return answer


def by_hand(x: Tensor, weight: Tensor, device: str, *dtypes: torch.dtype) -> bool:
    """Whether a kernel may be called by name: for that device and dtypes, without gradients, outside the compiler."""
    if weight.device.type != device or x.dtype != weight.dtype or x.dtype not in dtypes:
        return False
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not (wanted or torch.compiler.is_compiling())


def slow_fp16() -> bool:
    """Whether fp16 is better multiplied in fp32 on the CPU: where oneDNN does that alone, torch's own is slow."""
    return multiplies(torch.float32) and not multiplies(torch.float16)
