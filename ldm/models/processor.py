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
