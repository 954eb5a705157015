"""safetensors files: tensors that are mapped rather than read, and let go once copied; and how they are written."""

import json
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.integrity import DTYPES, Entry, read_header
from ldm.errors import UserError
from ldm.files import replacing

# Advice of Linux about pages. The second (since 5.14) brings in many at once, fifty times as fast as one by one.
DONTNEED, POPULATE_READ = 4, 22
LONGEST = 400  # letters of an error


class SafeFile:
    """A safetensors file whose header has been checked. Its tensors lie in the mapped file; writing to one copies."""

    def __init__(self, path: Path) -> None:
        """UserError where it is missing or broken."""
        self.path = path
        header = read_header(path)
        self.metadata, self.entries = header.metadata, header.entries
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), header.size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot map {str(path)!r}: {error}") from None
        self._base = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    def tensor(self, name: str) -> Tensor:
        """One tensor, its pages at hand."""
        entry = self.entries[name]
        if not entry.size:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._advise(POPULATE_READ, entry.start // mmap.PAGESIZE, -(-entry.stop // mmap.PAGESIZE))
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.size, offset=entry.start)
        whole = entry.start % DTYPES[entry.dtype].itemsize == 0
        return (raw if whole else raw.clone()).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.tensor(name) for name in self.entries}

    def forget(self, name: str, kept: Tensor) -> None:
        """Let the pages of a tensor go, unless what is kept of it still lies there. They are read again if needed."""
        entry = self.entries[name]
        if not entry.start <= kept.data_ptr() - self._base < max(entry.stop, entry.start + 1):
            # of a page that it shares with a neighbour, the neighbour has the say
            self._advise(DONTNEED, -(-entry.start // mmap.PAGESIZE), entry.stop // mmap.PAGESIZE)

    def _advise(self, what: int, first: int, last: int) -> None:
        """Tell the system about some pages; it may know no such advice."""
        if hasattr(self._map, "madvise") and last > first:
            with suppress(OSError):
                self._map.madvise(what, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


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
        """See `SafeFile`."""
        file, inner = self._places[name]
        file.forget(inner, kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def entry(self, name: str) -> Entry:
        file, inner = self._places[name]
        return file.entries[inner]

    def stored(self) -> list[Entry]:
        """What the files hold, packed or not."""
        return [file.entries[inner] for file, inner in self._places.values()]

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
        found = DTYPES[held.most_common(1)[0][0]] if held else torch.float32
        return found if found.is_floating_point and found.itemsize > 1 else torch.float32


@contextmanager
def brief(path: Path | None = None, what: str = "") -> Iterator[None]:
    """Whatever a hostile file makes an error quote, it is a UserError of one line of bearable length.

    path: the file or folder that it is about, which it names where it does not yet, and `what` behind the name; faults
    of values are then UserErrors too.
    """
    try:
        yield
    except ValueError as error:
        if path is None and not isinstance(error, UserError):
            raise
        line = " ".join(str(error).split())
        if path is not None and repr(str(path))[:-1] not in line:
            line = f"{str(path)!r}{what}: {line}"
        raise UserError(line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}...") from None


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, whole or not at all; and always as the same bytes: the library's order of metadata is random."""
    with replacing(path) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, dict(metadata)
        )
        with temporary.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(metadata.items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= length:
                file.seek(8)
                file.write(text.ljust(length))
