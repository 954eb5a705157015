"""Samples inside tar files: where each lies, and what it holds.

A sample is a run of members that share a key, the name up to its first dot: `000000012.webp`, `.txt`, `.json`. Only the
extensions named here are ever read, so pickled members stay bytes in a file. An index keeps the place and the sha256 of
each sample in 44 bytes: with it a shard is never scanned, and a sample is read at once and checked as it is read.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError

IMAGES = ("webp", "png", "jpg", "jpeg")
MEMBERS = frozenset((*IMAGES, "txt", "json"))
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("sha256", "V32")])
Index = NDArray[Any]  # of RECORD: from a sample's first header to the end of its last member
_BLOCK = 512


class Damaged(UserError):
    """A shard or a sample that is not what it should be; the text names the shard, and the key where there is one."""


class Member(NamedTuple):
    """A file in a tar: where its header begins, and where its bytes lie."""

    name: str
    header: int
    offset: int
    size: int


def scan(path: Path) -> tuple[list[str], Index]:
    """The keys of the samples of a tar file, and where they lie. Damaged where it is cut short or no tar."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            members = _members(lambda at: os.pread(file.fileno(), _BLOCK, at), end, lambda: file, checked=True)
        except tarfile.TarError as error:
            raise Damaged(f"shard {str(path)!r} is not a whole tar file ({error}): copy it again") from None
        except EOFError:
            raise Damaged(f"shard {str(path)!r} is cut short at byte {end}: copy or prepare it again") from None
        except ValueError as error:
            raise Damaged(f"shard {str(path)!r} is not a tar file at byte {error}: copy or prepare it again") from None
    spans: list[list[int]] = []
    keys: list[str] = []
    for member in members:
        key, extension = split(member.name)
        if extension not in MEMBERS:
            continue
        if not keys or key != keys[-1]:
            spans.append([member.header, 0])
            keys.append(key)
        spans[-1][1] = member.offset + member.size - spans[-1][0]
    return keys, np.array([(offset, length, bytes(32)) for offset, length in spans], RECORD)


def read(file: int, record: np.void, *, check: bool) -> tuple[str, dict[str, bytes]] | None:
    """(key, {extension: bytes}) of a sample in an open file. None where it is cut short or, checked, was altered."""
    offset, length, digest = record.item()
    data = os.pread(file, length, offset)
    if len(data) != length or (check and hashlib.sha256(data).digest() != digest):
        return None
    end = bytes(-length % _BLOCK + 2 * _BLOCK)  # as a tar has
    try:
        members = _members(lambda at: data[at : at + _BLOCK], length, lambda: io.BytesIO(data + end), checked=False)
    except (ValueError, EOFError, tarfile.TarError):  # it was scanned, and has changed since
        return None
    key, found = "", {}
    for member in members:
        name, extension = split(member.name)
        if extension in MEMBERS:
            key, found[extension] = name, data[member.offset : member.offset + member.size]
    return key, found


def load_index(path: Path, sha256: str) -> Index | None:
    """The index in a file; None where it is not there, or is not the one of this digest."""
    data = path.read_bytes() if path.is_file() else b""
    return parse_index(data) if data and hashlib.sha256(data).hexdigest() == sha256 else None


def parse_index(data: bytes) -> Index:
    """The index that an .idx file holds."""
    return np.frombuffer(data, RECORD)


def split(name: str) -> tuple[str, str]:
    """(key, extension) of a member."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _members(block: Callable[[int], bytes], end: int, again: Callable[[], BinaryIO], *, checked: bool) -> list[Member]:
    """The files in a tar; tarfile itself takes 20 times as long. checked: the tar is to be whole."""
    try:
        return list(_walk(block, end, checked=checked))
    except _OtherTar:
        with tarfile.open(fileobj=again(), mode="r:") as tar:
            return [Member(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]


class _OtherTar(Exception):
    """A tar with long names or sparse files: rare, and tarfile knows them."""


def _walk(block: Callable[[int], bytes], end: int, *, checked: bool) -> Iterator[Member]:
    """The files up to `end`, or up to the block of zeros that a whole tar, `checked`, must have.

    EOFError where the tar is cut short, ValueError with the place of a broken header.
    """
    at = 0
    while checked or at < end:
        header = block(at)
        if len(header) < _BLOCK:
            raise EOFError
        if checked and header == bytes(_BLOCK):
            return
        try:
            size = int(header[124:136].split(b"\0")[0] or b"0", 8)
            sound = not checked or int(header[148:156].split(b"\0")[0], 8) == sum(header) - sum(header[148:156]) + 256
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(at)
        if header[156:157] not in (b"0", b"\0", b"5"):
            raise _OtherTar
        if at + _BLOCK + size > end:
            raise EOFError
        if header[156:157] != b"5":
            prefix: Any = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" else b""
            name = (prefix + b"/" if prefix else b"") + header[:100].split(b"\0")[0]
            yield Member(name.decode("utf-8", "replace"), at, at + _BLOCK, size)
        at += _BLOCK - (-size // _BLOCK) * _BLOCK
