"""Encoded pictures kept in memory and in a file: each is encoded once and then trained on in every epoch.

Kept are the mean and deviation of the autoencoder's posterior in fp16, and all captions. The file is named by a digest
of the model, the shards and the transform: with any of them changed it is not found, and made anew.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.data.dataset import Batch, ShardDataset, Tokenize, loader
from ldm.data.order import locate
from ldm.data.shards import Shards
from ldm.data.stream import CAPTION, FLIP, InTurn, Stream
from ldm.errors import UserError
from ldm.files import replacing

Posterior = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
Encode = Callable[[UInt8[Tensor, "b 3 h w"]], Posterior]  # images in 0..255 -> mean, deviation


class CachedDataset:
    """The same stream as the dataset it was made from, of latents: `mean` and `std` (b, c, h, w) in fp16.

    latents: (views, n, 2, c, h, w), the second view mirrored. Token ids are there where a tokenizer was given.
    """

    def __init__(self, shards: Shards, stream: Stream, latents: Tensor, tokenize: Tokenize | None) -> None:
        self.stream, self.latents = stream, latents
        views, n = latents.shape[:2]
        self._flat = latents.reshape(views * n, *latents.shape[2:])
        known: dict[str, int] = {}  # each distinct caption and its number
        numbers, counts, keys = [], [], []
        for shard, index in zip(*(part.tolist() for part in locate(shards.ends, np.arange(n))), strict=True):
            options = shards.describe(shard, index)["captions"]
            numbers += [known.setdefault(option, len(known)) for option in options]
            counts.append(len(options))
            keys.append(shards.samples(shard)[index].key)
        self._numbers, self._counts, self._keys = np.array(numbers), np.array(counts), np.array(keys)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._captions = np.array(list(known), object)
        self._tokens = tokenize(list(known)) if tokenize else None

    def __len__(self) -> int:
        return len(self._counts)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions of the stream."""
        places = np.asarray(positions, np.int64)
        rows, choices = self.stream.rows(places), self.stream.choices(places)
        chosen = self._numbers[self._firsts[rows] + (choices[:, CAPTION] * self._counts[rows]).astype(np.int64)]
        mirrored = (choices[:, FLIP] < 0.5) & (len(self.latents) > 1)
        latents = self._flat[torch.from_numpy(rows + mirrored * len(self))]
        batch = Batch(mean=latents[:, 0], std=latents[:, 1], position=torch.from_numpy(places))
        batch["caption"], batch["key"] = self._captions[chosen].tolist(), self._keys[rows].tolist()
        if self._tokens is not None:
            batch["tokens"] = self._tokens[torch.from_numpy(chosen)]
        return batch


def cache_latents(
    dataset: ShardDataset,
    encode: Encode,
    folder: str | Path,
    *,
    model: str,
    batch_size: int = 64,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> CachedDataset:
    """The dataset with its pictures encoded: read from `folder` where they lie there, else encoded and written.

    `model` is a fingerprint of what encodes; `show(done, total)` is called after each batch. UserError for random
    crops, which no cache can hold.
    """
    config = dataset.config
    if config.crop != "center":
        raise UserError(f"latents cannot be cached with crop {config.crop!r}: set it to center, or cache to false")
    about = {
        "model": model,
        "shards": [[entry.name, entry.samples, entry.bytes, entry.sha256] for entry in dataset.shards.entries],
        "transform": {"size": config.size, "crop": config.crop, "flip": config.flip},
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = Path(folder) / f"latents-{key[:16]}.safetensors"
    latents = _read(path, key)
    if latents is None:
        latents = _encode_all(dataset, encode, batch_size, show)
        _write(path, key, latents)
    return CachedDataset(dataset.shards, dataset.stream, latents, dataset.tokenize)


@torch.no_grad()
def _encode_all(dataset: ShardDataset, encode: Encode, batch_size: int, show: Callable[[int, int], None]) -> Tensor:
    total = len(dataset)
    plain = ShardDataset(dataset.shards, InTurn(total), dataset.config)
    views = 2 if dataset.config.flip else 1
    latents = torch.empty(0)
    for batch in loader(plain, batch_size, stop=total, workers=dataset.config.workers):
        first, image = int(batch["position"][0]), batch["image"]
        for view in range(views):
            pair = torch.stack(encode(image.flip(-1) if view else image), 1).to("cpu", torch.float16)
            if not torch.isfinite(pair).all():
                raise UserError(f"the latents of {batch['key'][0]!r} and on are not finite: check the autoencoder")
            if not len(latents):
                latents = torch.empty(views, total, *pair.shape[1:], dtype=torch.float16)
            latents[view, first : first + len(pair)] = pair
        show(first + len(image), total)
    return latents


def _read(path: Path, key: str) -> Tensor | None:
    """The latents of a file; None where there is no file, or one that is broken or of another key."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents") if (file.metadata() or {}).get("key") == key else None
    except SafetensorError:
        return None


def _write(path: Path, key: str, latents: Tensor) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({"latents": latents}, temporary, {"key": key})
