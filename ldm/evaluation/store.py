"""What was computed of many pictures: in chunks, each a file, by any number of processes, and never twice.

A chunk is named by what it was made from: a run that was stopped goes on, with as many processes as there are then.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor

from ldm import config
from ldm.checkpoints.files import save
from ldm.data.images import decode, square
from ldm.data.sources import Raw, open_sources
from ldm.errors import UserError
from ldm.images import to_pixels
from ldm.jobs import batches
from ldm.pipeline import Pipeline
from ldm.recipe import Request
from ldm.recipe import read as read_recipe

Pixels = UInt8[Tensor, "b 3 h w"]


def key(*parts: Any) -> str:
    """A name for what is made from these values and nothing else."""
    text = json.dumps(config.to_dict(list(parts)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """Chunks in a folder. rank and world: which of how many processes this is; wait: a barrier of all of them."""

    folder: Path
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    chunk: int = 16

    def make(self, name: str, total: int, compute: Callable[[range], dict[str, Tensor]]) -> list[Path]:
        """The files of all chunks, of which those that are missing are computed, each by one of the processes."""
        parts = [range(start, min(start + self.chunk, total)) for start in range(0, total, self.chunk)]
        chunks = {self.folder / name / f"{part.start:06d}-{part.stop:06d}.safetensors": part for part in parts}
        for path, part in list(chunks.items())[self.rank :: self.world]:
            if not path.is_file():
                save(path, compute(part), {})
        self.wait()
        return list(chunks)

    def rows(self, name: str, total: int, compute: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of all chunks, joined, without pictures."""
        parts = [load_file(path) for path in self.make(name, total, compute)]
        return {k: torch.cat([part[k] for part in parts]) for k in parts[0] if k != "pixels"}


class Found:
    """Ready pictures: of a folder, a parquet file or shards, cut to squares of `size`, 0 for that of the first.

    n: at most so many, spread evenly. A PNG of ours says what was asked. UserError for a picture that cannot be read.
    """

    def __init__(self, path: str, size: int = 0, n: int | None = None) -> None:
        (self._source,) = open_sources([path])
        total = len(self._source.ids())
        self.rows = range(total) if n is None or n >= total else [i * total // n for i in range(n)]
        raw = [self._sound(one) for one in self._source.read(self.rows)]
        if not raw:
            raise UserError(f"{path!r} holds no pictures")
        self.columns, files = [one.columns for one in raw], self._source.ids()
        self.size = size or min(decode(raw[0].image).size)
        self.name = key("found", self._source.stamp(), [hashlib.sha256(r.image).hexdigest() for r in raw], self.size)
        self.texts = [_text(one.columns, Path(path, files[i])) for one, i in zip(raw, self.rows, strict=True)]

    def captions(self, n: int) -> list[str]:
        """n captions: of as many pictures, spread evenly; of more than there are, each one's first, then its second."""
        of = [one["captions"] or [text] for one, text in zip(self.columns, self.texts, strict=True)]
        of = [of[i * len(of) // n] for i in range(n)] if 0 < n < len(of) else of
        wanted = (of[i % len(of)][i // len(of) % len(of[i % len(of)])] for i in range(n))
        return [text for text in wanted if text]

    def read(self, rows: Sequence[int]) -> Pixels:
        raw = map(self._sound, self._source.read([self.rows[i] for i in rows]))
        pictures = [np.asarray(square(decode(one.image), self.size)) for one in raw]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def _sound(self, raw: Raw | UserError) -> Raw:
        if isinstance(raw, UserError):
            raise raw
        return raw


def _text(columns: dict[str, Any], file: Path) -> str:
    if columns["captions"]:
        return str(columns["captions"][0])
    try:
        return read_recipe(file).request.prompt
    except UserError:
        return ""


@dataclass(frozen=True)
class Kept:
    """Pictures that lie in the chunks of a store."""

    name: str
    texts: Sequence[str]
    paths: Sequence[Path]
    chunk: int

    def read(self, rows: Sequence[int]) -> Pixels:
        chunks = {number: load_file(self.paths[number])["pixels"] for number in {row // self.chunk for row in rows}}
        return torch.stack([chunks[row // self.chunk][row % self.chunk] for row in rows])


Pictures = Found | Kept  # by number, with what each was asked or is said to show; `name` changes when they do


def paint(painter: Pipeline, requests: Sequence[Request], store: Store) -> Kept:
    """Pictures that a model paints; those of a chunk are one batch."""
    requests = [painter.complete(request) for request in requests]
    made = painter.made

    def compute(part: range) -> dict[str, Tensor]:
        pixels = [
            to_pixels(painter.txt2img(*batch.requests)[batch.rows])
            for batch in batches(requests[part.start : part.stop], store.chunk)
        ]
        return {"pixels": torch.cat(pixels).permute(0, 3, 1, 2)}

    name = key("painted", made.model_hash, made.vae, made.precision, requests, store.chunk)
    texts = [request.prompt for request in requests]
    return Kept(name, texts, store.make(name, len(requests), compute), store.chunk)
