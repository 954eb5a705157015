"""Plain folders of pictures, given where shards are."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm.data.dataset import open_dataset, open_validation
from ldm.data.stream import DataConfig
from ldm.errors import UserError


@pytest.fixture
def photos(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Four pictures of several formats and sizes, three of them with a .txt."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "PNG")):
        (folder / f"{number}.{kind.lower()}").write_bytes(picture(number, (16 + 4 * number, 24), kind))
        if number < 3:
            (folder / f"{number}.txt").write_text(f"thing {number}")
    return folder


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(str(photos), size=16, workers=0, copies=str(tmp_path / "copies"))


def captions(config: DataConfig) -> list[str]:
    dataset = open_dataset(config)
    return sorted(dataset.__getitems__(range(len(dataset)))["caption"])


@pytest.mark.filterwarnings("ignore:1 pictures")
def test_pictures_and_their_captions_are_those_of_the_folder(config: DataConfig, photos: Path) -> None:
    assert captions(config) == ["thing 0", "thing 1", "thing 2"]

    batch = open_validation(replace(config, validation=str(photos))).__getitems__(range(3))
    assert batch["image"].shape == (3, 3, 16, 16) and sorted(batch["caption"]) == captions(config)


def test_a_picture_that_cannot_be_used_is_said(config: DataConfig) -> None:
    with pytest.warns(UserWarning, match="1 pictures in '.*my photos' are left out, no caption"):
        open_dataset(config)


def test_one_caption_for_all_of_them(config: DataConfig, photos: Path, tmp_path: Path) -> None:
    assert captions(replace(config, caption="a photo: <mine>")) == ["a photo: <mine>"] * 4
    shutil.copytree(photos, tmp_path / "others")
    both = replace(config, shards=f"{photos}:0.5,{tmp_path / 'others'}:0.5", caption="a zqx dog|a dog")
    assert captions(both) == ["a dog"] * 4 + ["a zqx dog"] * 4
    with pytest.raises(UserError, match="has 2 parts for 1 sources"):
        open_dataset(replace(config, caption="a|b"))


def test_a_folder_is_prepared_once_and_again_when_it_changes(
    config: DataConfig, photos: Path, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, caption="it")
    before = open_dataset(config).__getitems__(range(12))
    with monkeypatch.context() as patched:
        patched.setattr("ldm.data.folders.prepare", lambda *_: pytest.fail("prepared again"))
        again = open_dataset(config).__getitems__(range(12))
    assert np.array_equal(before["image"], again["image"]) and before["key"] == again["key"]
    (photos / "0.png").write_bytes(picture(9))
    (changed,) = set(open_dataset(config).__getitems__(range(4))["image"].flatten(1).sum(1).tolist()) - set(
        before["image"].flatten(1).sum(1).tolist()
    )
    assert changed


def test_what_is_wrong_with_a_folder_is_one_line(config: DataConfig, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="'.*empty' holds no images"):
        open_dataset(replace(config, shards=str(tmp_path / "empty")))
    for text in photos.glob("*.txt"):
        text.unlink()
    with pytest.raises(UserError, match="none of the 4 pictures .* no caption; give each a .txt, or all"):
        open_dataset(config)
    assert not list((tmp_path / "copies-of-folders").iterdir()), "nothing half done stays"
