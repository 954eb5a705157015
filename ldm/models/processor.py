"""What the processor at hand is good at."""

from functools import cache
from pathlib import Path

import torch


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
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype == torch.float32 or bool(getattr(torch.ops.mkldnn, asked[dtype])())


def slow_fp16() -> bool:
    """Whether fp16 is better multiplied in fp32 on the CPU: where oneDNN does that alone, torch's own is slow."""
    return multiplies(torch.float32) and not multiplies(torch.float16)
