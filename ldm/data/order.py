"""The order of data: which sample stands at a position of an endless stream, computed and never read.

Position p lies in epoch p // n. There the shards are permuted, dealt to a fixed number of virtual readers, and each
reader's samples are shuffled: fully inside a shard, and by at most WINDOW places along the reader's stream. The readers
then take turns. All of it follows from (seed, epoch) and the shards' counts, so that resuming needs one integer, and
any number of ranks and workers sees the same stream.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
READERS = 64  # so many shards a batch mixes
WINDOW = 4096
_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


class Order:
    """The endless shuffled stream over shards of the given counts."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        if not sum(counts):
            raise ValueError("an order needs at least one sample")
        self.counts, self.seed = tuple(counts), seed % 2**64
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._epoch = functools.lru_cache(2)(self._shuffled)  # a batch may span two epochs

    def __len__(self) -> int:
        """The samples of an epoch."""
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type["Order"], tuple[tuple[int, ...], int]]:
        return Order, (self.counts, self.seed)

    def rows(self, positions: Ints) -> Ints:
        """The sample at each position, numbered from 0 over all the shards in their given order."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), len(self))
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._epoch(int(epoch))[offsets[here]]
        return rows

    def sample(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, index in the shard) of a position."""
        shard, index = locate(self.counts, self.rows(np.array([position])))
        return position // len(self), int(shard[0]), int(index[0])

    def _shuffled(self, epoch: int) -> Ints:
        shards = _permutation(len(self.counts), self.seed, epoch, 0)
        streams = [self._stream(shards[reader::READERS], epoch, reader + 1) for reader in range(READERS)]
        turns = np.concatenate([np.arange(len(stream)) for stream in streams])
        readers = np.repeat(np.arange(READERS), [len(stream) for stream in streams])
        return np.concatenate(streams)[np.lexsort((readers, turns))]

    def _stream(self, shards: Ints, epoch: int, reader: int) -> Ints:
        """What one reader yields: sorting by place + noise moves no sample further than the noise is wide."""
        parts = [
            _permutation(self.counts[s], self.seed, epoch, reader, s + 1) + self._starts[s] for s in shards.tolist()
        ]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        noise = np.random.PCG64([self.seed, epoch, reader]).random_raw(len(rows)) >> np.uint64(11)
        return rows[np.argsort(np.arange(len(rows)) + noise * (WINDOW / 2**53), kind="stable")]


def locate(counts: Sequence[int], rows: Ints) -> tuple[Ints, Ints]:
    """(shard, index in the shard) of samples numbered over all the shards."""
    ends = np.cumsum(counts)
    shards = np.searchsorted(ends, rows, side="right")
    return shards, rows - (ends[shards] - np.asarray(counts)[shards])


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
