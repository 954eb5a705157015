"""The script that tells how a picture was made."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from ldm import images
from ldm.recipe import Made, Recipe, Request

SCRIPT = Path(__file__).parents[1] / "scripts/png_info.py"


def test_png_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("png_info", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = Recipe(Request("a cat", seed=3, sampler="euler_a", steps=5, cfg_scale=2.0), Made("tiny", "abc"))
    black = torch.zeros(2, 2, 3, dtype=torch.uint8)
    (tmp_path / "ours.png").write_bytes(images.png(black, made.text()))
    (tmp_path / "theirs.png").write_bytes(images.png(black, {"parameters": made.text()["parameters"]}))
    (tmp_path / "none.png").write_bytes(images.png(black))

    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["png_info", *map(str, flags)])
        script.main()
        return capsys.readouterr().out

    said = run(tmp_path / "ours.png", tmp_path / "theirs.png")
    assert "ours.png: by ldm\n  prompt: a cat" in said and "theirs.png: by AUTOMATIC1111" in said
    data = json.loads(run(tmp_path / "ours.png", "--json"))
    assert data["request"]["sampler"] == "euler_a" and data["made"]["model_hash"] == "abc"
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "none.png")
    assert stop.value.code == 2 and "holds no recipe" in capsys.readouterr().err
