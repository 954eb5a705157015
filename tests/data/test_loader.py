"""The loader under trouble: damaged samples, processes that die or hang; and what a resume reads, on any layout."""

import dataclasses
import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data import loader as loading
from ldm.data import shards as module
from ldm.data.dataset import DataConfig, open_dataset
from ldm.data.loader import Batch, Limits, loader
from ldm.data.shards import Shards, write_manifest, write_shard
from ldm.errors import UserError


@pytest.fixture
def config(folder) -> DataConfig:
    """Three shards of 5, 6 and 7 samples; the second of the first shard and the last of the last one are damaged."""
    shards = Shards(str(folder))
    for shard, index in ((0, 1), (2, 6)):
        data = bytearray(shards.paths[shard].read_bytes())
        data[data.index(shards.sample(shard, index).image) + 30] ^= 4
        shards.paths[shard].write_bytes(data)
    return DataConfig(shards=str(folder), size=16, seed=2, workers=0, max_damaged=0.2)


def test_a_damaged_sample_is_replaced_and_counted(config):
    with pytest.warns(UserWarning, match="altered or cut short; another sample stands in for it"):
        batches = list(loader(open_dataset(config), 6, stop=18 * 4))
    keys = [key for batch in batches for key in batch["key"]]
    assert [len(batch["key"]) for batch in batches] == [6] * 12
    assert not {"000000001", "000000026"} & set(keys)
    assert keys.count("000000011") == 8  # at the same place in the next shard
    assert keys.count("000000001") == 0 and batches[-1]["damaged"] == 8


def test_the_same_stands_in_on_any_layout(config):
    dataset = open_dataset(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = [batch["key"] for batch in loader(dataset, 4, start=8, stop=40)]
        for workers in (0, 2):
            parts = [loader(dataset, 4, start=8, stop=40, rank=rank, world=2, workers=workers) for rank in range(2)]
            halves = zip(*parts, strict=True)
            assert [one["key"] + other["key"] for one, other in halves] == whole


def test_above_the_share_the_run_stops_and_names_the_shard(config, folder):
    few = dataclasses.replace(config, max_damaged=0.06)  # of 18: one
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            UserError, match=r"shard '.*0000[02].tar'.*; 2 of \d+ samples read were damaged, more than data.max"
        ),
    ):
        list(loader(open_dataset(few), 6, stop=54))
    with pytest.raises(UserError, match=r"^sample \d of shard '.*0000[02].tar' was altered"):
        list(loader(open_dataset(dataclasses.replace(config, max_damaged=0)), 6, stop=54))


def test_a_shard_that_is_cut_short_may_be_used_as_far_as_it_goes(config, folder):
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(UserError, match="00001.tar' has 6000 bytes, its manifest says"):
        open_dataset(config)  # 6 of 18 samples may be lost
    with pytest.warns(UserWarning, match="stands in"):
        keys = [
            key
            for b in loader(open_dataset(dataclasses.replace(config, max_damaged=0.9)), 6, stop=36)
            for key in b["key"]
        ]
    assert "000000010" in keys and "000000014" not in keys and len(keys) == 36


def test_where_nothing_is_left_it_says_so(tmp_path, sample):
    write_manifest(tmp_path, [write_shard(tmp_path / "a.tar", [("0", {"png": b"x", "txt": b"x"})] * 3)])
    with pytest.raises(UserError, match="none of 1000 others can stand in"):
        open_dataset(DataConfig(shards=str(tmp_path), max_damaged=1)).__getitems__([0])


class Troubled:
    """Numbers; at position 12 a process dies or sleeps."""

    def __init__(self, what: str, patience: float = 30.0) -> None:
        self.what, self.limits = what, Limits(patience)

    def __len__(self) -> int:
        return 100

    def where(self, positions) -> list[str]:
        return ["00003.tar"]

    def __getitems__(self, positions) -> Batch:
        if 12 in positions:
            if self.what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60 if self.what == "hangs" else 0)
            raise RuntimeError("a fault of the code")
        return Batch(position=torch.tensor(positions))


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "dies",
            r"^a data process .*(killed by signal|exited unexpectedly).* at positions .* \(00003.tar\): was it killed",
        ),
        (
            "hangs",
            r"^waited 3 s for the samples at positions 12 to 15 \(00003.tar\), which none of 1 data processes sent",
        ),
    ],
)
def test_a_process_that_dies_or_hangs_is_told_of(what, message):
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        list(loader(Troubled(what, 3.0 if what == "hangs" else 60.0), 4, stop=40, workers=1))
    assert time.monotonic() - began < 50


def test_a_worker_outlives_a_sigterm_that_comes_before_it_is_ready(monkeypatch):
    outlive = loading._outlive

    def struck(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        outlive(worker)

    monkeypatch.setattr(loading, "_outlive", struck)
    assert len(list(loader(Troubled("later"), 4, stop=8, workers=1))) == 2
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # here it is heard


def test_any_other_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="a fault of the code"):
        list(loader(Troubled("fails"), 4, stop=40))


def test_a_resume_opens_only_the_shards_of_its_batches(tmp_path, sample, monkeypatch):
    _, members = sample(1)
    entries = [write_shard(tmp_path / f"{s:03d}.tar", [(f"{s}-{n}", members) for n in range(4)]) for s in range(60)]
    write_manifest(tmp_path, entries)
    opened: list[str] = []
    load = module.load_index
    monkeypatch.setattr(module, "load_index", lambda path, digest: opened.append(path.stem) or load(path, digest))
    config = DataConfig(shards=str(tmp_path), size=16, workers=0, readers=5, window=6)
    batches = list(loader(open_dataset(config), 5, start=120, stop=130))
    assert {key.split("-")[0].zfill(3) for batch in batches for key in batch["key"]} == set(opened)
    assert len(opened) <= 10 and not opened.count("000") > 1


@given(
    st.integers(1, 40), st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.integers(1, 5), st.data()
)
@settings(deadline=None, max_examples=40)
def test_changing_the_ranks_leaves_exactly_what_remains(length, layouts, batches, data):
    """An epoch read in turns by other numbers of processes: every sample once, in the order of one."""
    from ldm.data.order import Order

    counts = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any))
    order = Order(counts, length, readers=3, window=7)

    class Rows:
        def __len__(self) -> int:
            return len(order)

        def __getitems__(self, positions) -> Batch:
            return Batch(position=torch.from_numpy(order.rows(np.array(positions))))

    done, seen = 0, []
    for turn in range(10**6):
        world = layouts[turn % len(layouts)]
        stop = min(done + 12 * batches, len(order))
        parts = [list(loader(Rows(), 12, start=done, stop=stop, rank=rank, world=world)) for rank in range(world)]
        for number in range(max(map(len, parts))):
            seen += [row for part in parts if number < len(part) for row in part[number]["position"].tolist()]
        done = stop
        if done == len(order):
            break
    assert sorted(seen) == list(range(len(order)))
    assert seen == [row for batch in loader(Rows(), 12, stop=len(order)) for row in batch["position"].tolist()]
