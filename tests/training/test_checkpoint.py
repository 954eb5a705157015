"""Checkpoints: whole or absent, checked, and what is done about those that are damaged."""

import json
import threading
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.training import checkpoint


def saved(step: int) -> checkpoint.Saved:
    tensors = {"a.weight": torch.full((2, 3), float(step)), "b": torch.tensor(step, dtype=torch.int64)}
    return tensors, {"step": step}


def steps(folder: Path) -> list[int]:
    return [int(path.name) for path in checkpoint.complete(folder)]


def no_warning(line: str) -> None:
    raise AssertionError(line)


def test_what_is_written_is_read(tmp_path: Path):
    checkpoint.write(tmp_path, 7, saved(7), keep=1)
    path, (tensors, state) = checkpoint.newest(tmp_path, no_warning)
    assert path.name == "00000007" and state == {"step": 7}
    assert all(torch.equal(tensors[name], value) for name, value in saved(7)[0].items())
    assert not any("pickle" in p.read_bytes().decode("latin1") for p in path.iterdir())


def test_channels_last_is_kept_by_value(tmp_path: Path):
    value = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoint.write(tmp_path, 1, ({"w": value}, {}), keep=1)
    assert torch.equal(checkpoint.newest(tmp_path, no_warning)[1][0]["w"], value)


def test_no_checkpoint(tmp_path: Path):
    assert checkpoint.newest(tmp_path, no_warning) is None


def test_the_last_ones_stay(tmp_path: Path):
    for step in range(1, 6):
        checkpoint.write(tmp_path, step, saved(step), keep=2)
    assert steps(tmp_path) == [4, 5]


def damage(path: Path, how: str) -> None:
    tensors = path / checkpoint.TENSORS
    if how == "a flipped bit":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif how == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif how == "a file gone":
        (path / checkpoint.STATE).unlink()
    elif how == "manifest":
        (path / checkpoint.MANIFEST).write_text("{")
    else:
        (path / checkpoint.MANIFEST).write_text(json.dumps([]))


@pytest.mark.parametrize("how", ["a flipped bit", "cut short", "a file gone", "manifest", "a manifest of another kind"])
def test_a_damaged_one_is_put_aside_for_the_one_before(tmp_path: Path, how: str):
    for step in (1, 2):
        checkpoint.write(tmp_path, step, saved(step), keep=5)
    damage(tmp_path / "00000002", how)
    said: list[str] = []
    path, (_, state) = checkpoint.newest(tmp_path, said.append)
    assert state["step"] == 1 and path.name == "00000001"
    assert len(said) == 1 and "00000002" in said[0] and "damaged" in said[0]
    assert (tmp_path / "damaged-00000002").is_dir()


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path):
    checkpoint.write(tmp_path, 1, saved(1), keep=5)
    damage(tmp_path / "00000001", "cut short")
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.newest(tmp_path, lambda line: None)


def test_a_half_written_one_is_no_checkpoint(tmp_path: Path):
    checkpoint.write(tmp_path, 1, saved(1), keep=5)
    (tmp_path / ".00000002.partial").mkdir()
    (tmp_path / ".00000002.partial" / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.newest(tmp_path, no_warning)[0].name == "00000001"
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.write(tmp_path, 1, saved(1), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write(tmp_path, 2, saved(2), keep=1)
    assert steps(tmp_path) == [1]


def test_every_nth_stays_too(tmp_path: Path):
    for step in range(1, 8):
        checkpoint.write(tmp_path, step, saved(step), keep=1, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7]


def test_a_checkpoint_is_not_written_twice(tmp_path: Path):
    checkpoint.write(tmp_path, 1, saved(1), keep=1)
    before = (tmp_path / "00000001").stat().st_ino
    checkpoint.write(tmp_path, 1, saved(1), keep=1)
    assert (tmp_path / "00000001").stat().st_ino == before


def test_all_damaged_stays_an_error_when_started_again(tmp_path: Path):
    checkpoint.write(tmp_path, 1, saved(1), keep=5)
    damage(tmp_path / "00000001", "cut short")
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint"):
            checkpoint.newest(tmp_path, lambda line: None)


def test_a_writer_works_beside_the_training_one_thing_at_a_time():
    go, done = threading.Event(), list[int]()
    with checkpoint.Writer() as writer:
        writer.start(lambda: (go.wait(10), done.append(1)))
        assert not done  # start came back at once
        threading.Timer(0.05, go.set).start()
        writer.start(lambda: done.append(2))
        assert done[0] == 1
    assert done == [1, 2]


def test_what_goes_wrong_in_a_writer_is_raised():
    def full() -> None:
        raise UserError("No space left")

    with pytest.raises(UserError, match="No space"), checkpoint.Writer() as writer:
        writer.start(full)
        for asked in (writer.wait, writer.check, lambda: writer.start(full)):
            with pytest.raises(UserError, match="No space"):
                asked()
        raise UserError("No space, which the end does not hide")
    with pytest.raises(UserError, match="No space"), checkpoint.Writer() as writer:
        writer.start(full)  # said at the latest at the end
