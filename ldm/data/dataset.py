"""Batches of pictures and captions from shards: a map-style dataset over the positions of a stream.

The item at a position is a pure function of (seed, position) and the files: sample, caption, crop and flip. A run goes
on from the number of samples it has consumed, on any number of ranks and workers.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL.Image import Image
from torch import Tensor

from ldm.data.folders import with_shards
from ldm.data.images import finish, planes, square, start
from ldm.data.loader import Batch as Batch
from ldm.data.loader import Dataset as Dataset
from ldm.data.loader import Limits
from ldm.data.loader import loader as loader
from ldm.data.mixing import Buckets
from ldm.data.order import locate
from ldm.data.remote import Cache
from ldm.data.shards import Run, Shards
from ldm.data.stream import CAPTION, CROP_X, FLIP, InTurn, Shuffled, Stream, for_each, shuffled, sources
from ldm.data.stream import DataConfig as DataConfig
from ldm.data.tars import Damaged
from ldm.errors import UserError

Tokenize = Callable[[list[str]], Int[Tensor, "b l"]]
_NONE = np.empty((3, 0, 0), np.uint8)
_MEMO = 100_000  # captions whose tokens are kept
_TRIES = 1000  # samples that may stand in for a damaged one


class TokenMemo:
    """Caption -> token ids; those of the captions seen last are kept in this process."""

    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize, self._known = tokenize, dict[str, Tensor]()

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "b l"]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if len(self._known) > _MEMO:
            self._known, new = {}, list(dict.fromkeys(captions))
        for first in range(0, len(new), 1024):
            part = new[first : first + 1024]
            self._known.update(zip(part, self._tokenize(part), strict=True))
        return torch.stack([self._known[caption] for caption in captions])


class View(NamedTuple):
    """One sample as it is shown."""

    pixels: UInt8[np.ndarray, "3 h w"]
    size_ids: list[int]
    captions: list[str]
    key: str


class ShardDataset:
    """Pictures decoded from shards.

    For a damaged sample stands the one at the same place of the next shard of its source (and its size), and so on;
    once around, the one behind it: a pure function of the files. With max_damaged 0 it is Damaged, with shard and key.
    """

    def __init__(
        self,
        shards: Shards,
        stream: Stream,
        config: DataConfig,
        tokenize: Tokenize | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        self.shards, self.stream, self.config = shards, stream, config
        self.limits = limits or Limits(config.patience, config.max_damaged)
        self.tokenize = TokenMemo(tokenize) if tokenize else None
        self.columns = [name.strip() for name in for_each("captions", config.captions, ",", 1 + max(shards.sources))]

    def __len__(self) -> int:
        return int(self.shards.ends[-1])

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions of the stream: images (b, 3, h, w) in 0..255."""
        places = np.asarray(positions, np.int64)
        numbers = self.stream.choices(places)
        if self.config.crop == "center":
            numbers[:, CROP_X:] = 0.5
        problems: list[str] = []
        images, views = self.views(self.stream.rows(places).tolist(), numbers[:, CROP_X:].tolist(), problems)
        mirrored = torch.from_numpy((numbers[:, FLIP] < 0.5) & self.config.flip)
        if mirrored.any():
            images[mirrored] = images[mirrored].flip(-1)
        drawn = zip(views, numbers[:, CAPTION], strict=True)
        captions = [view.captions[int(draw * len(view.captions))] for view, draw in drawn]
        batch = Batch(
            image=images,
            size_ids=torch.tensor([view.size_ids for view in views]),
            caption=captions,
            key=[view.key for view in views],
            position=torch.from_numpy(places),
        )
        if self.tokenize:
            batch["tokens"] = self.tokenize(captions)
        if problems:
            batch["problems"] = problems
        return batch

    def about(self) -> str:
        """One line for a person."""
        text = f"{len(self)} pictures in {len(self.shards.paths)} shards"
        order = self.stream.order if isinstance(self.stream, Shuffled) else None
        if not isinstance(order, Buckets):
            return text
        left = f"{order.leftovers} of an epoch fill no batch of {order.batch}: they come first in the next"
        return f"{text} of {len(order.sizes)} sizes; {left}"

    def where(self, positions: Sequence[int]) -> list[str]:
        """The shards that hold these positions."""
        shards, _ = locate(self.shards.ends, self.stream.rows(np.asarray(positions, np.int64)))
        return [str(self.shards.paths[shard]) for shard in np.unique(shards).tolist()]

    def row(self, row: int, x: float = 0.5, y: float = 0.5) -> View:
        """The sample of a number over all shards. Damaged where it cannot be read."""
        run = self._run(row)
        sample = self.shards.sample(run.shard, row - int(self.shards.ends[run.shard]) + self.shards.counts[run.shard])
        columns = sample.columns()
        captions = sample.captions(columns, self.columns[self.shards.sources[run.shard]])
        try:
            picture, full = decode_for(sample.image, 0 if self.config.buckets else self.config.size)
        except ValueError as error:
            raise error if isinstance(error, Damaged) else Damaged(f"{sample.place}: {error}") from None
        if self.config.buckets:
            if (found := f"{picture.width}x{picture.height}") != run.size:
                raise Damaged(f"{sample.place} has {found} pixels, its manifest says {run.size}")
            ids = _size_ids(columns, picture.size, 1.0, (0, 0), picture.size)
        else:
            size, side = self.config.size, min(full)
            corner = round((full[0] - side) * x), round((full[1] - side) * y)
            ids = _size_ids(columns, full, size / side, corner, (size, size))
            picture = square(picture, size, x, y)
        return View(planes(picture), ids, captions, sample.key)

    def views(
        self, rows: Sequence[int], corners: Sequence[Sequence[float]], problems: list[str]
    ) -> tuple[UInt8[Tensor, "b 3 h w"], list[View]]:
        """The pictures of some rows, and the rest of each `view`. Kept one by one they would cost new pages each."""
        images, found = np.empty(0, np.uint8), list[View]()
        for i, (row, corner) in enumerate(zip(rows, corners, strict=True)):
            view = self.view(row, problems, *corner)
            if not i:
                images = np.empty((len(rows), *view.pixels.shape), np.uint8)
            if view.pixels.shape != images.shape[1:]:
                raise UserError(f"samples {rows[0]} and {row} have pictures of several sizes, and are one batch")
            images[i] = view.pixels
            found.append(view._replace(pixels=_NONE))
        return torch.from_numpy(images), found

    def view(self, row: int, problems: list[str], x: float, y: float) -> View:
        """The sample of a number, or the one that stands in for it; `problems` then says why."""
        try:
            return self.row(row, x, y)
        except Damaged as error:
            if not self.config.max_damaged:
                raise
            first = str(error)
        problems.append(first)
        run, sources = self._run(row), self.shards.sources
        alike = [one for one in self.runs if (sources[one.shard], one.size) == (sources[run.shard], run.size)]
        place, inside = alike.index(run), row - run.first
        for attempt in range(1, _TRIES):
            around, turn = divmod(place + attempt, len(alike))
            other = alike[turn]
            try:
                return self.row(other.first + (inside + around) % other.samples, x, y)
            except Damaged:
                continue
        raise Damaged(f"{first}, and none of {_TRIES} others can stand in for it")

    @cached_property
    def runs(self) -> list[Run]:
        """What stands behind what: shards, or where they have buckets, the parts of one size."""
        return [run for run in self.shards.runs(self.config.buckets) if run.samples]

    def _run(self, row: int) -> Run:
        return self.runs[bisect.bisect_right(self.runs, row, key=lambda run: run.first) - 1]


def open_dataset(config: DataConfig, tokenize: Tokenize | None = None, *, batch: int = 1) -> ShardDataset:
    """The training stream: shuffled, epoch after epoch; with buckets, `batch` positions in a row have one size.

    UserError for shards that are missing or not shards, and for a mixture or a cache that cannot work.
    """
    shards = _open_shards([source.pattern for source in sources(config.shards)], config)
    stream = shuffled(shards, config, batch)
    if config.epochs < 0 or config.readers < 1 or config.window < 0:
        raise UserError("data.epochs and data.window must be 0 or more, data.readers 1 or more")
    end = stream.order.end(config.epochs) if config.epochs else None
    limits = Limits(config.patience, config.max_damaged, end, batch if config.buckets else 0)
    return ShardDataset(shards, stream, config, tokenize, limits=limits)


def open_validation(config: DataConfig, tokenize: Tokenize | None = None) -> ShardDataset:
    """The pictures of `config.validation`, as squares; none may be damaged. UserError where there are none."""
    if not config.validation:
        raise UserError("no validation shards: give --data.validation a range such as 'data/val/{00000..00001}.tar'")
    config = replace(config, max_damaged=0, buckets=False)
    shards = _open_shards([source.pattern for source in sources(config.validation)], config)
    return ShardDataset(shards, InTurn(int(shards.ends[-1])), config, tokenize)


def decode_for(data: bytes, size: int) -> tuple[Image, tuple[int, int]]:
    """A picture for a square of `size` pixels, and its own width and height.

    A JPEG is decoded at the smallest scale of 1, 1/2, 1/4, 1/8 that is large enough, which leaves out most of the work;
    with size 0, as it is. ValueError as `finish`.
    """
    image = start(data)
    full = image.size
    if size and "exif" not in image.info:
        scale = size / min(full)
        image.draft(None, (math.ceil(full[0] * scale), math.ceil(full[1] * scale)))  # for other formats it does nothing
        return finish(image), full
    picture = finish(image)
    return picture, picture.size


def to_image(image: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Bytes 0..255 as floats in [-1, 1], on the same device."""
    return image.float() / 127.5 - 1


def _open_shards(patterns: Sequence[str], config: DataConfig) -> Shards:
    if not 0 <= config.max_damaged <= 1:
        raise UserError(f"data.max_damaged {config.max_damaged} is not a share: give 0 to 1, such as 0.01")
    cache = Cache.at(config.copies, config.copies_gb, config.patience)
    shards = Shards(*with_shards(patterns, config), tolerate=config.max_damaged, cache=cache)
    remote = sorted(e.bytes for path, e in zip(shards.paths, shards.entries, strict=True) if isinstance(path, str))
    needed = sum(remote[-config.readers :])
    if needed > cache.limit:
        raise UserError(
            f"{min(len(remote), config.readers)} remote shards are read side by side and need "
            f"{needed / 1e9:.3g} GB: raise data.copies_gb {config.copies_gb:g} or lower data.readers"
        )
    return shards


def _size_ids(
    columns: dict[str, Any], size: tuple[int, int], scale: float, corner: tuple[int, int], target: tuple[int, int]
) -> list[int]:
    """SDXL's six numbers of a crop of a stored picture, which a preparation may have cropped before."""

    def known(name: str, otherwise: int) -> int:
        return value if isinstance(value := columns.get(name), int) else otherwise

    original = known("original_height", size[1]), known("original_width", size[0])
    top, left = known("crop_top", 0) + corner[1], known("crop_left", 0) + corner[0]
    return [*original, round(top * scale), round(left * scale), target[1], target[0]]
