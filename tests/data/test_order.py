"""The order of data: each sample once an epoch, whatever the layout, from the position alone."""

import pickle
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.order import Order, _permutation, locate, uniforms

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=150).filter(any)


@given(COUNTS, st.integers(0, 2**40), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_an_epoch_holds_each_sample_once(counts, seed, epoch):
    order = Order(counts, seed)
    rows = order.rows(epoch * len(order) + np.arange(len(order)))
    assert sorted(rows) == list(range(sum(counts)))


@given(COUNTS, st.integers(-5, 2**70), st.data())
@settings(deadline=None, max_examples=60)
def test_a_position_says_it_all(counts, seed, data):
    """Asked for alone, in any order, by a copy: a position always holds the same sample."""
    whole = Order(counts, seed).rows(np.arange(3 * sum(counts)))
    positions = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1)))
    assert np.array_equal(pickle.loads(pickle.dumps(Order(counts, seed))).rows(positions), whole[positions])


@given(COUNTS, st.integers(1, 9), st.integers(0, 30), st.integers(20, 300))
@settings(deadline=None, max_examples=40)
def test_a_part_of_an_epoch_is_that_part_of_the_whole(counts, readers, window, size):
    """Worked out in windows, the order is the one that is defined over a whole epoch."""
    starts, epoch, seed = np.cumsum([0, *counts]), 4, 11
    shards, streams = _permutation(len(counts), seed, epoch, 0), []
    for reader in range(readers):
        hand = shards[reader::readers].tolist()
        parts = [_permutation(counts[s], seed, epoch, reader + 1, s + 1) + starts[s] for s in hand]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        noise = np.random.PCG64([seed, epoch, reader + 1]).random_raw(len(rows)) >> np.uint64(11)
        streams.append(rows[np.argsort(np.arange(len(rows)) + noise * (window / 2**53), kind="stable")])
    longest = max(map(len, streams))
    turns = [
        (k * longest // len(stream), i, int(row)) for i, stream in enumerate(streams) for k, row in enumerate(stream)
    ]
    whole = [row for *_, row in sorted(turns)]
    order = Order(counts, seed, readers=readers, window=window)
    order._size = size
    assert order.rows(epoch * len(order) + np.arange(len(order))).tolist() == whole


def test_a_billion_samples_cost_what_a_window_holds():
    tracemalloc.start()
    order = Order([10_000] * 100_000, 1)
    far = order.rows(np.arange(678_901_000, 678_901_256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 64 <= len(set((far // 10_000).tolist())) <= 2 * 64  # some readers are between two shards
    assert peak < 64e6


def test_epochs_and_seeds_differ():
    order = Order([10] * 30, 1)
    first, second = order.rows(np.arange(300)), order.rows(300 + np.arange(300))
    assert (first == second).mean() < 0.1
    assert (first == Order([10] * 30, 2).rows(np.arange(300))).mean() < 0.1


def test_this_order_never_changes():
    """A run resumed under another version of numpy or of this code goes on where it was."""
    assert Order([5, 3, 4], 7).rows(np.arange(12)).tolist() == [0, 9, 5, 2, 8, 7, 3, 10, 4, 11, 6, 1]


def test_a_batch_mixes_shards_and_a_shard_is_read_within_a_window():
    shards = Order([100] * 200, 0).rows(np.arange(20_000)) // 100
    assert len(set(shards[:64])) == 64
    shards = Order([100] * 200, 0, readers=1, window=150).rows(np.arange(20_000)) // 100
    spans = [np.ptp(np.flatnonzero(shards == shard)) for shard in range(200)]
    assert max(spans) < 100 + 2 * 150
    assert np.median(spans) > 150  # and the window does shuffle over its neighbours
    one_by_one = Order([100] * 200, 0, readers=1, window=0).rows(np.arange(20_000)) // 100
    assert (np.diff(one_by_one) != 0).sum() == 199


def test_every_part_of_an_epoch_holds_of_each_shard_what_the_whole_does():
    counts = [2000] * 5 + [400] * 4 + [110] * 12  # drawings, things, and few of what is to be learnt
    kinds = np.repeat([0, 1, 2], [10_000, 1600, 1320])[Order(counts, 3).rows(np.arange(sum(counts)))]
    for part in np.array_split(kinds, 20):
        shares = np.bincount(part, minlength=3) / len(part)
        assert np.abs(shares - np.array([10_000, 1600, 1320]) / sum(counts)).max() < 0.02


def test_shards_may_be_some_of_many():
    rows = Order([5, 7], 0, firsts=np.array([100, 50])).rows(np.arange(12))
    assert sorted(rows) == [*range(50, 57), *range(100, 105)]


def test_locate_skips_empty_shards():
    shards, indices = locate(np.cumsum([0, 2, 0, 3]), np.arange(5))
    assert shards.tolist() == [1, 1, 3, 3, 3]
    assert indices.tolist() == [0, 1, 0, 1, 2]


def test_uniforms_are_uniform_and_keyed():
    numbers = uniforms(3, np.arange(100_000), 4)
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.005
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.02
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.02
    assert np.abs(np.histogram(numbers, 50)[0] / 8000 - 1).max() < 0.06
    assert np.array_equal(uniforms(3, np.array([77]), 4)[0], numbers[77])
    assert not np.isclose(uniforms(4, np.arange(1000), 4), numbers[:1000]).any()
