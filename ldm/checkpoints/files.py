"""Reading safetensors so that a broken file is one clear line."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoints.integrity import Entry, Header, read_header
from ldm.checkpoints.mapped import forget, ranges
from ldm.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafeFile:
    """An open safetensors file: names, metadata, and tensors one at a time, mapped rather than read."""

    def __init__(self, path: Path, handle: safe_open, header: Header) -> None:
        self.path = path
        self._handle = handle
        self.metadata = header.metadata
        self.entries = header.entries

    def tensor(self, name: str) -> Tensor:
        """UserError where the file has changed under our hands."""
        try:
            return self._handle.get_tensor(name)
        except (SafetensorError, RuntimeError, MemoryError, OSError) as error:
            raise UserError(f"cannot read {name} from {str(self.path)!r}: {error}") from None

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        return ranges(self.path)

    def forget(self, name: str, kept: Tensor) -> None:
        """Let the memory of a tensor go, unless what is kept of it still lies there."""
        mapped = self.tensor(name)
        if not 0 <= kept.data_ptr() - mapped.data_ptr() < max(mapped.nbytes, 1):
            forget(mapped, self._places)


class Tensors(Mapping[str, Tensor]):
    """The tensors of one file or several as one mapping that reads what is asked for."""

    def __init__(self, files: Iterable[tuple[SafeFile, str]]) -> None:
        """files: each with the prefix that its names get. UserError where two files hold the same name."""
        self._places: dict[str, tuple[SafeFile, str]] = {}
        for file, prefix in files:
            for name in file.entries:
                if prefix + name in self._places:
                    other = self._places[prefix + name][0]
                    raise UserError(f"{name} stands in {str(other.path)!r} and in {str(file.path)!r}")
                self._places[prefix + name] = (file, name)

    def __getitem__(self, name: str) -> Tensor:
        file, inner = self._places[name]
        return file.tensor(inner)

    def forget(self, name: str, kept: Tensor) -> None:
        """Let the memory of what has been copied go: see `SafeFile`."""
        file, inner = self._places[name]
        file.forget(inner, kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def entry(self, name: str) -> Entry:
        file, inner = self._places[name]
        return file.entries[inner]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.entry(name).shape for name in self}

    def without(self, names: Iterable[str]) -> "Tensors":
        """The same tensors but for some."""
        rest = type(self)([])
        left_out = set(names)
        rest._places = {name: place for name, place in self._places.items() if name not in left_out}
        return rest

    def main_dtype(self) -> torch.dtype:
        """The type that most of the bytes are in; fp32 for one that no network runs in."""
        held: Counter[str] = Counter()
        for name in self:
            entry = self.entry(name)
            held[entry.dtype] += entry.size
        return DTYPES.get(held.most_common(1)[0][0] if held else "", torch.float32)


@contextmanager
def brief(longest: int = 400) -> Iterator[None]:
    """Whatever a hostile file makes a UserError quote, it stays one line of bearable length."""
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        raise UserError(line if len(line) <= longest else f"{line[: longest - 3]}...") from None


@contextmanager
def open_safetensors(path: Path) -> Iterator[SafeFile]:
    """Open a safetensors file on the CPU, its header checked. UserError where it is missing or broken."""
    header = read_header(path)
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, RuntimeError, MemoryError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    with handle:
        yield SafeFile(path, handle, header)


@contextmanager
def open_tensors(paths: Iterable[tuple[Path, str]]) -> Iterator[Tensors]:
    """Open several files, each with a prefix for its names, as one mapping."""
    with ExitStack() as stack:
        yield Tensors([(stack.enter_context(open_safetensors(path)), prefix) for path, prefix in paths])
