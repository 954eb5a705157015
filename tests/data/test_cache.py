"""Cached encodings: the same stream as uncached, encoded once, and never a stale one."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d

from ldm.data.cache import CachedDataset, Encoders, Kept, cached, fill, kept_with
from ldm.data.dataset import DataConfig, loader, open_dataset, to_image
from ldm.data.order import uniforms
from ldm.data.shards import write_manifest, write_shard
from ldm.data.tars import Damaged
from ldm.errors import UserError


class Encoder:
    """Pixels averaged 8 x 8, and how many pictures were encoded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, image):
        self.count += len(image)
        mean = avg_pool2d(to_image(image), 8)
        return mean, mean.abs() + 0.1


def encoders(encode=None, **changes) -> Encoders:
    return Encoders(**{"model": "m", "encode": encode or Encoder()} | changes)


@pytest.fixture
def config(assets) -> DataConfig:
    return DataConfig(shards=assets, size=64, flip=True, seed=5, workers=0)


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), ord(text[0]) if text else 0] for text in texts])


def states(texts: list[str]):
    lengths = torch.tensor([[float(len(text))] for text in texts])
    return lengths[:, None].expand(-1, 3, 2) / 8, lengths


@pytest.mark.parametrize("flip", [True, False])
def test_the_cached_stream_is_the_uncached_one(config, tmp_path, flip):
    dataset = open_dataset(dataclasses.replace(config, flip=flip), tokenize)
    encode, seen = Encoder(), []
    kept = cached(
        dataset, encoders(encode, text="t", states=states), tmp_path, show=lambda *numbers: seen.append(numbers)
    )
    assert (len(kept), encode.count, seen) == (60, 60 * (1 + flip), [(30, 60), (60, 60)])
    kept = pickle.loads(pickle.dumps(kept))  # as a worker gets it
    for raw, batch in zip(loader(dataset, 30, start=50, stop=110), loader(kept, 30, start=50, stop=110), strict=True):
        mean, std = encode(raw["image"])
        assert torch.equal(batch["mean"], mean.half())
        assert torch.equal(batch["std"], std.half())
        for name in ("tokens", "position", "size_ids"):
            assert torch.equal(batch[name], raw[name])
        assert (batch["caption"], batch["key"]) == (raw["caption"], raw["key"])
        lengths = torch.tensor([float(len(caption)) for caption in raw["caption"]])
        assert torch.equal(batch["vector"][:, 0], lengths.half())
        assert torch.equal(batch["states"][:, 2, 1], (lengths / 8).half())
    assert (kept.empty["states"] == 0).all() and kept.empty["states"].shape == (1, 3, 2)


def test_a_second_run_maps_what_is_there(config, tmp_path):
    one = cached(open_dataset(config), encoders(), tmp_path)
    second = Encoder()
    two = cached(open_dataset(dataclasses.replace(config, seed=5, workers=1)), encoders(second), tmp_path)
    assert second.count == 0
    assert torch.equal(one.__getitems__(range(60))["mean"], two.__getitems__(range(60))["mean"])
    assert "tokens" not in two.__getitems__([0]) and two.empty is None


@pytest.mark.parametrize(
    "change, text",
    [
        ({"size": 32}, "size 64, not 32"),
        ({"flip": False}, "flip True, not False"),
        ({"captions": "txt"}, "captions '', not 'txt'"),
        ({"crop": "random"}, "crop 'center', not 'random'"),
        ("model", "autoencoder 'm', not 'other'"),
        ("text", "text '', not 't'"),
        ("tokenizer", "tokenizer '', not '"),
    ],
)
def test_a_stale_cache_is_refused(config, tmp_path, change, text):
    cached(open_dataset(config), encoders(), tmp_path)
    new = dataclasses.replace(config, **change) if isinstance(change, dict) else config
    how = {"model": {"model": "other"}, "text": {"text": "t", "states": states}}.get(str(change), {})
    dataset = open_dataset(new, tokenize if change == "tokenizer" else None)
    with pytest.raises(UserError, match=f"was made with {text}"):
        cached(dataset, encoders(crops=2 if "crop" in change else 1, **how), tmp_path)
    assert len(cached(open_dataset(config), encoders(None), tmp_path)) == 60  # and it is still what it was


def test_what_is_missing_broken_or_another_shard_is_encoded(config, tmp_path, assets):
    cached(open_dataset(config), encoders(), tmp_path)
    first, second = sorted(tmp_path.glob("0000*.safetensors"))
    data = first.read_bytes()
    first.write_bytes(data[:-100])
    encode = Encoder()
    cached(open_dataset(config), encoders(encode), tmp_path)
    assert (encode.count, first.read_bytes()) == (60, data)
    second.unlink()
    one = dataclasses.replace(config, shards=assets.replace("{00000..00001}", "00000"))
    cached(open_dataset(one), encoders(encode), tmp_path)
    assert encode.count == 60  # of the first shard all is there


@pytest.fixture
def beside(tmp_path, folder, config) -> DataConfig:
    """Two folders of shards."""
    shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("other"))
    return dataclasses.replace(config, shards=f"{folder}:2,{tmp_path / 'other'}:1", size=16)


def test_encodings_lie_beside_the_shards_by_what_made_them(beside, tmp_path):
    first = Encoder()
    kept = cached(open_dataset(beside, tokenize), encoders(first, text="t", states=states, crops=2), "beside")
    ours, theirs = sorted(tmp_path.glob("**/latents-*"))
    assert (ours.name, ours.parent, theirs.parent) == (theirs.name, tmp_path, tmp_path / "other")
    assert [len(list(home.glob("0*.safetensors"))) for home in (ours, theirs)] == [3, 3]
    dataset, plain = open_dataset(beside, tokenize), encoders(Encoder())
    assert (kept_with(dataset, plain, "beside")["text"], kept_with(dataset, plain, "beside")["crops"]) == ("t", 2)
    assert torch.equal(kept.__getitems__(range(9))["mean"], cached(open_dataset(beside, tokenize), encoders(
        None, text="t", states=states, crops=2), "beside").__getitems__(range(9))["mean"])  # fmt: skip
    with pytest.raises(UserError, match=r"latents-.*was made with text 't', not 'u'"):
        cached(dataset, encoders(text="u", states=states, crops=2), "beside")
    for other in (encoders(model="n"), encoders()):
        cached(open_dataset(dataclasses.replace(beside, flip=other.model == "n")), other, "beside")
    assert len(list(tmp_path.glob("latents-*"))) == 3 and len(list(theirs.glob("0*"))) == 3


def test_a_shard_that_is_listed_twice_is_encoded_once(config, assets, tmp_path):
    encode = Encoder()
    for rank in range(2):
        fill(open_dataset(dataclasses.replace(config, shards=f"{assets}::{assets}")), encoders(encode), tmp_path,
             share=(rank, 2))  # fmt: skip
    assert encode.count == 2 * 60


def test_beside_what_cannot_be_written_to_another_place_is_asked_for(beside, tmp_path, monkeypatch):
    dataset = open_dataset(beside)
    dataset.shards.paths[1] = "s3://far/00001.tar"
    with pytest.raises(UserError, match="nothing can be kept beside 's3://far/00001.tar': name a folder with --cache"):
        cached(dataset, encoders(), "beside")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/x'.*: name a folder by --cache DIR"):
        cached(open_dataset(beside), encoders(), tmp_path / "file/x")


@pytest.mark.parametrize("name", ["latents.0", "states", "vector", "tokens", "captions", "sha256.states", "counts"])
def test_an_altered_record_is_refused_by_name(config, tmp_path, name):
    """One bit anywhere in a tensor: never is it trained on, and the file is named."""
    how = {"text": "t", "states": states}
    cached(open_dataset(config, tokenize), encoders(**how), tmp_path)
    path = sorted(tmp_path.glob("0*"))[1]
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (start + stop) // 2] ^= 1
    path.write_bytes(data)
    kept = cached(open_dataset(config, tokenize), encoders(None, **how), tmp_path)
    with pytest.raises(Damaged, match=rf"in '.*{path.name}' was altered: remove the file"):
        for positions in range(0, 600, 60):
            kept.__getitems__(range(positions, positions + 60))


def test_every_bit_of_the_head_counts(config, tmp_path):
    cached(open_dataset(config), encoders(), tmp_path)
    path = sorted(tmp_path.glob("0*"))[0]
    whole = path.read_bytes()
    for place in range(8, 8 + int.from_bytes(whole[:8], "little"), 7):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            batch = Kept(path).record("latents.0", 0, 0)
        except (Damaged, SafetensorError, KeyError):
            continue
        path.write_bytes(whole)
        assert np.array_equal(batch, Kept(path).record("latents.0", 0, 0))  # a space of the padding


def test_a_cache_without_digests_is_made_again(config, tmp_path):
    cached(open_dataset(config), encoders(), tmp_path)
    for path in tmp_path.glob("0*"):
        save_file({name: t for name, t in load_file(path).items() if "sha256" not in name}, path)
    encode = Encoder()
    cached(open_dataset(config), encoders(encode), tmp_path)
    assert encode.count == 120


def test_processes_share_the_shards(config, tmp_path):
    counts = []
    for rank in range(2):
        encode = Encoder()
        fill(open_dataset(config), encoders(encode), tmp_path, share=(rank, 2))
        counts.append(encode.count)
    assert counts == [60, 60]
    whole = cached(open_dataset(config), encoders(Encoder()), tmp_path / "alone")
    parts = CachedDataset(open_dataset(config), encoders(), tmp_path)
    assert torch.equal(whole.__getitems__(range(60))["mean"], parts.__getitems__(range(60))["mean"])


def test_several_crops(config, tmp_path, sample, picture):
    pictures = [(f"{n}", {"png": picture(n, (32, 80)), "txt": b"x"}) for n in range(3)]
    write_manifest(tmp_path, [write_shard(tmp_path / "a.tar", pictures)])
    config = DataConfig(shards=str(tmp_path), size=32, crop="random", flip=True)
    dataset = open_dataset(config)
    with pytest.raises(UserError, match="are kept as several crops"):
        cached(dataset, encoders(), tmp_path / "cache")
    kept = cached(dataset, encoders(crops=4), tmp_path / "cache")
    found = kept.__getitems__(range(60))
    corners = uniforms(0, np.arange(12), 2)
    views = {(n, v): dataset.row(n, *corners[4 * n + v]) for n in range(3) for v in range(4)}
    seen = set()
    for mean, key, ids in zip(found["mean"], found["key"], found["size_ids"].tolist(), strict=True):
        for (n, v), view in views.items():
            image = torch.from_numpy(view.pixels.copy())[None]
            for mirrored in range(2):
                same = torch.equal(Encoder()(image.flip(-1) if mirrored else image)[0][0].half(), mean)
                if same and str(n) == key and view.size_ids == ids:
                    seen.add((n, v, mirrored))
    assert len(seen) > 15  # of 24


def test_buckets(tmp_path, picture):
    sizes = [(16, 32)] * 3 + [(24, 24)] * 5
    pictures = [(f"{n}", {"png": picture(n, size), "txt": b"x"}) for n, size in enumerate(sizes)]
    entry = dataclasses.replace(write_shard(tmp_path / "a.tar", pictures), buckets={"32x16": 3, "24x24": 5})
    write_manifest(tmp_path, [entry])
    dataset = open_dataset(DataConfig(shards=str(tmp_path), buckets=True, flip=True), tokenize, batch=2)
    encode = Encoder()
    kept = cached(dataset, encoders(encode), tmp_path / "cache")
    for start in range(0, 40, 2):
        raw, batch = dataset.__getitems__(range(start, start + 2)), kept.__getitems__(range(start, start + 2))
        assert batch["key"] == raw["key"]
        assert torch.equal(batch["mean"], encode(raw["image"])[0].half())


def test_what_is_not_finite_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="are not finite"):
        cached(open_dataset(config), encoders(lambda x: (to_image(x) / 0, to_image(x))), tmp_path)
    for broken in ("{", "[1]"):
        (tmp_path / "cache.json").write_text(broken)
        with pytest.raises(UserError, match=r"cache.json' is broken"):
            cached(open_dataset(config), encoders(), tmp_path)
