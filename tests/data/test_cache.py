"""Cached encodings: the same stream as uncached, encoded once, and never a stale one."""

import dataclasses

import pytest
import torch
from torch.nn.functional import avg_pool2d

from ldm.data.cache import cache_latents
from ldm.data.dataset import DataConfig, loader, open_dataset, to_image
from ldm.errors import UserError


class Encoder:
    """Pixels averaged 8 x 8, and how many pictures were encoded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, image):
        self.count += len(image)
        mean = avg_pool2d(to_image(image), 8)
        return mean, mean.abs() + 0.1


@pytest.fixture
def config(assets) -> DataConfig:
    return DataConfig(shards=assets, size=64, flip=True, seed=5, workers=0)


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), ord(text[0])] for text in texts])


@pytest.mark.parametrize("flip", [True, False])
def test_the_cached_stream_is_the_uncached_one(config, tmp_path, flip):
    dataset = open_dataset(dataclasses.replace(config, flip=flip), tokenize)
    encode = Encoder()
    seen: list[tuple[int, int]] = []
    cached = cache_latents(
        dataset, encode, tmp_path, model="m", batch_size=25, show=lambda *numbers: seen.append(numbers)
    )
    assert (len(cached), encode.count, seen) == (60, 60 * (1 + flip), [(25, 60), (50, 60), (60, 60)])
    for raw, batch in zip(loader(dataset, 30, start=50, stop=200), loader(cached, 30, start=50, stop=200), strict=True):
        mean, std = encode(raw["image"])
        assert torch.equal(batch["mean"], mean.half())
        assert torch.equal(batch["std"], std.half())
        assert torch.equal(batch["tokens"], raw["tokens"])
        assert torch.equal(batch["position"], raw["position"])
        assert (batch["caption"], batch["key"]) == (raw["caption"], raw["key"])


def test_a_second_run_reads_the_file(config, tmp_path):
    first, second = Encoder(), Encoder()
    one = cache_latents(open_dataset(config), first, tmp_path, model="m")
    two = cache_latents(open_dataset(config), second, tmp_path, model="m")
    assert second.count == 0
    assert torch.equal(one.latents, two.latents)
    assert "tokens" not in two.__getitems__([0])
    assert [path.name.endswith(".safetensors") for path in tmp_path.iterdir()] == [True]


def test_order_and_workers_keep_the_cache(config, tmp_path):
    cache_latents(open_dataset(config), Encoder(), tmp_path, model="m")
    encode = Encoder()
    cache_latents(open_dataset(dataclasses.replace(config, seed=1, workers=1)), encode, tmp_path, model="m")
    assert encode.count == 0


@pytest.mark.parametrize("change", [{"size": 32}, {"flip": False}, {"shards": "first"}, "model"])
def test_anything_else_makes_it_anew(config, tmp_path, assets, change):
    cache_latents(open_dataset(config), Encoder(), tmp_path, model="m")
    if change == {"shards": "first"}:
        change = {"shards": assets.replace("{00000..00001}", "00000")}
    new = config if change == "model" else dataclasses.replace(config, **change)
    encode = Encoder()
    cache_latents(open_dataset(new), encode, tmp_path, model="other" if change == "model" else "m")
    assert encode.count


@pytest.mark.parametrize("damage", ["cut", "key"])
def test_a_broken_cache_is_made_anew(config, tmp_path, damage):
    cache_latents(open_dataset(config), Encoder(), tmp_path, model="m")
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    key = data[data.index(b'"key":"') + 7 :][:64]
    path.write_bytes(data[:-100] if damage == "cut" else data.replace(key, bytes(reversed(key))))
    encode = Encoder()
    cache_latents(open_dataset(config), encode, tmp_path, model="m")
    assert encode.count == 120
    assert path.read_bytes() == data


def test_what_cannot_be_cached_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="cannot be cached with crop 'random'"):
        cache_latents(open_dataset(dataclasses.replace(config, crop="random")), Encoder(), tmp_path, model="m")
    with pytest.raises(UserError, match="are not finite"):
        cache_latents(open_dataset(config), lambda x: (to_image(x) / 0, to_image(x)), tmp_path, model="m")
    assert not list(tmp_path.iterdir())
