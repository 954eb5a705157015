"""Encoded pictures and captions: each is encoded once and then trained on in every epoch.

A cache is a folder: `cache.json` says what it was made with, and each shard has a file of fixed records, which is
mapped, not read: the mean and deviation of the autoencoder's posterior of each view of each picture in fp16, token ids,
SDXL's size values, and text states where they were asked for. A run that would need other encodings is refused; a shard
that has none yet is encoded.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.dataset import Batch, ShardDataset, Tokenize, loader
from ldm.data.loader import Limits
from ldm.data.order import Ints, locate, uniforms
from ldm.data.shards import Entry, Run
from ldm.data.stream import CAPTION, CROP_X, FLIP, Stream
from ldm.errors import UserError
from ldm.files import replacing, write_json

Posterior = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
Encode = Callable[[UInt8[Tensor, "b 3 h w"]], Posterior]  # images in 0..255 -> mean, deviation
States = tuple[Float[Tensor, "b l d"], Float[Tensor, "b v"] | None]
Show = Callable[[int, int], None]
ABOUT = "cache.json"
_EMPTY = "empty.safetensors"
_PROBE = "a photo of 2 red apples, ünlike any other"
_OPEN_FILES = 1024


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

    def __init__(self, dataset: ShardDataset, folder: Path) -> None:
        self.stream: Stream = dataset.stream
        self.limits: Limits = dataset.limits
        self._flip, self._ends = dataset.config.flip, dataset.shards.ends
        self._random = dataset.config.crop == "random"
        self._paths = [_path(folder, entry) for entry in dataset.shards.entries]
        self.about, self.where = dataset.about, dataset.where
        self.empty = _load(folder / _EMPTY) if (folder / _EMPTY).is_file() else None
        self._forget()

    def _forget(self) -> None:
        self._kept = functools.lru_cache(_OPEN_FILES)(self._open)

    def _open(self, shard: int) -> "Kept":
        return Kept(_load(self._paths[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions of the stream."""
        places = np.asarray(positions, np.int64)
        rows, choices = self.stream.rows(places), self.stream.choices(places)
        shards, indices = (part.tolist() for part in locate(self._ends, rows))
        parts = [self._kept(shard) for shard in shards]
        crops = [
            int(x * part.crops(self._flip)) if self._random else 0
            for part, x in zip(parts, choices[:, CROP_X].tolist(), strict=True)
        ]
        mirrored = (choices[:, FLIP] < 0.5) & self._flip
        records = [
            part.latents(index, (2 if self._flip else 1) * crop + int(other))
            for part, index, crop, other in zip(parts, indices, crops, mirrored.tolist(), strict=True)
        ]
        texts = [
            part.caption(index, draw)
            for part, index, draw in zip(parts, indices, choices[:, CAPTION].tolist(), strict=True)
        ]
        latents = torch.from_numpy(np.stack(records))
        batch = Batch(mean=latents[:, 0], std=latents[:, 1], position=torch.from_numpy(places))
        chosen = list(zip(parts, texts, strict=True))
        batch["caption"] = [part.text(number) for part, number in chosen]
        batch["key"] = [part.key(index) for part, index in zip(parts, indices, strict=True)]
        ids = [part.tensors["size_ids"][index, crop] for part, index, crop in zip(parts, indices, crops, strict=True)]
        batch["size_ids"] = torch.from_numpy(np.stack(ids).astype(np.int64))
        for name in ("tokens", "states", "vector"):
            if name in parts[0].tensors:
                batch[name] = torch.from_numpy(np.stack([part.tensors[name][number] for part, number in chosen]))
        return batch


class Kept:
    """The records of one shard."""

    def __init__(self, tensors: dict[str, NDArray[Any]]) -> None:
        self.tensors = tensors
        self._runs = [tensors[f"latents.{k}"] for k in range(sum(name.startswith("latents.") for name in tensors))]
        self._ends = np.cumsum([len(run) for run in self._runs])
        self._firsts = np.cumsum(tensors["counts"]) - tensors["counts"]

    def crops(self, flip: bool) -> int:
        return self._runs[0].shape[1] // (2 if flip else 1)

    def latents(self, index: int, view: int) -> NDArray[np.float16]:
        """(2, c, h, w): mean and deviation of a view."""
        if len(self._runs) == 1:
            return self._runs[0][index, view]
        run = int(np.searchsorted(self._ends, index, "right"))
        return self._runs[run][index - int(self._ends[run]), view]  # counted from the run's end

    def caption(self, index: int, draw: float) -> int:
        """The number of the caption that a draw from [0, 1) chooses for a picture."""
        return int(self._firsts[index] + int(draw * self.tensors["counts"][index]))

    def text(self, number: int) -> str:
        return _cut(self.tensors["captions"], self.tensors["caption_ends"], number)

    def key(self, index: int) -> str:
        return _cut(self.tensors["keys"], self.tensors["key_ends"], index)


def cached(
    dataset: ShardDataset, encoders: Encoders, folder: str | Path, *, show: Show = lambda done, total: None
) -> CachedDataset:
    """The dataset with its pictures encoded: read from `folder` what lies there, else encoded and written.

    UserError for a folder that was made with anything else than these encoders and the dataset's transform.
    """
    fill(dataset, encoders, folder, show=show)
    return CachedDataset(dataset, Path(folder))


def kept_with(folder: str | Path) -> dict[str, Any]:
    """What a cache was made with; empty where there is none. UserError for a file that does not say."""
    path = Path(folder) / ABOUT
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{str(path)!r} is broken: remove the folder and run scripts/precompute.py again") from None


def fill(
    dataset: ShardDataset,
    encoders: Encoders,
    folder: str | Path,
    *,
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
    show: Show = lambda done, total: None,
) -> None:
    """Encode what is missing in `folder`; each shard is whole there or not at all.

    share: (rank, world), to do the rank-th of every `world` shards. `show(done, total)` is called after each batch with
    numbers of pictures. UserError as in `cached`.
    """
    folder = Path(folder)
    config = dataset.config
    if config.crop == "random" and encoders.crops == 1:
        raise UserError(
            "latents of data.crop random are kept as several crops: run scripts/precompute.py with --crops first"
        )
    _claim(folder, _about(dataset, encoders))
    rank, world = share
    mine = [shard for shard, count in enumerate(dataset.shards.counts) if shard % world == rank and count]
    missing = [shard for shard in mine if not _whole(_path(folder, dataset.shards.entries[shard]))]
    done, total = 0, sum(dataset.shards.counts[shard] for shard in missing)
    for shard in missing:
        tensors: dict[str, Tensor] = {}
        runs = [run for run in dataset.runs if run.shard == shard]
        facts = _Facts([], [], [])
        for k, run in enumerate(runs):
            parts = []
            for latents in _encoded(dataset, run, encoders, batch_size, facts):
                parts.append(latents)
                done += len(latents)
                show(done, total)
            tensors[f"latents.{k}"] = torch.cat(parts)
        tensors |= _texts(facts, dataset.tokenize, encoders)
        _save(_path(folder, dataset.shards.entries[shard]), tensors)
    if encoders.states and rank == 0:
        _save(folder / _EMPTY, _states([""], encoders.states))


class _Facts(NamedTuple):
    """What is known of the pictures of a shard besides their latents."""

    captions: list[list[str]]
    keys: list[str]
    size_ids: list[Any]


@dataclass(frozen=True)
class _Views:
    """Each picture of a run `crops` times, with all its captions."""

    dataset: ShardDataset
    run: Run
    crops: int

    @property
    def limits(self) -> Limits:
        return Limits(self.dataset.limits.patience, self.dataset.limits.damaged)

    def __len__(self) -> int:
        return self.run.samples * self.crops

    def __getitems__(self, positions: Sequence[int]) -> Any:
        rows = self.run.first + np.asarray(positions, np.int64) // self.crops
        corners = np.full((len(rows), 2), 0.5)
        if self.crops > 1:
            corners = uniforms(0, rows * self.crops + np.asarray(positions) % self.crops, 2)
        problems: list[str] = []
        images, views = self.dataset.views(rows.tolist(), corners.tolist(), problems)
        return {"image": images, "views": views, "problems": problems}


@torch.no_grad()
def _encoded(dataset: ShardDataset, run: Run, encoders: Encoders, batch_size: int, facts: _Facts) -> Iterator[Tensor]:
    """(b, views, 2, c, h, w) of the pictures of a run, and what is known of them."""
    crops = encoders.crops if dataset.config.crop == "random" else 1
    source = _Views(dataset, run, crops)
    step = max(1, batch_size // crops) * crops
    for batch in loader(source, step, stop=len(source), workers=dataset.config.workers):
        views: Any = batch["views"]  # type: ignore[typeddict-item]
        image = batch["image"]
        mirrored = [image, image.flip(-1)] if dataset.config.flip else [image]
        pairs = torch.stack([torch.stack(encoders.encode(one), 1).to("cpu", torch.float16) for one in mirrored], 1)
        if not torch.isfinite(pairs).all():
            raise UserError(f"the latents of {views[0].key!r} and on are not finite: check the autoencoder")
        for view in views[::crops]:
            facts.captions.append(view.captions)
            facts.keys.append(view.key)
        facts.size_ids.extend([view.size_ids for view in views[i : i + crops]] for i in range(0, len(views), crops))
        yield pairs.reshape(len(views) // crops, -1, *pairs.shape[2:])


def _texts(facts: _Facts, tokenize: Tokenize | None, encoders: Encoders) -> dict[str, Tensor]:
    captions = [caption for options in facts.captions for caption in options]
    found = {
        "counts": torch.tensor([len(options) for options in facts.captions]),
        "size_ids": torch.tensor(facts.size_ids, dtype=torch.int32),
    }
    found["captions"], found["caption_ends"] = _joined(captions)
    found["keys"], found["key_ends"] = _joined(facts.keys)
    if tokenize:
        found["tokens"] = torch.cat([tokenize(captions[i : i + 1024]) for i in range(0, len(captions), 1024)])
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


def _cut(data: NDArray[np.uint8], ends: Ints, number: int) -> str:
    return data[ends[number - 1] if number else 0 : ends[number]].tobytes().decode()


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


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder this cache, or find that it is."""
    known = kept_with(folder)
    for name in about:
        if known and known.get(name) != about[name]:
            raise UserError(
                f"cache {str(folder)!r} was made with {name} {known.get(name)!r}, not {about[name]!r}: give another "
                "folder, or remove it and run scripts/precompute.py again"
            )
    if not known:
        write_json(folder / ABOUT, about)


def _path(folder: Path, entry: Entry) -> Path:
    shard = json.dumps([entry.name, entry.samples, entry.bytes, entry.sha256])
    return folder / f"{Path(entry.name).stem}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}.safetensors"


def _whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file, mapped."""
    from safetensors.torch import load_file

    return {name: tensor.numpy() for name, tensor in load_file(path).items()}
