"""Encoded pictures and captions: each is encoded once and then trained on in every epoch.

They lie beside the shards, in a folder whose name follows from model, resolution and transform, or in one that is
named. `cache.json` there says what they were made with, and each shard has a file of fixed records, which is mapped:
the mean and deviation of the autoencoder's posterior of each view of each picture in fp16, token ids, SDXL's size
values, and text states where asked for. Each record has its sha256, and is checked when a process first reads it. A run
that would need other encodings is refused; a shard that has none yet is encoded.
"""

import bisect
import collections
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.dataset import Batch, ShardDataset, Tokenize, View, loader
from ldm.data.loader import Limits
from ldm.data.order import Ints, Recent, locate, uniforms
from ldm.data.shards import Entry, Run
from ldm.data.stream import CAPTION, CROP_X, FLIP, Stream
from ldm.data.tars import Damaged
from ldm.errors import UserError
from ldm.files import replacing, write_json

Posterior = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
Encode = Callable[[UInt8[Tensor, "b 3 h w"]], Posterior]  # images in 0..255 -> mean, deviation
States = tuple[Float[Tensor, "b l d"], Float[Tensor, "b v"] | None]
Show = Callable[[int, int], None]
BESIDE = "beside"  # as the name of a cache: in the folder of the shards
ABOUT = "cache.json"
_EMPTY = "empty.safetensors"
_PROBE = "a photo of 2 red apples, ünlike any other"
_OPEN_FILES = 1024
_RECORDS = {"latents": 2, "states": 1, "vector": 1}  # what is kept in records, and how many numbers name one
_SUMS = "sha256."


@dataclass(frozen=True)
class Encoders:
    """What encodes. model: a fingerprint of the autoencoder; text: of the text tower, empty to keep only token ids;
    states: captions -> text states. crops: views of each picture where it is cropped at random."""

    model: str
    encode: Encode
    text: str = ""
    states: Callable[[list[str]], States] | None = None
    crops: int = 1


class CachedDataset:
    """The same stream as the dataset that was encoded, of latents: `mean` and `std` (b, c, h, w) in fp16.

    empty: text states of the empty caption, where states are kept.
    """

    def __init__(self, dataset: ShardDataset, encoders: Encoders, cache: str | Path) -> None:
        self.stream: Stream = dataset.stream
        self.limits: Limits = dataset.limits
        self._flip, self._ends = dataset.config.flip, dataset.shards.ends
        self._random = dataset.config.crop == "random"
        homes = _homes(dataset, encoders, cache)
        self._paths = [_path(home, entry) for home, entry in zip(homes, dataset.shards.entries, strict=True)]
        self.about, self.where = dataset.about, dataset.where
        empty = Kept(homes[0] / _EMPTY) if (homes[0] / _EMPTY).is_file() else None
        self.empty = {name: empty.record(name, 0)[None] for name in empty.names} if empty else None
        self._kept = Recent(self._open, _OPEN_FILES)

    def _open(self, shard: int) -> "Kept":
        return Kept(self._paths[shard])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions of the stream."""
        places = np.asarray(positions, np.int64)
        rows, choices = self.stream.rows(places), self.stream.choices(places)
        found: dict[str, list[Any]] = collections.defaultdict(list)
        shards, indices = locate(self._ends, rows)
        for shard, index, choice in zip(shards.tolist(), indices.tolist(), choices.tolist(), strict=True):
            part = self._kept(shard)
            crop = int(choice[CROP_X] * (part.views // (1 + self._flip))) if self._random else 0
            view = (1 + self._flip) * crop + (self._flip and choice[FLIP] < 0.5)
            number = part.caption(index, choice[CAPTION])
            found["latents"].append(part.latents(index, view))
            found["size_ids"].append(part.tensors["size_ids"][index, crop])
            found["caption"].append(part.text("caption", number))
            found["key"].append(part.text("key", index))
            for name in ("tokens", "states", "vector"):
                if name in part.tensors:
                    found[name].append(part.record(name, number))
        texts = Batch(caption=found.pop("caption"), key=found.pop("key"), position=torch.from_numpy(places))
        stacked: Any = {name: torch.from_numpy(np.stack(rows)) for name, rows in found.items()}
        latents, ids = stacked.pop("latents"), stacked.pop("size_ids").long()
        return Batch(**texts, **stacked, mean=latents[:, 0], std=latents[:, 1], size_ids=ids)


class Kept:
    """The tensors of a file, mapped. The small ones are checked at once, the records of the others as they are read."""

    def __init__(self, path: Path) -> None:
        from safetensors.torch import load_file

        self._path, self.tensors = path, {name: tensor.numpy() for name, tensor in load_file(path).items()}
        self.names = [name for name in self.tensors if not name.startswith(_SUMS)]
        self._seen = {name: np.zeros(self.tensors[name].shape[: _depth(name)], bool) for name in self.names}
        if _sum_of_rest(self.tensors) != self.tensors[f"{_SUMS}rest"].tobytes():
            raise self._altered("what is known of its pictures")

    def record(self, name: str, *at: int) -> NDArray[Any]:
        """A row of a tensor; of latents that of a picture and a view. Damaged where it is not what was kept."""
        found: NDArray[Any] = self.tensors[name][at]
        seen = self._seen[name]
        if seen.ndim and not seen[at]:
            if hashlib.sha256(found.data).digest() != self.tensors[_SUMS + name][at].tobytes():
                raise self._altered(f"record {', '.join(map(str, at))} of {name}")
            seen[at] = True
        return found

    def _altered(self, what: str) -> Damaged:
        return Damaged(f"{what} in {str(self._path)!r} was altered: remove the file, it is then made again")

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Where each run of pictures of one size ends, whose latents are a tensor of their own."""
        runs = sum(name.startswith("latents.") for name in self.names)
        return list(itertools.accumulate(len(self.tensors[f"latents.{k}"]) for k in range(runs)))

    @functools.cached_property
    def _firsts(self) -> Ints:
        return np.cumsum(self.tensors["counts"]) - self.tensors["counts"]

    @property
    def views(self) -> int:
        """Of each picture: its crops, each once more where it is mirrored too."""
        return int(self.tensors["latents.0"].shape[1])

    def latents(self, index: int, view: int) -> NDArray[np.float16]:
        """(2, c, h, w): mean and deviation of a view."""
        run = bisect.bisect_right(self._ends, index)
        return self.record(f"latents.{run}", index - (self._ends[run - 1] if run else 0), view)

    def caption(self, index: int, draw: float) -> int:
        """The number of the caption that a draw from [0, 1) chooses for a picture."""
        return int(self._firsts[index] + int(draw * self.tensors["counts"][index]))

    def text(self, name: str, number: int) -> str:
        """One of the "caption"s or "key"s."""
        data, ends = self.tensors[f"{name}s"], self.tensors[f"{name}_ends"]
        return data[ends[number - 1] if number else 0 : ends[number]].tobytes().decode()


def cached(
    dataset: ShardDataset, encoders: Encoders, cache: str | Path, *, show: Show = lambda done, total: None
) -> CachedDataset:
    """The dataset with its pictures encoded: read from `cache` what lies there, else encoded and written.

    UserError for a cache that was made with anything else than these encoders and the dataset's transform.
    """
    fill(dataset, encoders, cache, show=show)
    return CachedDataset(dataset, encoders, cache)


def kept_with(dataset: ShardDataset, encoders: Encoders, cache: str | Path) -> dict[str, Any]:
    """What a cache was made with; empty where there is none. UserError for a file that does not say."""
    return _known(_homes(dataset, encoders, cache)[0])


def fill(
    dataset: ShardDataset,
    encoders: Encoders,
    cache: str | Path,
    *,
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
    show: Show = lambda done, total: None,
) -> None:
    """Encode what is missing in `cache`; each shard is whole there or not at all.

    share: (rank, world), to do the rank-th of every `world` shards. `show(done, total)` is called after each batch, in
    pictures. UserError as in `cached`.
    """
    if dataset.config.crop == "random" and encoders.crops == 1:
        raise UserError(
            "latents of data.crop random are kept as several crops: run scripts/precompute.py with --crops first"
        )
    homes, (rank, world) = _homes(dataset, encoders, cache), share
    for home in dict.fromkeys(homes):
        _claim(home, _about(dataset, encoders))
    entries = dataset.shards.entries
    files = {_path(home, entry): n for n, (home, entry) in enumerate(zip(homes, entries, strict=True)) if entry.samples}
    missing = {path: shard for path, shard in list(files.items())[rank::world] if not _whole(path)}
    done, total = 0, sum(entries[shard].samples for shard in missing.values())
    for path, shard in missing.items():
        tensors: dict[str, Tensor] = {}
        runs = [run for run in dataset.runs if run.shard == shard]
        pictures: list[list[View]] = []
        for k, run in enumerate(runs):
            parts = []
            for latents in _encoded(dataset, run, encoders, batch_size, pictures):
                parts.append(latents)
                done += len(latents)
                show(done, total)
            tensors[f"latents.{k}"] = torch.cat(parts)
        _save(path, tensors | _texts(pictures, dataset.tokenize, encoders))
    if encoders.states and rank == 0:
        for home in dict.fromkeys(homes):
            _save(home / _EMPTY, _states([""], encoders.states))


@dataclass(frozen=True)
class _Views:
    """Each picture of a run `crops` times, with all its captions."""

    dataset: ShardDataset
    run: Run
    crops: int
    limits: Limits

    def __len__(self) -> int:
        return self.run.samples * self.crops

    def __getitems__(self, positions: Sequence[int]) -> Any:
        places = self.run.first * self.crops + np.asarray(positions, np.int64)
        corners = uniforms(0, places, 2) if self.crops > 1 else np.full((len(places), 2), 0.5)
        rows, problems = places // self.crops, list[str]()
        images, views = self.dataset.views(rows.tolist(), corners.tolist(), problems)
        return {"image": images, "views": views, "problems": problems}


@torch.no_grad()
def _encoded(
    dataset: ShardDataset, run: Run, encoders: Encoders, batch_size: int, pictures: list[list[View]]
) -> Iterator[Tensor]:
    """(b, views, 2, c, h, w) of the pictures of a run; what is known of their views is added to `pictures`."""
    crops = encoders.crops if dataset.config.crop == "random" else 1
    source = _Views(dataset, run, crops, Limits(dataset.limits.patience, dataset.limits.damaged))
    step = max(1, batch_size // crops) * crops
    for batch in loader(source, step, stop=len(source), workers=dataset.config.workers):
        views: Any = batch["views"]  # type: ignore[typeddict-item]
        image = batch["image"]
        mirrored = [image, image.flip(-1)] if dataset.config.flip else [image]
        pairs = torch.stack([torch.stack(encoders.encode(one), 1).to("cpu", torch.float16) for one in mirrored], 1)
        if not torch.isfinite(pairs).all():
            raise UserError(f"the latents of {views[0].key!r} and on are not finite: check the autoencoder")
        pictures.extend(views[i : i + crops] for i in range(0, len(views), crops))
        yield pairs.reshape(len(views) // crops, -1, *pairs.shape[2:])


def _texts(pictures: list[list[View]], tokenize: Tokenize | None, encoders: Encoders) -> dict[str, Tensor]:
    captions = [caption for views in pictures for caption in views[0].captions]
    found = {
        "counts": torch.tensor([len(views[0].captions) for views in pictures]),
        "size_ids": torch.tensor([[view.size_ids for view in views] for views in pictures], dtype=torch.int32),
    }
    found["captions"], found["caption_ends"] = _joined(captions)
    found["keys"], found["key_ends"] = _joined([views[0].key for views in pictures])
    if tokenize:
        found["tokens"] = tokenize(captions)
    if encoders.states:
        found |= _states(captions, encoders.states)
    return found


@torch.no_grad()
def _states(captions: list[str], encode: Callable[[list[str]], States]) -> dict[str, Tensor]:
    parts = [encode(captions[i : i + 64]) for i in range(0, len(captions), 64)]
    found = {"states": torch.cat([states.to("cpu", torch.float16) for states, _ in parts])}
    vectors = [vector.to("cpu", torch.float16) for _, vector in parts if vector is not None]
    return found | ({"vector": torch.cat(vectors)} if vectors else {})


def _joined(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as bytes one behind the other, and where each ends."""
    encoded = [text.encode() for text in texts]
    ends = torch.tensor([len(text) for text in encoded]).cumsum(0)
    return torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), ends


def _about(dataset: ShardDataset, encoders: Encoders) -> dict[str, Any]:
    config, tokenize = dataset.config, dataset.tokenize
    probe = hashlib.sha256(str(tokenize([_PROBE]).tolist()).encode()).hexdigest()[:16] if tokenize else ""
    return {
        "autoencoder": encoders.model,
        "size": 0 if config.buckets else config.size,
        "buckets": config.buckets,
        "crop": config.crop,
        "crops": encoders.crops,
        "flip": config.flip,
        "captions": config.captions,
        "tokenizer": probe,
        "text": encoders.text,
    }


def _homes(dataset: ShardDataset, encoders: Encoders, cache: str | Path) -> list[Path]:
    """The folder in which the encodings of each shard lie."""
    paths = dataset.shards.paths
    if str(cache) != BESIDE:
        return [Path(cache)] * len(paths)
    if remote := [path for path in paths if isinstance(path, str)]:
        raise UserError(f"nothing can be kept beside {remote[0]!r}: name a folder with --cache DIR")
    key = {name: value for name, value in _about(dataset, encoders).items() if name not in ("text", "crops")}
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return [Path(path).parent / f"latents-{mark}" for path in paths]


def _known(home: Path) -> dict[str, Any]:
    path = home / ABOUT
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{str(path)!r} is broken: remove the folder and run scripts/precompute.py again") from None


def _claim(home: Path, about: dict[str, Any]) -> None:
    """Make the folder a cache of this, or find that it is."""
    known = _known(home)
    for name, value in about.items():
        if known and known.get(name) != value:
            raise UserError(
                f"cache {str(home)!r} was made with {name} {known.get(name)!r}, not {value!r}: give another folder, or "
                "remove it and run scripts/precompute.py again"
            )
    try:
        if not known:
            write_json(home / ABOUT, about)
    except OSError as error:
        raise UserError(f"cannot write to {str(home)!r} ({error.strerror}): name a folder by --cache DIR") from None


def _path(home: Path, entry: Entry) -> Path:
    shard = json.dumps([entry.name, entry.samples, entry.bytes, entry.sha256])
    return home / f"{Path(entry.name).stem}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}.safetensors"


def _whole(path: Path) -> bool:
    """Whether a file is there, not cut short, and has digests."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return f"{_SUMS}rest" in file.keys()  # noqa: SIM118 (it is no dict)
    except (FileNotFoundError, SafetensorError):
        return False


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors and their digests."""
    from safetensors.torch import save_file

    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    for name in [name for name in arrays if _depth(name)]:
        rows = arrays[name].reshape(-1, *arrays[name].shape[_depth(name) :])
        sums = b"".join(hashlib.sha256(row).digest() for row in rows)
        arrays[_SUMS + name] = np.frombuffer(sums, np.uint8).reshape(*arrays[name].shape[: _depth(name)], 32)
    arrays[f"{_SUMS}rest"] = np.frombuffer(_sum_of_rest(arrays), np.uint8)
    with replacing(path) as temporary:
        save_file({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, temporary)


def _depth(name: str) -> int:
    return _RECORDS.get(name.partition(".")[0], 0)


def _sum_of_rest(arrays: dict[str, NDArray[Any]]) -> bytes:
    """Of all that is not checked by record, and of the forms of the rest."""
    found = hashlib.sha256()
    for name in sorted(name for name in arrays if not name.startswith(_SUMS)):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        if not _depth(name):
            found.update(np.ascontiguousarray(arrays[name]).data)
    return found.digest()
