"""Chunks are computed once, shared between processes, and found again; pictures say what they show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import images
from ldm.errors import UserError
from ldm.evaluation.store import Found, Kept, Store, key, paint
from ldm.pipeline import load
from ldm.recipe import Request

SHARD = str(Path(__file__).parents[1] / "assets/shards/00001.tar")


class Counter:
    """Numbers as a chunk; remembers what it was asked for, and fails where told."""

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __call__(self, part: range) -> dict[str, Tensor]:
        if self.fails_at in part:
            raise RuntimeError("stopped")
        self.asked += part
        return {"number": torch.tensor(list(part)), "pixels": torch.zeros(len(part), 3, 1, 1, dtype=torch.uint8)}


def test_what_was_computed_is_found_again(tmp_path: Path) -> None:
    store, stopped = Store(tmp_path, chunk=4), Counter(fails_at=8)
    with pytest.raises(RuntimeError):
        store.rows("x", 10, stopped)
    again = Counter()
    assert store.rows("x", 10, again)["number"].tolist() == list(range(10))
    assert stopped.asked == list(range(8)) and again.asked == [8, 9]
    assert "pixels" not in store.rows("x", 10, again)
    store.rows("y", 10, again)
    assert len(again.asked) == 12


def test_processes_share_the_chunks(tmp_path: Path) -> None:
    waits, counters = [], [Counter(), Counter()]
    second = Store(tmp_path, 1, 2, lambda: waits.append("second"), chunk=4)
    assert len(second.make("x", 10, counters[1])) == 3
    first = Store(tmp_path, 0, 2, lambda: waits.append("first"), chunk=4)
    assert first.rows("x", 10, counters[0])["number"].tolist() == list(range(10))
    assert counters[0].asked == [0, 1, 2, 3, 8, 9] and counters[1].asked == [4, 5, 6, 7]
    assert waits == ["second", "first"]


def test_a_key_tells_what_differs() -> None:
    request = Request("a", seed=1)
    assert key("x", [request]) == key("x", [Request("a", seed=1)])
    assert len({key("x", [request]), key("x", [Request("a", seed=2)]), key("y", [request]), key("x", request)}) == 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures: with a text beside, of ours, and without any word."""
    into = tmp_path / "pictures"
    into.mkdir()
    for number, size in enumerate([(20, 16), (16, 16), (16, 16)]):
        Image.fromarray(np.full((*size, 3), 10 * number, np.uint8)).save(into / f"{number}.png")
    (into / "0.txt").write_text("a red apple\nan apple\n")
    return into


def test_found_pictures(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    painter = load(str(tiny_model), "cpu")
    from ldm.jobs import Batch

    (recipe,) = painter.recipes(Batch([Request("a blue sofa")], slice(1)))
    blue = torch.full((16, 16, 3), 7, dtype=torch.uint8)
    (folder / "1.png").write_bytes(images.png(blue, recipe.text()))
    found = Found(str(folder))
    assert found.texts == ["a red apple", "a blue sofa", ""] and found.size == 16
    assert found.read([1, 0]).shape == (2, 3, 16, 16)
    assert found.read([1]).unique().tolist() == [7]
    assert found.captions(5) == ["a red apple", "a blue sofa", "an apple", "a blue sofa"]
    assert Found(SHARD, 32, 8).captions(2) == [Found(SHARD, 32, 8).captions(8)[i] for i in (0, 4)]
    assert Found(str(folder), 8).read([0]).shape == (1, 3, 8, 8)
    some = Found(str(folder), n=2)
    assert some.texts == ["a red apple", "a blue sofa"]
    assert len({found.name, some.name, Found(str(folder), 8).name}) == 3
    (folder / "1.png").write_bytes(images.png(blue + 1, recipe.text()))
    assert Found(str(folder)).name != found.name
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not a PNG"):
        Found(str(folder)).read([2])
    (folder / "metadata.jsonl").write_text('{"file_name": "3.png"}')
    with pytest.raises(UserError, match="cannot read"):
        Found(str(folder))


def test_painted_pictures_depend_on_their_seeds_and_not_on_who_painted(tiny_model: Path, tmp_path: Path) -> None:
    painter = load(str(tiny_model), "cpu")
    requests = [Request(text, seed=seed, steps=2) for seed, text in enumerate(["a", "b", "a", "c", "d"])]

    def painted(folder: str, some: Sequence[Request]) -> Kept:
        return paint(painter, some, Store(tmp_path / folder, chunk=2))

    kept = painted("one", requests)
    assert kept.texts == ["a", "b", "a", "c", "d"]
    pixels = kept.read(range(5))
    assert pixels.shape == (5, 3, 32, 32) and pixels.dtype == torch.uint8
    expected = images.to_pixels(painter.txt2img(*requests[2:4])).permute(0, 3, 1, 2)
    assert torch.equal(kept.read([3, 2]), expected.flip(0))
    assert torch.equal(painted("two", requests).read(range(5)), pixels)
    assert painted("one", requests[:4]).name != kept.name
