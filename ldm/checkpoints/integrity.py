"""The header of a safetensors file, read and checked by ourselves: its library lets through what this refuses.

Refused: duplicate names, holes and overlaps between tensors, trailing bytes, sizes that do not follow from shape and
type, and names or shapes that no honest file has. The format: 8 bytes of length, a JSON header, the tensors back to
back.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
BITS = FLOATS | {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
MAX_HEADER, MAX_NAME, MAX_RANK, MAX_SIDE = 2**24, 512, 8, 2**31


@dataclass(frozen=True)
class Entry:
    """One tensor as its file announces it."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """What a whole file announces."""

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
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    try:
        return _check(_parse(raw), size - 8 - length)
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


def _check(data: Any, room: int) -> Header:
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    for name, about in data.items():
        entries[name], span = _entry(name, about)
        spans.append(span)
    at = 0
    for start, stop in sorted(spans):
        if start != at:
            raise ValueError(f"its tensors {'overlap' if start < at else 'leave a hole'} at byte {min(at, start)}")
        at = stop
    if at != room:
        raise ValueError(
            f"its tensors take {at} bytes, the file holds {room}: it was cut short or something was appended"
        )
    return Header(metadata, entries)


def _entry(name: str, about: Any) -> tuple[Entry, tuple[int, int]]:
    if not name or len(name) > MAX_NAME or not name.isprintable() or ".." in name or name.startswith(("/", "\\")):
        raise ValueError(f"{_short(name)} is no name of a tensor")
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, span = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{_short(name)} is of the unknown type {_short(dtype)}")
    if not _whole(shape) or len(shape) > MAX_RANK or any(side > MAX_SIDE for side in shape):
        raise ValueError(f"{_short(name)} has the impossible shape {_short(shape)}")
    if not _whole(span) or len(span) != 2 or span[0] > span[1]:
        raise ValueError(f"{_short(name)} stands at the impossible place {_short(span)}")
    size = span[1] - span[0]
    if size * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{_short(name)} of shape {_short(shape)} and type {dtype} cannot take {size} bytes")
    return Entry(dtype, tuple(shape), size), (span[0], span[1])


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
