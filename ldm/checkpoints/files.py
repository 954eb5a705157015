"""Writing so that a file is whole or absent, and reading safetensors so that a broken one is one clear line."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import UserError


def atomic_write(path: Path, write: Callable[[Path], None], *, replace: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then give it its name in one step.

    replace=False: FileExistsError where the name is taken (the other file stays as it is).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # temporary files are private; what the user asked for is not
        _flush(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SafeFile:
    """An open safetensors file: names, metadata, and tensors one at a time, mapped rather than read."""

    def __init__(self, path: Path, handle: safe_open) -> None:
        self.path = path
        self._handle = handle
        self.metadata: dict[str, str] = handle.metadata() or {}
        self.names: set[str] = set(handle.keys())

    def tensor(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._handle.get_slice(name).get_shape())


@contextmanager
def open_safetensors(path: Path) -> Iterator[SafeFile]:
    """Open a safetensors file on the CPU. UserError where it is missing, cut short or something else."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield SafeFile(path, handle)
    except (SafetensorError, RuntimeError, MemoryError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
