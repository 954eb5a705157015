"""What pictures come from: folders, parquet files, lists of paths and URLs, shards. Each gives ids and pictures by row.

`captions` is the column of a picture's captions, best first; the other columns are kept as they are. Folders, parquet
files and lists may lie anywhere that fsspec reaches, such as s3://bucket/photos.
"""

import bisect
import csv
import functools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from ldm.data.fetch import Downloads, fetch_all
from ldm.data.order import Recent, locate
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
_OPEN_FILES = 4


class Raw(NamedTuple):
    """A picture as it was found. `columns["captions"]` is a list of strings."""

    image: bytes
    columns: dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Pictures by row number.

    random: whether rows are read as fast in any order and twice; if not, they are copied first where that matters.
    downloads: whether reading fetches each picture from elsewhere. ids: what tells each row apart, whatever the order
    of files on a disk. stamp: changes when the source does. read: the rows asked for, in order, an error in the place
    of one that cannot be had.
    """

    @property
    def name(self) -> str: ...
    @property
    def random(self) -> bool: ...
    @property
    def downloads(self) -> bool: ...

    def ids(self) -> list[str]: ...
    def stamp(self) -> str: ...
    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]: ...


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
    if kind != "directory":
        stem, suffix = posixpath.splitext(posixpath.basename(inside))
        if suffix == ".parquet":
            return ParquetSource(stem, [path], limits)
        if suffix in _LISTS:
            rows = _listed(path)
            return References(stem, _folder(path), rows, _reference_column(path, rows), limits)
        raise UserError(f"source {path!r} is neither a folder, a .parquet, .jsonl or .csv file nor shards (.tar)")
    remote = "://" in path
    name = posixpath.basename(inside) if remote else Path(path).resolve().name
    files = {posixpath.relpath(n, inside): system.unstrip_protocol(n) if remote else n for n in sorted(found)}
    if any(file.endswith(".tar") and "/" not in file for file in files):
        return ShardSource(path, limits)
    if listing := next((files[n] for n in ("metadata.jsonl", "metadata.csv") if n in files), None):
        rows = _listed(listing)
        _check(listing, rows, "file_name")
        return References(name, path, rows, "file_name", limits, frozenset(files))
    parquet = [file for n, file in files.items() if n.endswith(".parquet")]
    if parquet:
        return ParquetSource(name, parquet, limits)
    rows = [{"file_name": n} for n in files if n.lower().endswith(_SUFFIXES)]
    if not rows:
        raise UserError(f"folder {path!r} holds no images ({', '.join(_SUFFIXES)}), no metadata and no parquet files")
    sizes = [found[n].get("size") for n in sorted(found) if n.lower().endswith(_SUFFIXES)]
    return References(name, path, rows, "file_name", limits, frozenset(files), str(sizes))


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "."


@dataclass(frozen=True)
class References:
    """Rows that say where each picture is: a listed folder, or a list of paths (from the list's folder on) and URLs.

    rows: columns, among them `column`, the reference; files: of a folder, out of which no reference may lead, and where
    a `.txt` beside a picture holds a caption on each line; seen: what else the stamp follows from.
    """

    name: str
    folder: str
    rows: list[dict[str, Any]]
    column: str
    limits: Downloads
    files: frozenset[str] | None = None
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
            if self.files is not None and self._leads_out(row):
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
        return f"{self.folder}/{name}" if name in (self.files or ()) else ""

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
    _check(path, rows, column)
    return column


def _check(path: str, rows: Sequence[Mapping[str, Any]], column: str) -> None:
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise UserError(f"{path!r} has no {column} in entry {number}")


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


class ParquetSource:
    """Parquet files with an image column (bytes, or a struct with bytes), or whose rows say where pictures are, as
    img2dataset takes them. Captions are text, or lists of it. UserError for files that cannot be read as one table."""

    random = False

    def __init__(self, name: str, paths: Sequence[str], limits: Downloads) -> None:
        self.name, self._paths, self._limits = name, paths, limits
        self._file = Recent(self._opened, _OPEN_FILES)
        self._groups: list[tuple[int, int, int]] = []  # the first row, the file, the row group in it
        schema, total = self._file(0).schema_arrow, 0
        for number, path in enumerate(paths):
            file = self._file(number)
            if missing := sorted(set(schema.names) - set(file.schema_arrow.names)):
                raise UserError(f"{path!r} has no column {missing[0]!r}, which {paths[0]!r} has")
            for group in range(file.metadata.num_row_groups):
                self._groups.append((total, number, group))
                total += file.metadata.row_group(group).num_rows
        able = [field.name for field in schema if _holds_bytes(field.type)]
        self._image = next((name for name in IMAGES if name in able), able[0] if able else "")
        self._reference = next((name for name in REFERENCES if name in schema.names), "")
        if not self._image and not self._reference:
            names = ", ".join(schema.names)
            raise UserError(f"{paths[0]!r} has no column of image bytes, paths or URLs, only {names}")

    @property
    def downloads(self) -> bool:
        return not self._image

    def ids(self) -> list[str]:
        found: list[str] = []
        for number, path in enumerate(self._paths):
            file = self._file(number)
            column = next((name for name in _IDS if name in file.schema_arrow.names), None)
            if column is None:
                own = [f"{row:09d}" for row in range(file.metadata.num_rows)]
            else:
                with _whole(path):
                    own = [str(value) for value in file.read([column])[column].to_pylist()]
            part = f"{posixpath.basename(path)}/" if len(self._paths) > 1 else ""
            found += [part + id for id in own]
        return found

    def stamp(self) -> str:
        def one(path: str) -> list[str]:
            system, inside = place(path)
            info = system.info(inside)
            return [path, *(str(info.get(k)) for k in ("size", "mtime", "ETag", "LastModified"))]

        return json.dumps([one(path) for path in self._paths])

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        if not self._image:
            told = [row | {self._reference: row[self._reference] or ""} for row in self._rows(rows)]
            places = References(self.name, _folder(self._paths[0]), told, self._reference, self._limits)
            yield from places.read(range(len(told)))
            return
        for columns in self._rows(rows):
            value = columns.pop(self._image)
            data = value.get("bytes") if isinstance(value, dict) else value
            yield Raw(data, _with_captions(columns)) if data else UserError("no image bytes")

    def _rows(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The columns of each row. Rising rows read each row group once."""
        here, table = -1, cast(Any, None)
        for row in rows:
            group = bisect.bisect_right(self._groups, row, key=lambda group: group[0]) - 1
            start, number, within = self._groups[group]
            if group != here:
                with _whole(self._paths[number]):
                    here, table = group, self._file(number).read_row_group(within)
            yield table.slice(row - start, 1).to_pylist()[0]

    def _opened(self, number: int) -> Any:
        import pyarrow.parquet as pq

        path = self._paths[number]
        system, inside = place(path)
        with _whole(path):
            return pq.ParquetFile(system.open(inside, "rb") if "://" in path else path)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@contextmanager
def _whole(path: str) -> Iterator[None]:
    """UserError where a file is no parquet file or a damaged one."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path!r} is not a whole parquet file: {error}") from None


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
