"""What pictures come from: parquet files, folders of images, shards. Each gives ids, and bytes with columns by row.

`captions` is the column of a picture's captions, best first; the other columns are kept as they are.
"""

import bisect
import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ldm.data.shards import Shards
from ldm.errors import UserError

CAPTIONS = ("captions", "caption", "text", "txt", "prompt", "name")  # columns that hold captions, best first
IMAGES = ("image", "webp", "jpg", "png", "img", "bytes")  # columns that hold the bytes of a picture
_IDS = ("id", "key", "__key__")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Raw(NamedTuple):
    """A picture as it was found. `columns["captions"]` is a list of strings."""

    image: bytes
    columns: dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Pictures by row number."""

    @property
    def name(self) -> str: ...

    def ids(self) -> list[str]:
        """What tells each row apart, whatever the order of files on a disk."""
        ...

    def stamp(self) -> str:
        """Changes when the source does."""
        ...

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        """The rows asked for, in order; an error in the place of one that cannot be had."""
        ...


def open_sources(paths: Sequence[str]) -> list[Source]:
    """One source for each path. UserError for a path that is none, and for two sources of one name."""
    sources = [_open(path) for path in paths]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two sources are called {twice[0]!r}: rename one, since captions and limits go by that name")
    return sources


def _open(path: str) -> Source:
    place = Path(path)
    if path.endswith(".tar") or (place.is_dir() and any(place.glob("*.tar"))):
        return ShardSource(path)
    if place.is_dir():
        return FolderSource(place)
    if not place.is_file():
        raise UserError(f"source {path!r} is not there: give a folder, a .parquet file or shards")
    if place.suffix != ".parquet":
        raise UserError(f"source {path!r} is neither a folder, a .parquet file nor shards (.tar)")
    return ParquetSource(place)


@dataclass(frozen=True)
class ParquetSource:
    """A parquet file with an image column (bytes, or a struct with bytes) and columns of captions (text, or lists)."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    def ids(self) -> list[str]:
        file = self._file()
        column = next((name for name in _IDS if name in file.schema_arrow.names), None)
        if column is None:
            return [f"{row:09d}" for row in range(file.metadata.num_rows)]
        return [str(value) for value in self._sound(lambda: file.read([column]))[column].to_pylist()]

    def stamp(self) -> str:
        stat = self.path.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        file = self._file()
        image = self._image_column(file)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts, group = [0, *itertools.accumulate(sizes)], -1
        table: Any = None
        for row in rows:
            here = bisect.bisect_right(starts, row) - 1
            if here != group:  # rising rows read each group once
                group, table = here, self._sound(functools.partial(file.read_row_group, here))
            columns = table.slice(row - starts[group], 1).to_pylist()[0]
            value = columns.pop(image)
            data = value.get("bytes") if isinstance(value, dict) else value
            yield Raw(data, _with_captions(columns)) if data else UserError("no image bytes")

    def _image_column(self, file: Any) -> str:
        import pyarrow as pa

        def holds_bytes(kind: Any) -> bool:
            if pa.types.is_struct(kind):
                return any(field.name == "bytes" for field in kind)
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

        able = [field.name for field in file.schema_arrow if holds_bytes(field.type)]
        if not able:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{str(self.path)!r} has no column of image bytes, only {names}")
        return next((name for name in IMAGES if name in able), able[0])

    def _file(self) -> Any:
        import pyarrow.parquet as pq

        return self._sound(lambda: pq.ParquetFile(self.path))

    def _sound(self, read: Callable[[], Any]) -> Any:
        """What `read` returns; UserError where the file is no parquet file or a damaged one."""
        import pyarrow as pa

        try:
            return read()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{str(self.path)!r} is not a whole parquet file: {error}") from None


class FolderSource:
    """A folder of images: captions from `metadata.jsonl` or `.csv` (column file_name) and from a `.txt` beside.

    A `.txt` holds one caption on each line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self._rows = self._listed() or [
            {"file_name": file.relative_to(path).as_posix()}
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in _SUFFIXES
        ]
        if not self._rows:
            raise UserError(f"folder {str(path)!r} holds no images ({', '.join(_SUFFIXES)}) and no metadata file")

    def ids(self) -> list[str]:
        return [row["file_name"] for row in self._rows]

    def stamp(self) -> str:
        return json.dumps(self._rows, sort_keys=True)

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        for row in rows:
            columns = _with_captions({k: v for k, v in self._rows[row].items() if k != "file_name"})
            file = self.path / self._rows[row]["file_name"]
            try:
                if not file.resolve().is_relative_to(self.path.resolve()):
                    raise UserError("file_name leads out of the folder")
                beside = file.with_suffix(".txt")
                if beside.is_file():
                    lines = [line.strip() for line in beside.read_text("utf-8").splitlines()]
                    columns["captions"] = [*filter(None, lines), *columns["captions"]]
                yield Raw(file.read_bytes(), columns)
            except UserError as error:
                yield error
            except OSError as error:
                yield UserError(f"cannot read: {error.strerror}")
            except UnicodeDecodeError:
                yield UserError("the .txt is not UTF-8")

    def _listed(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        path = next((p for p in (self.path / "metadata.jsonl", self.path / "metadata.csv") if p.is_file()), None)
        if path is None:
            return rows
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix == ".csv":
                    rows = list(csv.DictReader(file))
                else:
                    rows = [json.loads(line) for line in file if line.strip()]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{str(path)!r} cannot be read: {error}") from None
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
                raise UserError(f"{str(path)!r} has no file_name in entry {number}")
        return rows


class ShardSource:
    """Shards that exist already, by brace range or folder."""

    def __init__(self, pattern: str) -> None:
        self._shards = Shards(pattern)
        first = self._shards.paths[0]
        self.name = first.stem if len(self._shards.paths) == 1 else first.resolve().parent.name
        self._places = [(s, i) for s, count in enumerate(self._shards.counts) for i in range(count)]

    def ids(self) -> list[str]:
        return [f"{self._shards.entries[s].name}/{self._shards.samples(s)[i].key}" for s, i in self._places]

    def stamp(self) -> str:
        return json.dumps([[entry.name, entry.bytes, entry.sha256] for entry in self._shards.entries])

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        for row in rows:
            shard, index = self._places[row]
            try:
                columns = _with_captions(self._shards.describe(shard, index))
                yield Raw(self._shards.image(shard, index), columns)
            except UserError as error:
                yield UserError(f"damaged sample: {error}")


def _with_captions(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns with all captions of the known columns as a list in `captions`, each once, and no empty one."""
    found: list[str] = []
    for name in CAPTIONS:
        value = columns.get(name)
        found += [value] if isinstance(value, str) else [v for v in value or () if isinstance(v, str)]
    kept = {k: v for k, v in columns.items() if isinstance(v, (str, int, float)) and k not in ("txt", "caption")}
    return {**kept, "captions": found}
