"""What stands where in streams of real shards: mixtures, captions of each source, sizes, epochs."""

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from ldm.data.dataset import DataConfig, loader, open_dataset
from ldm.data.shards import Shards, write_manifest, write_shard
from ldm.data.stream import sources
from ldm.errors import UserError


@pytest.fixture
def two(tmp_path, picture) -> DataConfig:
    """Source a: 10 pictures with two captions and an alt text; source b: 6 with a text only. A mixture of 3 to 1."""
    entries = []
    for name, count in (("a", 10), ("b", 6)):
        samples = []
        for n in range(count):
            members = {"png": picture(n), "txt": f"text of {name}{n}".encode()}
            if name == "a":
                members["json"] = json.dumps({"captions": [f"a{n}", f"a {n}"], "alt": f"alt {n}"}).encode()
            samples.append((f"{name}{n}", members))
        entries.append(write_shard(tmp_path / f"{name}.tar", samples))
    write_manifest(tmp_path, entries)
    return DataConfig(shards=f"{tmp_path}/a.tar:0.75,{tmp_path}/b.tar:0.25", size=16, workers=0)


def test_a_mixture_as_typed():
    assert [tuple(source) for source in sources("a/{0,1}.tar::c.tar:0.7, s3://b/{00..03}.tar:0.3")] == [
        ("a/{0,1}.tar::c.tar", "0.7"),
        ("s3://b/{00..03}.tar", "0.3"),
    ]
    assert [tuple(source) for source in sources("a/{0,1}.tar::b")] == [("a/{0,1}.tar::b", "")]
    with pytest.raises(UserError, match="give each part a weight"):
        sources("a.tar:1,b.tar")


def test_each_source_has_its_share_and_its_own_epochs(two):
    keys = [key for batch in loader(open_dataset(two), 8, stop=80) for key in batch["key"]]
    assert all(abs(sum(key[0] == "a" for key in keys[:n]) - 0.75 * n) <= 1 for n in range(81))
    mine = [key for key in keys if key[0] == "a"]
    assert all(len(set(mine[i : i + 10])) == 10 for i in range(0, 60, 10))
    mine = [key for key in keys if key[0] == "b"]
    assert len(set(mine[:6])) == len(set(mine[6:12])) == 6


@pytest.mark.parametrize(
    "captions, of_a, of_b",
    [("", ["a{}", "a {}"], ["text of b{}"]), ("alt,txt", ["alt {}"], ["text of b{}"]), ("txt", ["text of a{}"], None)],
)
def test_each_source_has_its_own_captions(two, captions, of_a, of_b):
    dataset = open_dataset(dataclasses.replace(two, captions=captions))
    batch = dataset.__getitems__(range(200))
    for key, caption in zip(batch["key"], batch["caption"], strict=True):
        options = of_a if key[0] == "a" else of_b or ["text of b{}"]
        assert caption in [option.format(key[1:]) for option in options]
    assert len(set(batch["caption"])) == 10 * len(of_a) + 6


def test_captions_that_are_not_there_are_refused(two):
    with pytest.raises(UserError, match="has no captions in 'alt', and none of 1000 others can"):
        list(loader(open_dataset(dataclasses.replace(two, captions="alt")), 8, stop=80))
    with pytest.raises(UserError, match="has 3 parts for 2 sources"):
        open_dataset(dataclasses.replace(two, captions="a,b,c"))


def test_single_and_repeated_epochs(two, assets):
    once = open_dataset(DataConfig(shards=assets, size=64, epochs=1))
    keys = [key for batch in loader(once, 16) for key in batch["key"]]
    assert len(keys) == len(set(keys)) == 60
    with pytest.raises(UserError, match="64 samples are asked for, data.epochs gives 60"):
        loader(once, 16, stop=64)
    mixed = [key for batch in loader(open_dataset(dataclasses.replace(two, epochs=2)), 4) for key in batch["key"]]
    counts = Counter(mixed)
    assert max(counts.values()) == 2 and 20 <= len(mixed) <= 27 and sum(counts[f"a{n}"] for n in range(10)) == 20


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"readers": 0}, {"window": -1}, {"max_damaged": 2}])
def test_numbers_that_cannot_be(two, wrong):
    with pytest.raises(UserError, match=f"data.{next(iter(wrong))}"):
        open_dataset(dataclasses.replace(two, **wrong))


def test_readers_and_window_shape_the_order(tmp_path, sample):
    entries = [write_shard(tmp_path / f"{s}.tar", map(sample, range(20 * s, 20 * s + 20))) for s in range(6)]
    write_manifest(tmp_path, entries)
    config = DataConfig(shards=str(tmp_path), size=16)

    def shards(**changes) -> list[int]:
        dataset = open_dataset(dataclasses.replace(config, **changes))
        return [int(key) // 20 for key in dataset.__getitems__(range(120))["key"]]

    assert len(set(shards()[:6])) == 6
    in_order = shards(readers=1, window=0)
    assert sum(a != b for a, b in pairwise(in_order)) == 5
    assert sum(a != b for a, b in pairwise(shards(readers=1, window=9))) > 5


@pytest.fixture
def sized(tmp_path, picture) -> DataConfig:
    """Two shards whose samples lie by size, as a preparation with buckets leaves them."""
    entries = []
    for s, (wide, tall) in enumerate([(7, 6), (8, 9)]):
        samples = []
        for n in range(wide + tall):
            width, height = (32, 16) if n < wide else (16, 24)
            about = {"original_width": 640 + n, "original_height": 480, "crop_left": 5, "crop_top": n, "captions": "x"}
            members = {"png": picture(100 * s + n, (height, width)), "json": json.dumps(about).encode()}
            samples.append((f"{s}{n:02d}", members))
        entry = write_shard(tmp_path / f"{s}.tar", samples)
        entries.append(dataclasses.replace(entry, buckets={"32x16": wide, "16x24": tall}))
    write_manifest(tmp_path, entries)
    return DataConfig(shards=str(tmp_path), size=16, buckets=True, max_damaged=0.1)


def test_batches_of_one_size(sized):
    dataset = open_dataset(sized, batch=4)
    keys = []
    for batch in loader(dataset, 4, stop=7 * 4 * 6):
        keys += batch["key"]
        height, width = batch["image"].shape[2:]
        assert (height, width) in ((16, 32), (24, 16))
        for key, ids in zip(batch["key"], batch["size_ids"].tolist(), strict=True):
            assert ids == [480, 640 + int(key[1:]), int(key[1:]), 5, height, width]
    counts = Counter(keys)
    assert sorted(counts) == sorted([f"0{n:02d}" for n in range(13)] + [f"1{n:02d}" for n in range(17)])
    assert max(counts.values()) - min(counts.values()) <= 1
    assert "of 2 sizes; 6 of an epoch fill no batch of 4" in dataset.about()
    halves = [list(loader(dataset, 4, start=20, stop=60, rank=rank, world=2)) for rank in range(2)]
    for one, other, whole in zip(*halves, loader(dataset, 4, start=20, stop=60), strict=True):
        assert torch.equal(torch.cat([one["image"], other["image"]]), whole["image"])


def test_batches_that_would_mix_sizes_are_refused(sized):
    with pytest.raises(UserError, match="batches of 8 would mix sizes of pictures, which come 4 at a time"):
        loader(open_dataset(sized, batch=4), 8)
    assert next(loader(open_dataset(sized, batch=4), 2))["image"].shape[0] == 2  # half a batch is of one size too


def test_a_stand_in_has_the_same_size(sized):
    shards = Shards(sized.shards)
    path = shards.paths[0]
    data = bytearray(path.read_bytes())
    for index in (2, 9):
        data[data.index(shards.sample(0, index).image) + 20] ^= 1
    path.write_bytes(data)
    dataset = open_dataset(sized, batch=4)
    assert dataset.row(15).key == "102" and dataset.row(15).pixels.shape == (3, 16, 32)
    problems: list[str] = []
    assert dataset.view(2, problems, 0.5, 0.5).key == "102"
    assert dataset.view(9, problems, 0.5, 0.5).key == "110"  # the third of the tall ones
    assert len(problems) == 2 and all("0.tar" in problem for problem in problems)


def test_a_picture_of_another_size_than_its_manifest_says(sized, tmp_path):
    entries = Shards(sized.shards).entries
    write_manifest(tmp_path, [dataclasses.replace(e, buckets={"64x16": e.samples}) for e in entries])
    with pytest.raises(UserError, match="has 32x16 pixels, its manifest says 64x16|has 16x24 pixels"):
        next(loader(open_dataset(sized, batch=4), 4))


def test_size_values_of_a_square_cut_from_a_prepared_picture(tmp_path, picture):
    about = {"original_width": 1000, "original_height": 500, "crop_left": 10, "crop_top": 4, "captions": "x"}
    members = {"png": picture(0, (32, 64)), "json": json.dumps(about).encode()}
    write_shard(tmp_path / "a.tar", [("0", members), ("1", {"png": picture(1, (32, 64)), "txt": b"x"})])
    dataset = open_dataset(DataConfig(shards=str(tmp_path / "a.tar"), size=16))
    assert dataset.row(0).size_ids == [500, 1000, 2, 13, 16, 16]  # (10 + 16) / 2 from the left
    assert dataset.row(1).size_ids == [32, 64, 0, 8, 16, 16]
    assert dataset.row(1, x=1.0).size_ids == [32, 64, 0, 16, 16, 16]
