"""Shards: tar files as img2dataset and webdataset lay them out, with a manifest that says what each must hold.

Beside `00000.tar` lies `00000.idx`, the place and the sha256 of each sample: nothing that was altered is ever handed
out. A shard whose manifest names no index is hashed whole when it is first opened. Of one without a manifest nothing is
known but what it says itself.
"""

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ldm.data import tars
from ldm.data.order import Recent
from ldm.data.remote import Cache, fetch_small, place, reaching, sizes
from ldm.data.tars import IMAGES, RECORD, Damaged, Index, load_index, scan
from ldm.errors import UserError
from ldm.files import replacing, sha256, write_json

Place = Path | str  # of a shard: a local file, or a URL
MANIFEST = "manifest.json"
_OPEN_SHARDS = 256  # below the usual limit of 1,024 open files


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one shard.

    index: the sha256 of its .idx file. buckets: where pictures were cut to aspect-ratio buckets, "1216x832" (width x
    height) -> samples. The samples of a shard lie in the order of this dict: with {"1024x1024": 5, "1216x832": 3} the
    first five are squares. Empty without buckets. The .json of each sample has its `bucket`, and the values that SDXL
    is conditioned on, in pixels: original_width, original_height (upright, before any resize), crop_top, crop_left
    (cut off after the resize), and width, height (of the picture in the shard: the target size).
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str = ""
    buckets: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one picture: extension -> bytes."""

    key: str
    members: Mapping[str, bytes]
    shard: Place

    @property
    def place(self) -> str:
        """What names it in errors."""
        return f"sample {self.key!r} of shard {str(self.shard)!r}"

    @property
    def image(self) -> bytes:
        """The bytes of the image, whichever of the allowed formats it has. Damaged without one."""
        return self.member(next((e for e in IMAGES if e in self.members), IMAGES[0]))

    def member(self, extension: str) -> bytes:
        """The bytes of one member. Damaged where it is missing."""
        if extension not in self.members:
            raise Damaged(f"{self.place} has no .{extension}")
        return self.members[extension]

    def columns(self) -> dict[str, Any]:
        """What the .json says, nothing without one. Damaged where it is broken."""
        try:
            columns = json.loads(self.members.get("json", b"{}").decode())
        except ValueError as error:
            raise Damaged(f"{self.place} has a broken .json: {error}") from None
        if not isinstance(columns, dict):
            raise Damaged(f"{self.place} has a broken .json: it holds no fields")
        return columns

    def about(self) -> dict[str, Any]:
        """The columns, with the captions in `captions`. Damaged where they are broken or there is no caption."""
        return {**(columns := self.columns()), "captions": self.captions(columns)}

    def captions(self, columns: Mapping[str, Any], column: str = "") -> list[str]:
        """The captions in a column, or `txt`; without a name, those of the column `captions`, else the .txt.

        Damaged without any.
        """
        found = columns.get(column or "captions")
        if column == "txt" or (not column and not found):
            try:
                found = self.member("txt").decode().strip()
            except UnicodeDecodeError as error:
                raise Damaged(f"{self.place} has a broken .txt: {error}") from None
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise Damaged(f"{self.place} has no captions in {column or 'captions'!r}")
        return texts


class Opened(NamedTuple):
    """A shard in use. file: None for a remote one; places: where its samples lie; check: whether there are digests."""

    file: BinaryIO | None
    places: Index
    check: bool


def expand(pattern: str) -> list[Place]:
    """The shards that `a/{00000..00019}.tar::s3://b/{0..3}.tar` names; a folder stands for all the shards in it.

    UserError for a pattern that names nothing or is a `pipe:`, or names a file that is not there.
    """
    from braceexpand import braceexpand

    paths: list[Place] = []
    for part in filter(None, pattern.split("::")):
        if part.startswith("pipe:"):
            raise UserError(f"shards {part!r}: commands are never run, give files or URLs")
        try:
            names = list(braceexpand(part))
        except ValueError:
            raise UserError(f"shards {part!r} have unbalanced braces: write them as {{00000..00019}}.tar") from None
        for name in names:
            files = _in_folder(name) if _is_folder(name) else [name]
            paths += [file if "://" in file else Path(file) for file in files]
    if not paths:
        raise UserError(
            f"no shards match {pattern!r}: give a range such as 'data/{{00000..00019}}.tar', of scripts/prepare_data.py"
        )
    return paths


def _is_folder(name: str) -> bool:
    return not name.endswith(".tar") if "://" in name else Path(name).is_dir()


def _in_folder(folder: str) -> list[str]:
    names = list(read_manifest(folder))
    if not names and "://" in folder:
        system, inside = place(folder)
        with reaching(folder):
            names = sorted(name.rpartition("/")[2] for name in system.glob(f"{inside}/*.tar"))
    names = names or sorted(path.name for path in Path(folder).glob("*.tar"))
    return [f"{folder.rstrip('/')}/{name}" for name in names]


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Entry:
    """Write (key, {extension: bytes}) samples as a tar, and its index. Both are whole or not there at all, and their
    bytes depend on nothing else."""
    places: list[tuple[int, int, bytes]] = []
    with replacing(path) as temporary:
        with temporary.open("wb") as tar:
            for key, members in samples:
                sample, end = bytearray(), 0
                for extension, data in members.items():
                    header = tarfile.TarInfo(f"{key}.{extension}")
                    header.size = len(data)
                    end = len(sample) + tarfile.BLOCKSIZE + len(data)
                    sample += header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
                places.append((tar.tell(), end, hashlib.sha256(memoryview(sample)[:end]).digest()))
                tar.write(sample)
            end = tar.tell() + 2 * tarfile.BLOCKSIZE
            tar.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        size, digest = temporary.stat().st_size, sha256(temporary)
        index = np.array(places, RECORD).tobytes()
        with replacing(path.with_suffix(".idx")) as beside:
            beside.write_bytes(index)
    return Entry(path.name, len(places), size, digest, hashlib.sha256(index).hexdigest())


def write_manifest(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the manifest of the shards of a folder."""
    shards = [dataclasses.asdict(entry) for entry in entries]
    write_json(folder / MANIFEST, {"format": 1, "samples": sum(e.samples for e in entries), "shards": shards})


def read_manifest(folder: str | Path) -> dict[str, Entry]:
    """Shard name -> entry; empty where the folder has no manifest. UserError for a manifest that is not one."""
    path = f"{folder}/{MANIFEST}"
    local = Path(path)
    data = fetch_small(path) if "://" in path else local.read_bytes() if local.is_file() else None
    if data is None:
        return {}
    try:
        return {shard["name"]: Entry(**shard) for shard in json.loads(data)["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path!r} is not a manifest of shards ({error!r}): prepare the data again") from None


class Shards:
    """Random access to the samples of many shards, found by their manifests, or by scanning where there is none.

    patterns: of one source each; `sources` says of which each shard is. tolerate: share of the samples that may lie in
    shards whose size is wrong; they are then read as far as they can be. cache: where remote shards are kept; listed:
    whether those need a manifest, or are fetched and looked into (`versions` then tells their servers' ones apart).
    `counts` holds the samples of each shard, `ends` the number of samples up to its end.
    """

    def __init__(self, *patterns: str, tolerate: float = 0.0, cache: Cache | None = None, listed: bool = True) -> None:
        self.cache, self._listed = cache, listed
        self.versions: dict[Place, str] = {}
        self._opened = Recent(self._open, _OPEN_SHARDS)  # files stay in the process that opened them
        found = [expand(pattern) for pattern in patterns]
        self.paths = [path for paths in found for path in paths]
        self.sources = [source for source, paths in enumerate(found) for _ in paths]
        sizes, folders = self._sizes(), [str(path).rpartition("/")[0] or "." for path in self.paths]
        manifests = {folder: read_manifest(folder) for folder in set(folders)}
        self.entries = [
            manifests[folder].get(Path(path).name) or self._looked_into(path, size)
            for path, size, folder in zip(self.paths, sizes, folders, strict=True)
        ]
        self.counts = [entry.samples for entry in self.entries]
        self.ends = np.cumsum(self.counts)
        known = zip(self.paths, sizes, self.entries, strict=True)
        wrong = [(path, size, entry) for path, size, entry in known if size not in (-1, entry.bytes)]
        if sum(entry.samples for _, _, entry in wrong) > tolerate * sum(self.counts):
            path, size, entry = wrong[0]
            raise Damaged(
                f"shard {str(path)!r} has {size} bytes, its manifest says {entry.bytes}: copy or prepare it again"
            )
        if not sum(self.counts):
            raise UserError(f"shards {'::'.join(patterns)!r} hold no samples: prepare the data again")

    def _sizes(self) -> list[int]:
        """The bytes of each shard, -1 where a server does not tell them. UserError where one is not there."""
        remote = next((path for path in self.paths if isinstance(path, str)), None)
        if remote and self.cache is None:
            raise UserError(f"shards {remote!r} are not local files: copy them to a local folder first")
        found = sizes(self.paths)
        missing = [path for path, size in zip(self.paths, found, strict=True) if size is None]
        if missing:
            raise UserError(f"shard {str(missing[0])!r} is not there ({len(missing)} of {len(self.paths)} missing)")
        return [size or 0 for size in found]

    def _looked_into(self, path: Place, size: int) -> Entry:
        """What a shard says itself, where no manifest does."""
        if isinstance(path, str):
            if self._listed:
                raise UserError(f"shard {path!r} has no {MANIFEST} beside it that names it: remote shards need one")
            system, inside = place(path)
            self.versions[path] = system.ukey(inside)
        return Entry(Path(path).name, len(scan(self._local(path, "", size))[1]), size, "")

    def _open(self, shard: int) -> Opened | str:
        """A shard in use, or what is wrong with it."""
        path, entry = self.paths[shard], self.entries[shard]
        try:
            local = self._local(path, entry.sha256, entry.bytes)
            index = self._index(path, entry)
            check = index is not None
            if index is None:
                if entry.sha256 and isinstance(path, Path) and sha256(path) != entry.sha256:
                    raise Damaged(f"shard {str(path)!r} is not what its manifest says (sha256): copy it again")
                index = scan(local)[1]
            if len(index) != entry.samples:
                raise Damaged(f"shard {str(path)!r} holds {len(index)} samples, its manifest says {entry.samples}")
        except Damaged as error:
            return str(error)
        return Opened(local.open("rb") if isinstance(path, Path) else None, index, check)

    def _local(self, path: Place, digest: str, size: int) -> Path:
        if isinstance(path, Path):
            return path
        assert self.cache  # or it would have been refused
        return self.cache.get(path, digest, size, self.versions.get(path, ""))

    def _index(self, path: Place, entry: Entry) -> Index | None:
        if not entry.index:
            return None
        beside = path.with_suffix(".idx") if isinstance(path, Path) else f"{path.removesuffix('.tar')}.idx"
        try:
            return load_index(self._local(beside, entry.index, 44 * entry.samples), entry.index)
        except UserError:
            return None  # the shards alone were uploaded

    def sample(self, shard: int, index: int) -> Sample:
        """One sample, checked. Damaged where it or its shard was altered or cut short."""
        opened = self._opened(shard)
        if isinstance(opened, str):
            raise Damaged(opened)
        path, entry, record = self.paths[shard], self.entries[shard], opened.places[index]
        with nullcontext(opened.file) if opened.file else self._fetched(path, entry) as file:
            found = tars.read(file.fileno(), record, check=opened.check)
        if found is None:
            raise Damaged(f"sample {index} of shard {str(path)!r} was altered or cut short")
        return Sample(*found, path)

    def _fetched(self, path: Place, entry: Entry) -> BinaryIO:
        """A remote shard, which other processes may put out of the cache at any time."""
        while True:
            with suppress(FileNotFoundError):
                return self._local(path, entry.sha256, entry.bytes).open("rb")

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples. Damaged where it is cut short or no tar."""
        entry = self.entries[shard]
        return scan(self._local(self.paths[shard], entry.sha256, entry.bytes))[0]

    def runs(self, buckets: bool = True) -> list["Run"]:
        """The shards, or with buckets their parts of one size. UserError for a shard that was made without sizes."""
        found = []
        for shard, entry in enumerate(self.entries):
            first = int(self.ends[shard]) - entry.samples
            if buckets and sum(entry.buckets.values()) != entry.samples:
                raise UserError(f"shard {str(self.paths[shard])!r} was made without buckets: prepare it with them")
            for size, count in (entry.buckets if buckets else {"": entry.samples}).items():
                found.append(Run(shard, size, first, count))
                first += count
        return found


class Run(NamedTuple):
    """Samples that lie one behind the other and have one size, "WxH"; numbered over all the shards from `first`."""

    shard: int
    size: str
    first: int
    samples: int
