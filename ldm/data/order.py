"""The order of data: which sample stands at a position of an endless stream, computed and never read.

Position p lies in epoch p // n. There the shards are permuted, dealt to a fixed number of virtual readers, and each
reader's samples are shuffled: fully inside a shard, and by at most `window` places along the reader's stream. The
readers then take turns, those with more samples more often, so that all end together: every part of an epoch holds of
each what the whole does. All follows from (seed, epoch) and the shards' counts: resuming needs one integer, and any
number of ranks and workers sees the same stream. Any part of an epoch is worked out alone, for what the windows hold.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Made = TypeVar("Made")
READERS = 64  # so many shards a batch mixes
WINDOW = 4096
_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


class Recent(Generic[Made]):
    """A method that keeps what it returned for the `size` arguments asked for last; a pickled copy begins anew."""

    def __init__(self, method: Callable[..., Made], size: int) -> None:
        self._from, self._call = (method, size), functools.lru_cache(size)(method)

    def __call__(self, *key: int) -> Made:
        return self._call(*key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, self._from


class Reader(NamedTuple):
    """The shards that a virtual reader goes through in an epoch, and where each begins in its stream."""

    shards: Ints
    starts: Ints

    def __len__(self) -> int:
        return int(self.starts[-1])


class Order:
    """The endless shuffled stream over shards of the given counts.

    readers: shards that are read side by side; window: how far a sample may move along its reader's stream; firsts: the
    number of each shard's first sample, where the shards are some of many.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        *,
        readers: int = READERS,
        window: int = WINDOW,
        firsts: Ints | None = None,
    ) -> None:
        self.counts, self.seed, self.readers, self.window = np.asarray(counts, np.int64), seed % 2**64, readers, window
        starts = np.cumsum(self.counts) - self.counts
        self.firsts = starts if firsts is None else firsts
        self.length = int(self.counts.sum())
        if not self.length:
            raise ValueError("an order needs at least one sample")
        self._size = readers * max(window, 1024)  # rows worked out at a time: few enough to keep, many enough to pay
        self._dealt, self._block = Recent(self._deal, 2), Recent(self._shuffled, 3)  # a batch may span two epochs

    def __len__(self) -> int:
        """The samples of an epoch."""
        return self.length

    def end(self, epochs: int) -> int:
        """The position at which so many epochs are over."""
        return epochs * self.length

    def rows(self, positions: Ints) -> Ints:
        """The sample at each position, numbered from 0 over all the shards in their given order."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.length)
        blocks, places = np.divmod(offsets, self._size)
        rows = np.empty_like(offsets)
        for epoch, block in sorted(set(zip(epochs.tolist(), blocks.tolist(), strict=True))):
            here = (epochs == epoch) & (blocks == block)
            rows[here] = self._block(epoch, block)[places[here]]
        return rows

    def _deal(self, epoch: int) -> list[Reader]:
        shards = _permutation(len(self.counts), self.seed, epoch, 0)
        hands = [shards[reader :: self.readers] for reader in range(self.readers)]
        return [Reader(hand, np.concatenate([[0], np.cumsum(self.counts[hand])])) for hand in hands]

    def _shuffled(self, epoch: int, block: int) -> Ints:
        """The rows at offsets block * size and on: those turns of each reader that touch them, interleaved."""
        readers = self._dealt(epoch)
        lengths = np.array([len(reader) for reader in readers])
        most = int(lengths.max())

        def before(turn: int) -> Ints:  # samples that each reader gives in all the turns before this one
            return -(-lengths * turn // most)

        first, last = block * self._size, min((block + 1) * self._size, self.length) - 1
        turns = range(most + 1)
        start, stop = (bisect.bisect_right(turns, n, key=lambda turn: before(turn).sum()) - 1 for n in (first, last))
        spans = list(zip(before(start).tolist(), before(stop + 1).tolist(), strict=True))
        parts = [self._stream(reader, epoch, i + 1, *spans[i]) for i, reader in enumerate(readers)]
        turns_of = [np.arange(*span) * most // max(n, 1) for span, n in zip(spans, lengths.tolist(), strict=True)]
        which = np.repeat(np.arange(self.readers), [len(part) for part in parts])
        rows = np.concatenate(parts)[np.lexsort((which, np.concatenate(turns_of)))]
        skipped = first - int(before(start).sum())
        return rows[skipped : skipped + last - first + 1].copy()

    def _stream(self, reader: Reader, epoch: int, number: int, start: int, stop: int) -> Ints:
        """Samples start .. stop - 1 of what one reader yields: sorting by place + noise below `window` moves none
        further, so that none from 2 windows off takes part."""
        if start == stop:
            return np.empty(0, np.int64)
        low, high = max(0, start - 2 * self.window), min(len(reader), stop + 2 * self.window)
        first, last = int(np.searchsorted(reader.starts, low, "right")) - 1, int(np.searchsorted(reader.starts, high))
        parts = [
            _permutation(int(self.counts[s]), self.seed, epoch, number, s + 1) + self.firsts[s]
            for s in reader.shards[first:last].tolist()
        ]
        offset = int(reader.starts[first])
        rows = np.concatenate(parts)[low - offset : high - offset]
        bits = np.random.PCG64([self.seed, epoch, number]).advance(low).random_raw(high - low) >> np.uint64(11)
        ranks = np.argsort(np.arange(low, high) + bits * (self.window / 2**53), kind="stable")
        return rows[ranks[start - low : stop - low]]


def locate(ends: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """(shard, index in the shard) of samples numbered over all the shards, which end at these numbers."""
    shards = np.searchsorted(ends, rows, side="right")
    return shards, rows - np.where(shards > 0, ends[shards - 1], 0)


def uniforms(seed: int, positions: Ints, n: int) -> NDArray[np.float64]:
    """(len(positions), n) numbers in [0, 1), a pure function of (seed, position): SplitMix64 (Steele et al. 2014).

    A numpy Generator for each sample would cost 15 us of setting up; this is 20 ns.
    """
    with np.errstate(over="ignore"):
        first: Any = np.asarray(positions, np.uint64)[:, None] * np.uint64(n)
        lanes = first + np.arange(1, n + 1, dtype=np.uint64)
        key = _mix(np.array([seed % 2**64], np.uint64) + _STEP)
        mixed = _mix(lanes * _STEP + key)
    return (mixed >> np.uint64(11)) / 2**53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permutation(n: int, *key: int) -> Ints:
    """A permutation that no numpy version changes: only the raw bits of a bit generator are promised to stay."""
    return np.argsort(np.random.PCG64(list(key)).random_raw(n), kind="stable")
