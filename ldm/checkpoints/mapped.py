"""Memory that a mapped file takes: given back as soon as its bytes have been copied."""

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

DONTNEED = 4  # MADV_DONTNEED of Linux


def ranges(path: Path) -> list[tuple[int, int]]:
    """Where a file is mapped, read-only in effect, in this process; empty where that cannot be known."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        name = str(path.resolve())
    except OSError:
        return []
    found = [line.split(maxsplit=5) for line in lines]
    mapped = [fields[0].split("-") for fields in found if len(fields) == 6 and fields[5] == name]
    return [(int(start, 16), int(end, 16)) for start, end in mapped]


def forget(tensor: Tensor, places: list[tuple[int, int]]) -> None:
    """Let go of the pages under a tensor that lies wholly in a mapped file: they are read again if they are needed.

    Only for pages of the file that nobody has written to, which is why the places must be those of `ranges`.
    """
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    if not any(low <= start and end <= high for low, high in places):
        return
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, end // page * page
    libc = _libc()
    if libc is not None and last > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONTNEED)


@cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    except OSError:
        return None
