"""Batches of pictures and captions from shards: a map-style dataset over the positions of the stream of `order`.

The item at a position is a pure function of (seed, position): which sample, which of its captions, crop and flip. A
training run that keeps the number of samples it has consumed can go on from there, on any number of ranks and workers.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.images import decode, square
from ldm.data.order import Ints, Order, locate, uniforms
from ldm.data.shards import Damaged, Shards
from ldm.errors import UserError

CAPTION, FLIP, CROP_X, CROP_Y = range(4)  # the random numbers of a position, in this order
Tokenize = Callable[[list[str]], Int[Tensor, "b l"]]


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are shown.

    shards, validation: brace ranges, joined by `::`, or folders; size: pixels a side; crop: which square of a picture
    that is not one; flip: mirror half of the pictures; seed: of the order, captions, crops and flips; workers:
    processes that decode, 0 for the training process itself.
    """

    shards: str
    validation: str = ""
    size: int = 128
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    seed: int = 0
    workers: int = 2


class Batch(TypedDict, total=False):
    """What a dataset yields: `image`, or `mean` and `std` of its latent; `tokens` where a tokenizer was given."""

    image: UInt8[Tensor, "b 3 h w"]
    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]
    tokens: Int[Tensor, "b l"]
    caption: list[str]
    key: list[str]
    position: Int[Tensor, " b"]


@runtime_checkable
class Dataset(Protocol):
    """Samples at positions of a stream; `len` is one epoch."""

    def __len__(self) -> int: ...
    def __getitems__(self, positions: Sequence[int]) -> Batch: ...


@runtime_checkable
class Stream(Protocol):
    """What stands at each position: which sample of all those in the shards, and the four numbers of its choices."""

    def rows(self, positions: Ints) -> Ints: ...
    def choices(self, positions: Ints) -> NDArray[np.float64]: ...


class Shuffled(Order):
    """The endless training stream: shuffled anew in each epoch, with choices keyed by (seed, position)."""

    def choices(self, positions: Ints) -> NDArray[np.float64]:
        return uniforms(self.seed, positions, 4)


@dataclass(frozen=True)
class InTurn:
    """Every sample in the order of the shards, with its first caption, not mirrored, cropped at the centre."""

    length: int

    def rows(self, positions: Ints) -> Ints:
        return np.asarray(positions, np.int64) % self.length

    def choices(self, positions: Ints) -> NDArray[np.float64]:
        return np.tile([0.0, 1.0, 0.5, 0.5], (len(positions), 1))


class TokenMemo:
    """Caption -> token ids, each distinct caption tokenised once in this process."""

    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize, self._known = tokenize, dict[str, Tensor]()

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "b l"]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        for start in range(0, len(new), 1024):
            part = new[start : start + 1024]
            self._known.update(zip(part, self._tokenize(part), strict=True))
        return torch.stack([self._known[caption] for caption in captions])


class ShardDataset:
    """Pictures decoded from shards. Damaged, naming shard and key, for a sample that cannot be read."""

    def __init__(self, shards: Shards, stream: Stream, config: DataConfig, tokenize: Tokenize | None = None) -> None:
        self.shards, self.stream, self.config = shards, stream, config
        self.tokenize = TokenMemo(tokenize) if tokenize else None

    def __len__(self) -> int:
        return sum(self.shards.counts)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions of the stream: images (b, 3, size, size) in 0..255."""
        places = np.asarray(positions, np.int64)
        numbers = self.stream.choices(places)
        if self.config.crop == "center":
            numbers[:, CROP_X:] = 0.5
        shards, indices = locate(self.shards.counts, self.stream.rows(places))
        images = np.empty((len(places), self.config.size, self.config.size, 3), np.uint8)
        captions, keys = [], []
        for i, (shard, index) in enumerate(zip(shards.tolist(), indices.tolist(), strict=True)):
            picture = square(self._decode(shard, index), self.config.size, *numbers[i, CROP_X:])
            images[i] = np.asarray(picture)
            options = self.shards.describe(shard, index)["captions"]
            captions.append(options[int(numbers[i, CAPTION] * len(options))])
            keys.append(self.shards.samples(shard)[index].key)
        if self.config.flip:
            mirrored = numbers[:, FLIP] < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        batch = Batch(image=image, caption=captions, key=keys, position=torch.from_numpy(places))
        if self.tokenize:
            batch["tokens"] = self.tokenize(captions)
        return batch

    def _decode(self, shard: int, index: int) -> Any:
        data = self.shards.image(shard, index)
        try:
            return decode(data)
        except ValueError as error:
            key, path = self.shards.samples(shard)[index].key, str(self.shards.paths[shard])
            raise Damaged(f"sample {key!r} of shard {path!r}: {error}") from None


def open_dataset(config: DataConfig, tokenize: Tokenize | None = None) -> ShardDataset:
    """The training stream: shuffled, epoch after epoch. UserError for shards that are missing or not shards."""
    shards = Shards(config.shards)
    return ShardDataset(shards, Shuffled(shards.counts, config.seed), config, tokenize)


def open_validation(config: DataConfig, tokenize: Tokenize | None = None) -> ShardDataset:
    """The pictures of `config.validation`. UserError where there are none."""
    if not config.validation:
        raise UserError("no validation shards: give --data.validation a range such as 'data/val/{00000..00001}.tar'")
    shards = Shards(config.validation)
    return ShardDataset(shards, InTurn(sum(shards.counts)), config, tokenize)


def to_image(image: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Bytes 0..255 as floats in [-1, 1], on the same device."""
    return image.float() / 127.5 - 1


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of `batch_size` over all ranks, from position `start` (the samples consumed so far) to before `stop`.

    A rank gets its own `batch_size / world` positions of each batch; the last batch may be short, and is left out on a
    rank that would get none of it. Without a stop there is no end. The workers change nothing but the speed.
    ValueError for a batch that the ranks cannot share evenly.
    """
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world} processes")
    positions = _Positions(batch_size, start, stop, rank, world)
    batches: DataLoader[Any] = DataLoader(
        _Quiet(dataset),  # type: ignore[arg-type]
        batch_sampler=positions,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Positions:
    """The lists of positions that one rank reads."""

    batch_size: int
    start: int
    stop: int | None
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        for first in itertools.count(self.start, self.batch_size):
            if self.stop is not None and first >= self.stop:
                return
            last = first + (self.rank + 1) * share
            mine = list(range(last - share, last if self.stop is None else min(last, self.stop)))
            if mine:
                yield mine


@dataclass(frozen=True)
class _Quiet:
    """Hands a UserError back as the batch: a worker process would bury its one line in a traceback."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Sequence[int]) -> Batch | UserError:
        try:
            return self.dataset.__getitems__(positions)
        except UserError as error:
            return error


def _same(batch: Any) -> Any:
    return batch
