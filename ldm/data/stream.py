"""What stands at each position of a data stream: one sample, and the random numbers of its caption, flip and crop."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.mixing import Buckets, Mixture, Rows, proportions
from ldm.data.order import READERS, WINDOW, Ints, Order, uniforms
from ldm.data.remote import COPIES
from ldm.data.shards import Run, Shards
from ldm.errors import UserError

CAPTION, FLIP, CROP_X, CROP_Y = range(4)  # the random numbers of a position, in this order


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are shown.

    shards, validation: brace ranges, joined by `::`, or folders, local or as URLs; shards may be a mixture of sources
    in given proportions, `a/{00..19}.tar:0.7,b:0.3`. A local folder may hold plain pictures, with a .txt beside each;
    caption: theirs, in place of those; for each source where they differ (`a zqx dog|a dog`). size: pixels a side;
    crop: which square of a picture that is not one; buckets: batches of one size, those that the shards were prepared
    with, in place of squares. flip: mirror half of the pictures; captions: the column to draw captions from, for each
    source where they differ (`alt,`): empty for the usual one. seed: of the order, captions, crops and flips; epochs:
    the most that any source is shown, 0 for no end. readers: shards that are read side by side; window: how far the
    shuffle moves a sample along each. workers: processes that decode, 0 for the training process itself. max_damaged:
    the share of damaged samples that others may stand in for. patience: seconds to wait for data that does not come.
    copies, copies_gb: where copies of remote shards are kept, and how much of them; shards that were made of plain
    folders lie beside them.
    """

    shards: str
    validation: str = ""
    size: int = 128
    crop: Literal["center", "random"] = "center"
    buckets: bool = False
    flip: bool = False
    captions: str = ""
    caption: str = ""
    seed: int = 0
    epochs: int = 0
    readers: int = READERS
    window: int = WINDOW
    workers: int = 2
    max_damaged: float = 0.01
    patience: float = 300.0
    copies: str = COPIES
    copies_gb: float = 50.0


class Source(NamedTuple):
    """A part of a mixture, as it was typed."""

    pattern: str
    weight: str


def sources(shards: str) -> list[Source]:
    """The parts of `a/{00,01}.tar:0.7,b:0.3`. UserError where some have no weight."""
    found = []
    for part in re.split(r",(?![^{]*})", shards):  # no comma inside braces
        match = re.fullmatch(r"(.*?)(?::(-?[\d./]+))?", part.strip())
        assert match  # all of it is optional
        found.append(Source(match[1], match[2] or ""))
    if len(found) > 1 and not all(source.weight for source in found):
        raise UserError(f"shards {shards!r} are a mixture: give each part a weight, as in a:0.7,b:0.3")
    return found


def for_each(option: str, given: str, mark: str, count: int) -> list[str]:
    """The value of an option for each source: one for all, or as many as there are. UserError for another number."""
    values = given.split(mark)
    if len(values) not in (1, count):
        raise UserError(f"data.{option} {given!r} has {len(values)} parts for {count} sources")
    return values if len(values) == count else values * count


@dataclass(frozen=True)
class Shuffled:
    """The endless training stream: shuffled anew in each epoch, with choices keyed by (seed, position)."""

    order: Rows
    seed: int

    def rows(self, positions: Ints) -> Ints:
        return self.order.rows(positions)

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


Stream = Shuffled | InTurn  # which sample stands at each position, and the four numbers of its choices


def shuffled(shards: Shards, config: DataConfig, batch: int) -> Shuffled:
    """The training stream of a config; with buckets, `batch` positions in a row have one size."""
    parts = sources(config.shards)
    first = [_source(shards, number, config, batch) for number in range(len(parts))]
    if len(parts) == 1:
        return Shuffled(first[0], config.seed)
    weights = proportions([part.weight for part in parts])
    return Shuffled(Mixture(first, weights, batch if config.buckets else 1), config.seed)


def _source(shards: Shards, number: int, config: DataConfig, batch: int) -> Order | Buckets:
    sizes: dict[str, list[Run]] = {}
    for run in shards.runs(config.buckets):
        if shards.sources[run.shard] == number and (run.samples or not config.buckets):
            sizes.setdefault(run.size, []).append(run)
    if not any(run.samples for runs in sizes.values() for run in runs):
        raise UserError(f"shards {sources(config.shards)[number].pattern!r} hold no samples: prepare the data again")
    orders = []
    for k, size in enumerate(sorted(sizes)):
        counts, firsts = [run.samples for run in sizes[size]], np.array([run.first for run in sizes[size]], np.int64)
        seed = config.seed + number + 7919 * k
        orders.append(Order(counts, seed, readers=config.readers, window=config.window, firsts=firsts))
    return Buckets(orders, batch, config.seed + number) if config.buckets else orders[0]
