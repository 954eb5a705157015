"""The order of data: each sample once an epoch, whatever the layout, from the position alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data import order as module
from ldm.data.order import Order, locate, uniforms

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
    assert np.array_equal(Order(counts, seed).rows(positions), whole[positions])
    epoch, shard, index = Order(counts, seed).sample(int(positions[0]))
    assert epoch == positions[0] // sum(counts)
    assert sum(counts[:shard]) + index == whole[positions[0]]
    assert index < counts[shard]


def test_epochs_and_seeds_differ():
    order = Order([10] * 30, 1)
    first, second = order.rows(np.arange(300)), order.rows(300 + np.arange(300))
    assert (first == second).mean() < 0.1
    assert (first == Order([10] * 30, 2).rows(np.arange(300))).mean() < 0.1


def test_this_order_never_changes():
    """A run resumed under another version of numpy or of this code goes on where it was."""
    assert Order([5, 3, 4], 7).rows(np.arange(12)).tolist() == [0, 9, 5, 2, 8, 7, 3, 10, 6, 4, 11, 1]


def test_a_batch_mixes_shards_and_a_shard_is_read_within_a_window(monkeypatch):
    order = Order([100] * 200, 0)
    shards, _ = locate(order.counts, order.rows(np.arange(20_000)))
    assert len(set(shards[:64])) == 64
    monkeypatch.setattr(module, "READERS", 1)
    monkeypatch.setattr(module, "WINDOW", 150)
    shards, _ = locate(order.counts, Order([100] * 200, 0).rows(np.arange(20_000)))
    spans = [np.ptp(np.flatnonzero(shards == shard)) for shard in range(200)]
    assert max(spans) < 100 + 2 * 150
    assert np.median(spans) > 150  # and the window does shuffle over its neighbours


def test_locate_skips_empty_shards():
    shards, indices = locate([0, 2, 0, 3], np.arange(5))
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
