"""Buckets and mixtures: exact shares, each sample once in each of its epochs, from the position alone."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.mixing import Buckets, Mixture, proportions, turns
from ldm.data.order import Order
from ldm.errors import UserError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def orders(sizes: list[int], seed: int = 3) -> list[Order]:
    """An order of each size, over two shards, numbered one behind the other."""
    ends = np.cumsum(sizes)
    return [
        Order([n // 2, n - n // 2], seed, readers=2, window=5, firsts=np.array([e - n, e - n + n // 2]))
        for n, e in zip(sizes, ends, strict=True)
    ]


def part(sizes: list[int], rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


@given(SIZES, st.integers(1, 12), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_batches_of_one_size_and_every_sample_as_often(sizes, batch, epochs):
    """After e epochs a sample has come e times, and those that wait for a full batch at most once less."""
    buckets = Buckets(orders(sizes), batch, 7)
    rows = buckets.rows(np.arange(buckets.end(epochs)))
    for start in range(0, len(rows), batch):
        assert len(set(part(sizes, rows[start : start + batch]))) == 1
    counts = Counter(rows.tolist())
    for k, size in enumerate(sizes):
        mine = [counts[row] for row in range(sum(sizes[:k]), sum(sizes[: k + 1]))]
        assert sum(mine) == epochs * size // batch * batch
        assert max(mine) <= epochs
        assert sum(epochs - n for n in mine) == epochs * size % batch
    assert buckets.leftovers == sum(size % batch for size in sizes)


@given(SIZES, st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 2**40))
@settings(deadline=None, max_examples=40)
def test_a_batch_is_known_without_those_before(sizes, batch, start, seed):
    buckets = Buckets(orders(sizes), batch, seed)
    positions = np.arange(start * batch, (start + 3) * batch)
    copy = pickle.loads(pickle.dumps(buckets))
    assert np.array_equal(copy.rows(positions[::-1])[::-1], buckets.rows(positions))


def test_buckets_are_mixed_anew_in_each_epoch():
    buckets = Buckets(orders([400, 200, 200]), 4, 1)
    batches = np.array([buckets.turn(number)[0] for number in range(800)]).reshape(4, 200)
    assert (np.bincount(batches[0]) == [100, 50, 50]).all()
    assert len({tuple(epoch) for epoch in batches.tolist()}) == 4
    half = np.bincount(batches[0][:100])
    assert (abs(half - [50, 25, 25]) <= 2).all()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7))
@settings(deadline=None, max_examples=80)
def test_shares_are_exact_within_one(weights):
    slots = turns(weights)
    share = np.array(weights) / sum(weights)
    counts = np.cumsum(slots[:, None] == np.arange(len(weights)), 0)
    ideal = np.arange(1, len(slots) + 1)[:, None] * share
    assert abs(counts - ideal).max() <= 1 + 1e-9
    assert counts[-1].tolist() == weights


@given(SIZES, st.data(), st.sampled_from([1, 4]))
@settings(deadline=None, max_examples=40)
def test_each_source_has_its_own_epochs(sizes, data, unit):
    weights = [data.draw(st.integers(1, 9)) for _ in sizes]
    streams = orders(sizes)
    mixture = Mixture(streams, weights, unit)
    positions = np.arange(unit * (2 * sum(weights) + 5))
    rows = mixture.rows(positions)
    for k, stream in enumerate(streams):
        mine = rows[part(sizes, rows) == k]
        assert np.array_equal(mine, stream.rows(np.arange(len(mine))))
    picked = np.array(data.draw(st.lists(st.integers(0, len(positions) - 1), min_size=1)))
    assert np.array_equal(mixture.rows(picked), rows[picked])
    end = mixture.end(2)
    taken = Counter(part(sizes, mixture.rows(np.arange(end + unit))).tolist())
    over = [k for k, size in enumerate(sizes) if taken[k] > 2 * size // unit * unit]
    assert len(over) == 1  # one slot more, and one source would begin a third epoch


def test_a_mixture_of_buckets_keeps_batches_of_one_size():
    one, two = Buckets(orders([9, 14, 30]), 4, 1), Buckets(orders([8, 8]), 4, 1)
    mixture = Mixture([one, two], [3, 1], unit=4)
    for start in range(0, 400, 4):
        rows = mixture.rows(np.arange(start, start + 4))
        assert any(len(set(part(sizes, rows))) == 1 for sizes in ([9, 14, 30], [8, 8]))


@pytest.mark.parametrize(
    "texts, whole", [(["0.7", "0.3"], [7, 3]), (["2", "4"], [1, 2]), (["1", "0.25", "1/2"], [4, 1, 2])]
)
def test_weights_as_typed(texts, whole):
    assert proportions(texts) == whole


@pytest.mark.parametrize(
    "texts, message", [(["0.5", "0"], "above 0"), (["x"], "above 0"), (["0.12345", "1"], "too fine"), (["-1"], "above")]
)
def test_weights_that_cannot_be(texts, message):
    with pytest.raises(UserError, match=message):
        proportions(texts)
