"""Curves of runs from their logs."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.errors import UserError
from ldm.evaluation.curves import curves, read, series, smoothed

ROOT = Path(__file__).parents[2]


def write(run: Path, records: list[dict[str, Any]], end: str = "") -> Path:
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return run


def test_each_quantity_has_a_panel_and_each_run_a_colour(tmp_path: Path):
    many = [{"step": i, "images": 8 * i, "loss": 1 / i, "lr": 1e-3, "data_wait_s": 0.1} for i in range(1, 41)]
    many[9] |= {"validation_loss": 0.5, "skipped": 1}
    few = [{"step": 10 * i, "loss": 0.3, "loss_by_sigma": [1.0, None, i]} for i in (1, 2, 3)]
    runs = {"a": read(write(tmp_path / "a", many)), "b": read(write(tmp_path / "b", few))}
    axes = [axis for axis in curves(runs).axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == ["loss", "loss by sigma", "validation loss", "lr"]
    loss, bars, validation, _ = axes
    colours = {line.get_color() for line in loss.lines if len(line.get_xdata())}
    assert len(colours) == 2 and loss.get_xlim() == (0, pytest.approx(40.8))
    assert list(loss.lines[0].get_ydata()) == [1 / i for i in range(1, 41)]
    assert any(list(line.get_xdata()) == [10, 10] for line in loss.lines)  # a step that was left out
    assert [bar.get_height() for bar in bars.patches] == [1.0, 0.0, 3.0]  # of the last third
    assert len(validation.lines) == 2 + 1  # a line of one point, that point, and nothing of the other run


def test_smoothing_has_no_lag():
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1, 2, 3, 4, 5]
    assert smoothed([0.0, 3.0, 0.0], 1) == [0, 1, 0]


def test_a_log_cut_short_and_what_is_no_number(tmp_path: Path):
    run = write(tmp_path / "a", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}], end='{"step": 3, "lo')
    assert len(read(run)) == 2 and series(read(run), "loss") == ([1], [1.0])


def test_the_script_and_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run = write(tmp_path / "a", [{"step": 1, "loss": 1.0}])
    for arguments, code in (([run], 0), ([run, tmp_path / "none"], 2), ([run, "--out", tmp_path / "a"], 2)):
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "scripts/plot_run.py"), run_name="__main__")
        except SystemExit as end:
            assert end.code == code and capsys.readouterr().err.count("\n") == 1
        else:
            assert code == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="has no line yet"):
        read(write(tmp_path / "empty", []))
