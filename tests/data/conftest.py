"""Small pictures, samples and shards."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.shards import write_manifest, write_shard

Sample = tuple[str, dict[str, bytes]]


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """The bytes of a picture in a format."""

    def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        target = io.BytesIO()
        image.save(target, kind, **options)
        return target.getvalue()

    return encode


@pytest.fixture
def picture(encoded) -> Callable[..., bytes]:
    """A noise picture, (height, width), another for each number."""

    def make(number: int, size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8)
        return encoded(Image.fromarray(pixels), kind)

    return make


@pytest.fixture
def sample(picture) -> Callable[[int], Sample]:
    def make(number: int) -> Sample:
        about = json.dumps({"captions": [f"thing {number}", f"a thing {number}"], "number": number}).encode()
        return f"{number:09d}", {"png": picture(number), "txt": f"thing {number}".encode(), "json": about}

    return make


@pytest.fixture
def folder(tmp_path: Path, sample) -> Path:
    """Three shards of 5, 6 and 7 samples, with their manifest."""
    entries = [write_shard(tmp_path / f"{s:05d}.tar", map(sample, range(s * 10, s * 10 + 5 + s))) for s in range(3)]
    write_manifest(tmp_path, entries)
    return tmp_path


@pytest.fixture
def assets() -> str:
    """The shards that are committed: 60 real pictures of 64 pixels."""
    return str(Path(__file__).parents[1] / "assets/shards/{00000..00001}.tar")
