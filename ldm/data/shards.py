"""Shards: tar files as img2dataset and webdataset lay them out, with a manifest that says what each must hold.

A sample is a run of members that share a key, the name up to its first dot: `000000012.webp`, `.txt`, `.json`. Only the
extensions named here are ever read, so pickled members stay bytes in a file. A shard is scanned once for the place of
its members; samples are then read with `pread`, in any order.
"""

import dataclasses
import functools
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import UserError
from ldm.files import replacing, sha256, write_json

IMAGES = ("webp", "png", "jpg", "jpeg")
MEMBERS = frozenset((*IMAGES, "txt", "json"))
MANIFEST = "manifest.json"
_BLOCK = 512
_OPEN_SHARDS = 256  # below the usual limit of 1,024 open files


class Damaged(UserError):
    """A shard or a sample that is not what it should be; the text names the shard, and the key where there is one."""


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one shard.

    buckets: where pictures were cut to aspect-ratio buckets, "1216x832" (width x height) -> samples. The samples of a
    shard lie in the order of this dict: with {"1024x1024": 5, "1216x832": 3} the first five are squares. Empty without
    buckets. The .json of each sample has its `bucket`, and the values that SDXL is conditioned on, in pixels:
    original_width, original_height (upright, before any resize), crop_top, crop_left (cut off after the resize), and
    width, height (of the picture in the shard: the target size).
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    buckets: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Where a sample lies in its shard: extension -> (offset, length) in bytes."""

    key: str
    members: Mapping[str, tuple[int, int]]


def expand(pattern: str) -> list[Path]:
    """The shard files that `a/{00000..00019}.tar::b/{0..3}.tar` names; a folder stands for all the shards in it.

    UserError for a pattern that names nothing, is remote or a `pipe:`, or names a file that is not there.
    """
    from braceexpand import braceexpand

    paths: list[Path] = []
    for part in filter(None, pattern.split("::")):
        if part.startswith("pipe:") or "://" in part:
            raise UserError(f"shards {part!r} are not local files: copy them to a local folder first")
        try:
            names = list(braceexpand(part))
        except ValueError:
            raise UserError(f"shards {part!r} have unbalanced braces: write them as {{00000..00019}}.tar") from None
        for path in map(Path, names):
            paths += _in_folder(path) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"no shards match {pattern!r}: give a range such as 'data/{{00000..00019}}.tar'")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"shard {str(missing[0])!r} is not there ({len(missing)} of {len(paths)} missing)")
    return paths


def _in_folder(folder: Path) -> list[Path]:
    return [folder / name for name in read_manifest(folder)] or sorted(folder.glob("*.tar"))


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Entry:
    """Write (key, {extension: bytes}) samples as a tar whose bytes depend on nothing else, whole or not at all."""
    count = 0
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in samples:
                count += 1
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0 unless set
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        size, digest = temporary.stat().st_size, sha256(temporary)
    return Entry(path.name, count, size, digest)


def write_manifest(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the manifest of the shards of a folder."""
    shards = [dataclasses.asdict(entry) for entry in entries]
    write_json(folder / MANIFEST, {"format": 1, "samples": sum(e.samples for e in entries), "shards": shards})


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Shard name -> entry; empty where the folder has no manifest. UserError for a manifest that is not one."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        entries = [Entry(**shard) for shard in json.loads(path.read_text())["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a manifest of shards ({error!r}): prepare the data again") from None
    return {entry.name: entry for entry in entries}


def scan(path: Path) -> list[Sample]:
    """The samples of a tar file in order. Damaged where the file is cut short or is not a tar."""
    samples: list[Sample] = []
    key, members = "", dict[str, tuple[int, int]]()
    for name, offset, size in _members(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if extension.lower() not in MEMBERS:
            continue
        stem = f"{folder}/{stem}" if folder else stem
        if stem != key or not samples:
            key, members = stem, {}
            samples.append(Sample(key, members))
        members[extension.lower()] = (offset, size)
    return samples


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file in a tar; tarfile itself takes 20 times as long."""
    with path.open("rb") as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while True:
            header = os.pread(file.fileno(), _BLOCK, at)
            if len(header) < _BLOCK:
                raise Damaged(f"shard {str(path)!r} is cut short at byte {end}: copy or prepare it again")
            if header == bytes(_BLOCK):
                return
            try:
                checksum, size = (
                    int(header[148:156].split(b"\0")[0], 8),
                    int(header[124:136].split(b"\0")[0] or b"0", 8),
                )
            except ValueError:
                checksum, size = -1, 0
            if checksum != sum(header) - sum(header[148:156]) + 8 * 32:
                raise Damaged(f"shard {str(path)!r} is not a tar file at byte {at}: copy or prepare it again")
            if header[156:157] not in (b"0", b"\0", b"5"):  # long names, sparse files: rare, and tarfile knows them
                yield from _members_of_any_tar(path)
                return
            at += _BLOCK
            if at + size > end:
                raise Damaged(f"shard {str(path)!r} is cut short at byte {end}: copy or prepare it again")
            if header[156:157] != b"5":
                prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" else b""
                name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
                yield (f"{prefix.decode('utf-8', 'replace')}/{name}" if prefix else name), at, size
            at += -(-size // _BLOCK) * _BLOCK


def _members_of_any_tar(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield from [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
    except tarfile.TarError as error:
        raise Damaged(f"shard {str(path)!r} is not a whole tar file ({error}): copy or prepare it again") from None


class Shards:
    """Random access to the samples of many shards, found by their manifests, or by scanning where there is none.

    `counts` holds the samples of each shard. Opening them checks that each file has the size its manifest says.
    """

    def __init__(self, pattern: str) -> None:
        self.paths = expand(pattern)
        self.entries = [self._entry(path) for path in self.paths]
        self.counts = [entry.samples for entry in self.entries]
        if not sum(self.counts):
            raise UserError(f"shards {pattern!r} hold no samples: prepare the data again")
        self._caches()

    def _entry(self, path: Path) -> Entry:
        size, known = path.stat().st_size, _manifest(path.parent).get(path.name)
        if known is None:
            return Entry(path.name, len(scan(path)), size, "")
        if known.bytes != size:
            raise Damaged(
                f"shard {str(path)!r} has {size} bytes, its manifest says {known.bytes}: copy or prepare it again"
            )
        return known

    def _caches(self) -> None:
        self.samples = functools.lru_cache(_OPEN_SHARDS)(self._scan)
        self._file = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("samples", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:  # open files stay in the process that opened them
        self.__dict__.update(state)
        self._caches()

    def _scan(self, shard: int) -> list[Sample]:
        samples = scan(self.paths[shard])
        if len(samples) != self.counts[shard]:
            place = f"shard {str(self.paths[shard])!r}"
            raise Damaged(f"{place} holds {len(samples)} samples, its manifest says {self.counts[shard]}")
        return samples

    def _open(self, shard: int) -> BinaryIO:
        return self.paths[shard].open("rb")

    def read(self, shard: int, index: int, extension: str) -> bytes:
        """The bytes of one member. Damaged where the sample has no such member."""
        sample = self.samples(shard)[index]
        if extension not in sample.members:
            raise Damaged(f"sample {sample.key!r} of shard {str(self.paths[shard])!r} has no .{extension}")
        offset, size = sample.members[extension]
        return os.pread(self._file(shard).fileno(), size, offset)

    def image(self, shard: int, index: int) -> bytes:
        """The bytes of the image of a sample, whichever of the allowed formats it has."""
        members = self.samples(shard)[index].members
        return self.read(shard, index, next((e for e in IMAGES if e in members), IMAGES[0]))

    def describe(self, shard: int, index: int) -> dict[str, Any]:
        """The columns of a sample, and `captions`: those of its .json, else its .txt. Damaged without either."""
        sample = self.samples(shard)[index]
        try:
            columns = json.loads(self.read(shard, index, "json")) if "json" in sample.members else {}
            if not columns.get("captions"):
                columns["captions"] = [self.read(shard, index, "txt").decode().strip()]
            elif isinstance(columns["captions"], str):
                columns["captions"] = [columns["captions"]]
        except (ValueError, AttributeError) as error:
            place = f"sample {sample.key!r} of shard {str(self.paths[shard])!r}"
            raise Damaged(f"{place} has a broken .json or .txt: {error}") from None
        return columns


@functools.lru_cache(64)
def _manifest_at(folder: Path, changed: int) -> dict[str, Entry]:
    return read_manifest(folder)


def _manifest(folder: Path) -> dict[str, Entry]:
    path = folder / MANIFEST
    return _manifest_at(folder, path.stat().st_mtime_ns if path.is_file() else 0)
