"""Pictures as files: exact bytes, whole files, numbers that nobody takes twice."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow

from ldm import files, images
from ldm.errors import UserError

RED = torch.tensor([[[255, 0, 0]]], dtype=torch.uint8).expand(4, 6, 3)


def test_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-2.0, -1.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5, 0.0, 1.0, 3.0])
    pixels = images.to_pixels(values.expand(1, 3, 1, 7))
    assert pixels.shape == (1, 1, 7, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 1, 2, 128, 255, 255]
    assert images.to_pixels(values.bfloat16().expand(1, 3, 1, 7)).dtype == torch.uint8


def test_a_grid_reads_row_by_row() -> None:
    pixels = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 2, 2, 3)
    square = images.grid(pixels)[0, :, :, 0]
    assert square.shape == (6, 6)
    assert square[0].tolist() == [0, 0, 255, 255, 1, 1]
    assert square[4].tolist() == [2, 2, 255, 255, 255, 255]
    assert images.grid(pixels, columns=3).shape == (1, 2, 10, 3)


def test_a_png_holds_its_pixels_and_its_text(tmp_path: Path) -> None:
    text = {"parameters": "a café", "other": "紫の心 💜\nSteps: 1"}
    path = tmp_path / "x.png"
    path.write_bytes(images.png(RED, text))
    assert images.read_text(path) == text
    with Pillow.open(path) as picture:
        assert picture.size == (6, 4) and picture.mode == "RGB"
        assert picture.getpixel((5, 3)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(40)])
def test_what_is_no_png(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .* as a picture"):
        images.read_text(path)
    with pytest.raises(UserError, match="cannot read"):
        images.read_text(tmp_path / "absent.png")


def test_numbers_go_on_and_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "00041.png").write_text("mine")
    (tmp_path / "notes.png").write_text("mine")
    names = [images.save_next(b"x", tmp_path).name for _ in range(2)]
    assert names == ["00042.png", "00043.png"]
    assert images.save_next(b"x", tmp_path, "grid-", 4).name == "grid-0000.png"
    assert (tmp_path / "00041.png").read_text() == "mine"


def test_many_writers_take_different_numbers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: images.save_next(b"%d" % i, tmp_path), range(40)))
    assert [path.read_bytes() for path in paths] == [b"%d" % i for i in range(40)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:05d}.png" for i in range(40)]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        images.save_next(b"x", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_or_the_reason_told(tmp_path: Path) -> None:
    assert images.folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(UserError, match="cannot write pictures to"):
            images.folder(path)
