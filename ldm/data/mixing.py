"""Streams made of streams: pictures of several sizes in batches of one, and several sources in given proportions.

Both are computed, as `order` is: which part a batch or a sample is taken from follows from its position alone; every
part is an endless stream of its own, with its own epochs.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from ldm.data.order import Ints, Order, Recent, uniforms
from ldm.errors import UserError

_PERIOD = 10_000  # slots after which a mixture repeats, at most


class Buckets:
    """Every batch of `batch` positions comes from one of the orders, the samples of one size of picture.

    In each epoch an order gives its share of batches, at places that are spread and drawn anew. What does not fill a
    batch (`leftovers`) waits: it begins the order's batches of the next epoch.
    """

    def __init__(self, orders: Sequence[Order], batch: int, seed: int) -> None:
        self.orders, self.batch, self.seed = list(orders), batch, seed
        self.sizes = np.array([len(order) for order in orders], np.int64)
        self._epoch = Recent(self._merged, 2)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def leftovers(self) -> int:
        """Samples of the first epoch that fill no batch."""
        return int((self.sizes % self.batch).sum())

    def end(self, epochs: int) -> int:
        return self._before(epochs) * self.batch

    def rows(self, positions: Ints) -> Ints:
        """The sample at each position, numbered as the orders number them."""
        batches, places = np.divmod(np.asarray(positions, np.int64), self.batch)
        rows = np.empty_like(places)
        for number in np.unique(batches).tolist():
            here = batches == number
            order, turn = self.turn(number)
            rows[here] = self.orders[order].rows(turn * self.batch + places[here])
        return rows

    def turn(self, number: int) -> tuple[int, int]:
        """Which order a batch is taken from, and the how manyth batch of that order it is."""
        epoch = number * self.batch // len(self)
        while self._before(epoch + 1) <= number:
            epoch += 1
        order, turn = self._epoch(epoch)[number - self._before(epoch)].tolist()
        return order, int(epoch * self.sizes[order] // self.batch) + turn

    def _before(self, epoch: int) -> int:
        return int((epoch * self.sizes // self.batch).sum())

    def _merged(self, epoch: int) -> Ints:
        """(n, 2): order and turn of the batches of an epoch; those of one order at random in equal parts of it."""
        shares = ((epoch + 1) * self.sizes // self.batch - epoch * self.sizes // self.batch).tolist()
        parts = [np.arange(share) for share in shares]
        seeds = [self.seed + epoch * len(shares) + k for k in range(len(shares))]
        moments = [
            (part + uniforms(seed, part, 1)[:, 0]) / max(len(part), 1) for part, seed in zip(parts, seeds, strict=True)
        ]
        merged = np.stack([np.repeat(np.arange(len(shares)), shares), np.concatenate(parts)], 1)
        return merged[np.argsort(np.concatenate(moments), kind="stable")]


class Mixture:
    """Several streams in given proportions: at every position, each has had its share to within one slot.

    A slot is one position, or with unit=n a batch of n. Every stream runs through its own epochs.
    """

    def __init__(self, streams: Sequence[Order | Buckets], weights: Sequence[int], unit: int = 1) -> None:
        self.streams, self.weights, self.unit = list(streams), list(weights), unit
        self._which = turns(weights)
        self._places = [np.flatnonzero(self._which == k) for k in range(len(weights))]
        self._turn = np.empty_like(self._which)
        for places in self._places:
            self._turn[places] = np.arange(len(places))

    def __len__(self) -> int:
        return sum(len(stream) for stream in self.streams)

    def end(self, epochs: int) -> int:
        """The first position at which a stream would begin another epoch than these."""
        ends = []
        for places, stream in zip(self._places, self.streams, strict=True):
            rounds, rest = divmod(stream.end(epochs) // self.unit, len(places))
            ends.append((rounds * len(self._which) + int(places[rest])) * self.unit)
        return min(ends)

    def rows(self, positions: Ints) -> Ints:
        """The sample at each position, numbered as the streams number them."""
        slots, inside = np.divmod(np.asarray(positions, np.int64), self.unit)
        rounds, places = np.divmod(slots, len(self._which))
        rows, which = np.empty_like(slots), self._which[places]
        for k, stream in enumerate(self.streams):
            here = which == k
            if here.any():
                turn = rounds[here] * self.weights[k] + self._turn[places[here]]
                rows[here] = stream.rows(turn * self.unit + inside[here])
        return rows


Rows = Order | Buckets | Mixture  # an endless stream: the sample at each position; `len` is an epoch


def turns(weights: Sequence[int]) -> Ints:
    """Which stream takes each of sum(weights) slots, so that after t slots each took its share of t to within one.

    A slot goes to the most urgent of those whose next turn would not be early (Steiner & Yeomans 1993,
    doi:10.1287/mnsc.39.6.728).
    """
    total, taken, slots = sum(weights), [0] * len(weights), []
    for slot in range(1, total + 1):
        ready = [k for k, weight in enumerate(weights) if taken[k] * total < slot * weight]
        k = min(ready, key=lambda k: -(-(taken[k] + 1) * total // weights[k]))
        taken[k] += 1
        slots.append(k)
    return np.array(slots, np.int64)


def proportions(weights: Sequence[str]) -> list[int]:
    """Weights as typed, such as 0.7 and 0.3, as the smallest whole numbers. UserError for what cannot be a weight."""
    try:
        shares = [Fraction(weight) for weight in weights]
    except (ValueError, ZeroDivisionError):
        shares = [Fraction(0)]
    if min(shares) <= 0:
        raise UserError(f"weights {', '.join(weights)} of a mixture must be numbers above 0, such as a:0.7,b:0.3")
    whole = lcm(*(share.denominator for share in shares))
    numbers = [int(share * whole) for share in shares]
    numbers = [number // int(np.gcd.reduce(numbers)) for number in numbers]
    if sum(numbers) > _PERIOD:
        raise UserError(f"weights {', '.join(weights)} of a mixture are too fine: give two or three digits")
    return numbers
