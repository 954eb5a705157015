"""The header of a safetensors file, read and checked by ourselves: its library lets through what this refuses.

Refused: duplicate names, holes and overlaps, trailing bytes, sizes that do not follow from shape and type, and names or
shapes that no honest file has. The format: 8 bytes of length, a JSON header, the tensors back to back.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
MAX_HEADER, MAX_NAME, MAX_RANK, MAX_SIDE = 2**24, 512, 8, 2**31


@dataclass(frozen=True)
class Entry:
    """One tensor as its file announces it."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning
    size: int  # bytes

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Header:
    """What a whole file announces."""

    size: int  # bytes
    metadata: dict[str, str]
    entries: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Read and check a header. UserError, one line, with what is wrong and where."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not size:
                raise ValueError("it is empty")
            if size < 8 or not 2 <= length <= MAX_HEADER:
                raise ValueError("it does not begin as one, so it is something else, or damaged")
            if length > size - 8:
                raise ValueError(
                    f"it is cut short, {size} bytes do not even hold its header of {length}: copy it again"
                )
            return _check(_parse(file.read(length)), 8 + length, size)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file: {error or 'nested too deep'}") from None


def _parse(raw: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{_short(twice)} stands in its header twice")
        return found

    if not raw.startswith(b"{"):
        raise ValueError("its header is not JSON")
    return json.loads(raw.decode(), object_pairs_hook=once, parse_constant=lambda name: name)


def _check(data: Any, first: int, size: int) -> Header:
    """first: where the tensors begin."""
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    entries = {name: _entry(name, about, first) for name, about in data.items()}
    at = first
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            wrong = "overlap" if entry.start < at else "leave a hole"
            raise ValueError(f"its tensors {wrong} at byte {min(at, entry.start) - first}")
        at = entry.stop
    if at != size:
        raise ValueError(
            f"its tensors end at byte {at}, the file at {size}: it was cut short or something was appended"
        )
    return Header(size, metadata, entries)


def _entry(name: str, about: Any, first: int) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable() or ".." in name or name.startswith(("/", "\\")):
        raise ValueError(f"{_short(name)} is no name of a tensor")
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, span = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{_short(name)} is of the unknown type {_short(dtype)}")
    if not _whole(shape) or len(shape) > MAX_RANK or any(side > MAX_SIDE for side in shape):
        raise ValueError(f"{_short(name)} has the impossible shape {_short(shape)}")
    if not _whole(span) or len(span) != 2 or span[0] > span[1]:
        raise ValueError(f"{_short(name)} stands at the impossible place {_short(span)}")
    size = span[1] - span[0]
    if size != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{_short(name)} of shape {_short(shape)} and type {dtype} cannot take {size} bytes")
    return Entry(dtype, tuple(shape), first + span[0], size)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
