"""What pictures come from: folders, parquet files, lists of paths and URLs, shards. Each gives ids and pictures by row.

`captions` is the column of a picture's captions, best first; the other columns are kept as they are. Folders, parquet
files and lists may lie anywhere that fsspec reaches, such as s3://bucket/photos.
"""

import bisect
import csv
import dataclasses
import functools
import itertools
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ldm.data.fetch import Downloads, fetch_all
from ldm.data.order import locate
from ldm.data.remote import Cache, place, reaching
from ldm.data.shards import Shards
from ldm.data.tars import Damaged
from ldm.errors import UserError, reason

CAPTIONS = ("captions", "caption", "text", "txt", "prompt", "name", "TEXT")  # columns that hold captions, best first
IMAGES = ("image", "webp", "jpg", "png", "img", "bytes")  # columns that hold the bytes of a picture
REFERENCES = ("file_name", "path", "file", "image_path", "url", "URL", "image_url", "image")  # ... or say where it is
_IDS = ("id", "key", "__key__")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_LISTS = (".jsonl", ".csv", ".tsv")


class Raw(NamedTuple):
    """A picture as it was found. `columns["captions"]` is a list of strings."""

    image: bytes
    columns: dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Pictures by row number.

    random: whether rows are read as fast in any order and twice; if not, they are copied first where that matters.
    downloads: whether reading fetches each picture from elsewhere.
    """

    @property
    def name(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def downloads(self) -> bool: ...

    def ids(self) -> list[str]:
        """What tells each row apart, whatever the order of files on a disk."""
        ...

    def stamp(self) -> str:
        """Changes when the source does."""
        ...

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        """The rows asked for, in order; an error in the place of one that cannot be had."""
        ...


def open_sources(paths: Sequence[str], limits: Downloads = Downloads()) -> list[Source]:  # noqa: B008 (it is frozen)
    """One source for each path. UserError for a path that is none, and for two sources of one name."""
    sources = [_open(path, limits) for path in paths]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two sources are called {twice[0]!r}: rename one, since captions and limits go by that name")
    return sources


def _open(path: str, limits: Downloads) -> Source:
    if path.endswith(".tar") or "::" in path:
        return ShardSource(path, limits)
    system, inside = place(path)
    try:
        with reaching(path):
            kind = system.info(inside)["type"]
            inside = inside.rstrip("/") or inside
            found = system.find(inside, detail=True) if kind == "directory" else {}
    except FileNotFoundError:
        raise UserError(f"source {path!r} is not there: give a folder, a .parquet file, a list or shards") from None
    remote = "://" in path
    full = {name: system.unstrip_protocol(name) if remote else name for name in sorted(found)}
    inner = {posixpath.relpath(name, inside): name for name in full}
    stem, suffix = posixpath.splitext(posixpath.basename(inside))
    if kind != "directory":
        if suffix == ".parquet":
            return _open_parquet(stem, [path], limits)
        if suffix in _LISTS:
            rows = _listed(path)
            return References(stem, path.rpartition("/")[0] or ".", rows, _reference_column(path, rows), limits)
        raise UserError(f"source {path!r} is neither a folder, a .parquet, .jsonl or .csv file nor shards (.tar)")
    name = posixpath.basename(inside) if remote else Path(path).resolve().name
    if any(name.endswith(".tar") and "/" not in name for name in inner):
        return ShardSource(path, limits)
    metadata = next((n for n in ("metadata.jsonl", "metadata.csv") if n in inner), None)
    if metadata:
        listing = full[inner[metadata]]
        rows = _listed(listing)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("file_name"), str) or not row["file_name"]:
                raise UserError(f"{listing!r} has no file_name in entry {number}")
        return References(name, path, rows, "file_name", limits, confined=True, texts=frozenset(inner))
    parquet = [full[inner[n]] for n in inner if n.endswith(".parquet")]
    if parquet:
        return _open_parquet(name, parquet, limits)
    images = [n for n in inner if n.lower().endswith(_SUFFIXES)]
    if not images:
        raise UserError(f"folder {path!r} holds no images ({', '.join(_SUFFIXES)}), no metadata and no parquet files")
    rows, sizes = [{"file_name": n} for n in images], [found[inner[n]].get("size") for n in images]
    return References(name, path, rows, "file_name", limits, confined=True, texts=frozenset(inner), seen=str(sizes))


@dataclass(frozen=True)
class References:
    """Rows that say where each picture is: a listed folder, or a list of paths (from the list's folder on) and URLs.

    rows: columns, among them `column`, the reference; confined: it may not lead out of the folder; texts: the files
    that may be a `.txt` beside a picture, with one caption on each line; seen: what else the stamp follows from.
    """

    name: str
    folder: str
    rows: list[dict[str, Any]]
    column: str
    limits: Downloads
    confined: bool = False
    texts: frozenset[str] = frozenset()
    seen: str = ""

    @functools.cached_property
    def downloads(self) -> bool:
        return any("://" in self._place(row) for row in self.rows)

    @property
    def random(self) -> bool:
        return not self.downloads

    def ids(self) -> list[str]:
        return [str(row[self.column]) for row in self.rows]

    def stamp(self) -> str:
        return json.dumps([self.rows, self.seen], sort_keys=True)

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        chosen = [self.rows[row] for row in rows]
        beside = [self._beside(row) for row in chosen]
        files = fetch_all([self._place(row) for row in chosen], self.limits)
        texts = fetch_all([text for text in beside if text], self.limits)
        for row, text, data in zip(chosen, beside, files, strict=True):
            lines = next(texts) if text else b""
            columns = _with_captions({k: v for k, v in row.items() if k != "file_name"})
            if self.confined and self._leads_out(row):
                yield UserError("file_name leads out of the folder")
            elif isinstance(data, UserError) or isinstance(lines, UserError):
                yield data if isinstance(data, UserError) else UserError("the .txt cannot be read")
            else:
                try:
                    found = [line.strip() for line in lines.decode().splitlines()]
                    columns["captions"] = [*filter(None, found), *columns["captions"]]
                    yield Raw(data, columns)
                except UnicodeDecodeError:
                    yield UserError("the .txt is not UTF-8")

    def _place(self, row: Mapping[str, Any]) -> str:
        reference = str(row[self.column])
        return reference if "://" in reference or reference.startswith("/") else f"{self.folder}/{reference}"

    def _beside(self, row: Mapping[str, Any]) -> str:
        name = posixpath.splitext(str(row[self.column]))[0] + ".txt"
        return f"{self.folder}/{name}" if name in self.texts else ""

    def _leads_out(self, row: Mapping[str, Any]) -> bool:
        if "://" in self.folder:
            return "://" in str(row[self.column]) or ".." in str(row[self.column]).split("/")
        return not Path(self._place(row)).resolve().is_relative_to(Path(self.folder).resolve())


def _reference_column(path: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        raise UserError(f"list {path!r} is empty")
    column = next((name for name in REFERENCES if isinstance(rows[0].get(name), str)), None)
    if column is None:
        raise UserError(f"list {path!r} has no column of paths or URLs ({', '.join(REFERENCES)}), only {list(rows[0])}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise UserError(f"list {path!r} has no {column} in entry {number}")
    return column


def _listed(path: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .csv or .tsv file."""
    system, inside = place(path)
    try:
        with system.open(inside, "r", encoding="utf-8", newline="") as file:
            if path.endswith(".jsonl"):
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ","))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path!r} cannot be read: {reason(error)}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row:
            raise UserError(f"{path!r} cannot be read: entry {number} is not a row of named columns")
    return rows


def _open_parquet(name: str, paths: Sequence[str], limits: Downloads) -> "ParquetSource":
    """Parquet files of pictures, or of rows that say where they are."""
    source = ParquetSource(name, tuple(paths))
    names = source.check()
    if source.image_column() is not None:
        return source
    column = next((c for c in REFERENCES if c in names), None)
    if column is None:
        raise UserError(f"{paths[0]!r} has no column of image bytes, paths or URLs, only {', '.join(names)}")
    places = References(name, paths[0].rpartition("/")[0] or ".", [], column, limits)
    return dataclasses.replace(source, places=places)


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with an image column (bytes, or a struct with bytes), or whose rows say where pictures are, as
    img2dataset takes them: `places`. Captions are text, or lists of it."""

    name: str
    paths: tuple[str, ...]
    places: References | None = None
    random: bool = dataclasses.field(default=False, init=False)

    @property
    def downloads(self) -> bool:
        return self.places is not None

    def ids(self) -> list[str]:
        found: list[str] = []
        for number in range(len(self.paths)):
            file = self._file(number)
            column = next((name for name in _IDS if name in file.schema_arrow.names), None)
            if column is None:
                own = [f"{row:09d}" for row in range(file.metadata.num_rows)]
            else:
                table = self._sound(number, functools.partial(file.read, [column]))
                own = [str(value) for value in table[column].to_pylist()]
            part = f"{posixpath.basename(self.paths[number])}/" if len(self.paths) > 1 else ""
            found += [part + id for id in own]
        return found

    def stamp(self) -> str:
        def one(path: str) -> list[str]:
            system, inside = place(path)
            info = system.info(inside)
            return [path, *(str(info.get(k)) for k in ("size", "mtime", "ETag", "LastModified"))]

        return json.dumps([one(path) for path in self.paths])

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        if self.places:
            told = [row | {self.places.column: row[self.places.column] or ""} for row in self.rows(rows)]
            yield from dataclasses.replace(self.places, rows=told).read(range(len(told)))
            return
        image = self.image_column()
        for columns in self.rows(rows):
            value = columns.pop(image or "", None)
            data = value.get("bytes") if isinstance(value, dict) else value
            yield Raw(data, _with_captions(columns)) if data else UserError("no image bytes")

    def rows(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The columns of each row. Rising rows read each row group once."""
        starts, here, table = self._sound(0, lambda: _row_groups(self.paths)), -1, None
        for row in rows:
            group = bisect.bisect_right(starts, row, key=lambda start: start[0]) - 1
            start, number, within = starts[group]
            if group != here:
                here, file = group, self._file(number)
                table = self._sound(number, functools.partial(file.read_row_group, within))
            yield table.slice(row - start, 1).to_pylist()[0]  # type: ignore[union-attr]

    def check(self) -> list[str]:
        """The names of the columns. UserError where a file is not parquet or has other columns than the first."""
        names: list[str] = self._file(0).schema_arrow.names
        for number in range(1, len(self.paths)):
            missing = set(names) - set(self._file(number).schema_arrow.names)
            if missing:
                path, column = self.paths[number], sorted(missing)[0]
                raise UserError(f"{path!r} has no column {column!r}, which {self.paths[0]!r} has")
        return names

    def image_column(self) -> str | None:
        import pyarrow as pa

        def holds_bytes(kind: Any) -> bool:
            if pa.types.is_struct(kind):
                return any(field.name == "bytes" for field in kind)
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

        able = [field.name for field in self._file(0).schema_arrow if holds_bytes(field.type)]
        return next((name for name in IMAGES if name in able), able[0] if able else None)

    def _file(self, number: int) -> Any:
        return self._sound(number, lambda: _parquet_file(self.paths[number]))

    def _sound(self, number: int, read: Callable[[], Any]) -> Any:
        """What `read` returns; UserError where the file is no parquet file or a damaged one."""
        import pyarrow as pa

        try:
            return read()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{self.paths[number]!r} is not a whole parquet file: {error}") from None


def _parquet_file(path: str) -> Any:
    import pyarrow.parquet as pq

    system, inside = place(path)
    return pq.ParquetFile(system.open(inside, "rb") if "://" in path else path)


@functools.lru_cache(16)
def _row_groups(paths: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """(first row, file, row group in the file) of every row group."""
    sizes = []
    for number, path in enumerate(paths):
        about = _parquet_file(path).metadata
        sizes += [(about.row_group(g).num_rows, number, g) for g in range(about.num_row_groups)]
    firsts = itertools.accumulate((size for size, _, _ in sizes), initial=0)
    return [(first, number, group) for first, (_, number, group) in zip(firsts, sizes, strict=False)]


class ShardSource:
    """Shards that exist already, by brace range or folder. Remote ones are copied whole while they are read."""

    downloads = False

    def __init__(self, pattern: str, limits: Downloads) -> None:
        self._shards = Shards(pattern, cache=Cache.at(limits.copies, limits.copies_gb), listed=False)
        first = Path(str(self._shards.paths[0]))
        self.name = first.stem if len(self._shards.paths) == 1 else first.resolve().parent.name
        self.random = not any(isinstance(path, str) for path in self._shards.paths)

    def ids(self) -> list[str]:
        return [f"{e.name}/{key}" for shard, e in enumerate(self._shards.entries) for key in self._shards.keys(shard)]

    def stamp(self) -> str:
        known = zip(self._shards.paths, self._shards.entries, strict=True)
        return json.dumps([[e.name, e.bytes, e.sha256 or self._shards.versions.get(path, "")] for path, e in known])

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        shards, indices = locate(self._shards.ends, np.asarray(rows, np.int64))
        for shard, index in zip(shards.tolist(), indices.tolist(), strict=True):
            try:
                sample = self._shards.sample(shard, index)
                yield Raw(sample.image, _with_captions(sample.about()))
            except Damaged as error:
                yield UserError(f"damaged sample: {error}")


def _with_captions(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns with all captions of the known columns as a list in `captions`, each once, and no empty one."""
    found: list[str] = []
    for name in CAPTIONS:
        value = columns.get(name)
        found += [value] if isinstance(value, str) else [v for v in value or () if isinstance(v, str)]
    kept = {k: v for k, v in columns.items() if isinstance(v, (str, int, float)) and k not in ("txt", "caption")}
    return {**kept, "captions": found}
