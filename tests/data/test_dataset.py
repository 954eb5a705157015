"""Batches at positions: pure functions of (seed, position), whatever the workers and ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.dataset import Batch, DataConfig, TokenMemo, decode_for, loader, open_dataset, open_validation, to_image
from ldm.data.images import decode, square
from ldm.data.order import locate
from ldm.data.shards import Damaged, Shards, write_shard
from ldm.errors import UserError


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k] for k in one
    )


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.fixture
def config(assets) -> DataConfig:
    return DataConfig(shards=assets, validation=assets, size=64, seed=5, workers=0)


def test_a_batch_is_what_lies_in_the_shards(config):
    dataset = open_dataset(config)
    assert len(dataset) == 60
    batch = dataset.__getitems__([3, 70, 3])
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 3, 64, 64), torch.uint8)
    assert batch["position"].tolist() == [3, 70, 3]
    assert torch.equal(batch["image"][0], batch["image"][2])
    shards = Shards(config.shards)
    (shard,), (index,) = (part.tolist() for part in locate(shards.ends, dataset.stream.rows(np.array([70]))))
    assert batch["key"][1] == shards.keys(shard)[index]
    assert batch["caption"][1] in shards.sample(shard, index).about()["captions"]
    pixels = np.asarray(decode(shards.sample(shard, index).image))
    assert np.array_equal(batch["image"][1].permute(1, 2, 0).numpy(), pixels)
    assert same(dataset[70], dataset.__getitems__([70]))


def test_every_caption_is_drawn_and_keyed_by_position(config):
    dataset = open_dataset(config)
    drawn: dict[str, set[str]] = {}
    for batch in loader(dataset, 60, stop=60 * 20):
        for key, caption in zip(batch["key"], batch["caption"], strict=True):
            drawn.setdefault(key, set()).add(caption)
    shards = Shards(config.shards)
    for shard in range(2):
        for index, key in enumerate(shards.keys(shard)):
            assert drawn[key] == set(shards.sample(shard, index).about()["captions"])
    assert open_dataset(config).__getitems__([1234])["caption"] == dataset.__getitems__([1234])["caption"]


def test_the_seed_changes_order_and_captions(config):
    other = open_dataset(dataclasses.replace(config, seed=6)).__getitems__(range(60))
    assert other["key"] != open_dataset(config).__getitems__(range(60))["key"]


def test_flip_mirrors_half(config):
    plain = open_dataset(config).__getitems__(range(240))
    flipped = open_dataset(dataclasses.replace(config, flip=True)).__getitems__(range(240))
    same_way = (plain["image"] == flipped["image"]).flatten(1).all(1)
    mirrored = (plain["image"].flip(-1) == flipped["image"]).flatten(1).all(1)
    assert (same_way | mirrored).all()
    assert 0.35 < mirrored.float().mean() < 0.65


def test_crop(tmp_path, encoded):
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    write_shard(tmp_path / "a.tar", [("0", {"png": encoded(ramp), "txt": b"ramp"})])
    config = DataConfig(shards=str(tmp_path / "a.tar"), size=32)
    center = open_dataset(config).__getitems__(range(20))["image"][:, 0, 0, 0]
    random = open_dataset(dataclasses.replace(config, crop="random")).__getitems__(range(200))["image"][:, 0, 0, 0]
    assert set(center.tolist()) == {48}
    assert random.min() < 10 and random.max() > 86
    half = open_dataset(dataclasses.replace(config, size=16)).__getitems__([0])["image"]
    assert half.shape == (1, 3, 16, 16)


def test_validation_is_plain_and_in_order(config):
    dataset = open_validation(dataclasses.replace(config, flip=True, seed=9, crop="random"))
    batch = dataset.__getitems__(range(60))
    shards = Shards(config.validation)
    places = [(shard, index) for shard in range(2) for index in range(shards.counts[shard])]
    assert batch["key"] == [shards.keys(s)[i] for s, i in places]
    assert batch["caption"] == [shards.sample(s, i).about()["captions"][0] for s, i in places]
    pixels = np.stack([np.asarray(decode(shards.sample(s, i).image)) for s, i in places])
    assert np.array_equal(batch["image"].permute(0, 2, 3, 1).numpy(), pixels)


def test_no_validation_shards(config):
    with pytest.raises(UserError, match="no validation shards"):
        open_validation(dataclasses.replace(config, validation=""))


def test_workers_change_nothing(config):
    dataset = open_dataset(
        dataclasses.replace(config, flip=True), lambda texts: torch.tensor([[len(t)] for t in texts])
    )
    alone = list(loader(dataset, 8, start=24, stop=80))
    assert [batch["position"].tolist() for batch in alone] == [list(range(p, p + 8)) for p in range(24, 80, 8)]
    for batch, other in zip(alone, loader(dataset, 8, start=24, stop=80, workers=2), strict=True):
        assert same(batch, other)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 130), st.integers(0, 130))
@settings(deadline=None, max_examples=25)
def test_ranks_share_each_batch(world, share, start, length):
    class Numbers:
        def __len__(self) -> int:
            return 7

        def __getitems__(self, positions) -> Batch:
            return Batch(position=torch.tensor(positions))

    def read(world: int, rank: int) -> list[torch.Tensor]:
        batches = loader(Numbers(), share * worlds, start=start, stop=start + length, world=world, rank=rank)
        return [batch["position"] for batch in batches]

    worlds = world
    whole, parts = read(1, 0), [read(world, rank) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts if number < len(part)]), batch)
    assert torch.cat([*whole, torch.empty(0)]).tolist() == list(range(start, start + length))


def test_the_stream_has_no_end(config):
    batches = loader(open_dataset(config), 7)
    seen = keys(next(batches) for _ in range(20))
    assert sorted(seen[:60]) == sorted(seen[60:120])
    assert seen[:60] != seen[60:120]


@pytest.mark.parametrize("batch, world", [(0, 1), (3, 2)])
def test_a_batch_that_cannot_be_shared_is_refused(config, batch, world):
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        next(loader(open_dataset(config), batch, world=world))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_in_one_line(tmp_path, sample, workers):
    key, members = sample(4)
    write_shard(tmp_path / "a.tar", [(key, {**members, "png": members["png"][:-60]})])
    dataset = open_dataset(DataConfig(shards=str(tmp_path / "a.tar"), size=16))
    with pytest.raises(Damaged, match=r"^sample '000000004' of shard '.*a.tar': broken image: [^\n]*$"):
        next(loader(dataset, 1, workers=workers))


def test_tokens_ride_along_and_each_caption_is_tokenised_once(config):
    asked: list[str] = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.tensor([[len(text), 7] for text in texts])

    dataset = open_dataset(config, tokenize)
    for batch in loader(dataset, 60, stop=600):
        assert batch["tokens"].tolist() == [[len(caption), 7] for caption in batch["caption"]]
    assert len(asked) == len(set(asked))
    assert TokenMemo(tokenize)([f"{n}" for n in range(3000)]).shape == (3000, 2)


def test_images_lie_in_minus_one_to_one():
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert to_image(image)[:, 0, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("kind, exact", [("PNG", True), ("JPEG", False)])
def test_a_large_picture_is_decoded_no_larger_than_needed(tmp_path, encoded, monkeypatch, kind, exact):
    """A JPEG comes out of the decoder small, looks the same and keeps its own size in what is told of it."""
    ramp = np.linspace(0, 255, 400)[:, None] * np.ones(300) / 2 + np.linspace(0, 120, 300)[None]
    large = Image.fromarray(np.repeat(ramp[..., None], 3, 2).astype(np.uint8))
    data = encoded(large, kind, **({} if exact else {"quality": 95}))
    write_shard(tmp_path / "a.tar", [("0", {"jpg": data, "txt": b"ramp"})])
    dataset = open_dataset(DataConfig(shards=str(tmp_path / "a.tar"), size=64))
    decoded, full = decode_for(data, 64)
    assert full == (300, 400) and decoded.size == ((300, 400) if exact else (75, 100))
    view = dataset.row(0)
    assert view.size_ids == [400, 300, 11, 0, 64, 64]  # 50 rows of 400 above the square, shrunk with it
    error = np.abs(view.pixels.transpose(1, 2, 0).astype(int) - np.asarray(square(large, 64)).astype(int))
    assert error.mean() < 1 and error.max() < 8
    turned = Image.Exif()
    turned[0x0112] = 6
    decoded, full = decode_for(encoded(large, "JPEG", exif=turned), 64)
    assert full == decoded.size == (400, 300)  # upright, and so as it is
