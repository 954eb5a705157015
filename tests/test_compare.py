"""The scripts that draw docs/finetuning.md: sheets of several ways to paint, and how well a ControlNet is followed."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import pipeline
from ldm.families.control import save_controlnet
from ldm.models.controlnet import ControlNet
from ldm.request import Request

ROOT = Path(__file__).parents[1]
SHARDS = str(ROOT / "tests/assets/shards/00000.tar")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """call("compare.py", "--row", ...): what the script prints."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_row_is_what_txt2img_paints_in_that_way(call: Any, tiny_model: Path, tmp_path: Path) -> None:
    shown = tmp_path / "shown.png"
    Image.new("RGB", (50, 50), "red").save(shown)
    rows = ["--row", f"model={tiny_model}", "--row", f"model={tiny_model} steps=2 sampler=euler"]
    sheet = tmp_path / "sheet.png"
    call("compare.py", "--prompts", "a dog", "a cat", *rows, "--seed", 7, "--pictures", shown, "--out", sheet)
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (3 * 34 - 2, 2 * 34 - 2, 3)
    assert (pixels[:32, :32] == (255, 0, 0)).all() and (pixels[:32, 34:] == 255).all()
    painter = pipeline.load(str(tiny_model))
    for row, how in enumerate(({}, {"steps": 2, "sampler": "euler"})):
        for column, prompt in enumerate(("a dog", "a cat")):
            (image,) = painter.txt2img(Request(prompt, seed=7 + column, **how))  # type: ignore[arg-type]
            own = pixels[34 * row + 34 :][:32, 34 * column :][:, :32].astype(float)
            there = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu().float().numpy()
            assert np.abs(own - there).max() < 3, "but for what a batch rounds otherwise"


def test_what_no_row_can_say_is_refused(call: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("compare.py", "--prompts", "a dog", "--row", f"model={tiny_model} stepz=2")
    assert "no way of painting is called 'stepz' (did you mean 'steps'?)" in capsys.readouterr().err


def test_a_control_is_measured_with_and_without_it(call: Any, tiny_model: Path, tmp_path: Path) -> None:
    painter = pipeline.load(str(tiny_model))
    assert painter.model.backbone is not None
    control = ControlNet(painter.model.backbone.config, 3, (16, 32), unet=painter.model.backbone)
    for layer in control.zero:
        torch.nn.init.normal_(layer.weight)
    save_controlnet(tmp_path / "control", control, 16, {})
    said = call(
        "measure_control.py", tmp_path / "control", "--data", SHARDS, "--model", tiny_model, "--n", 3, "--shown", 2,
        "--out", tmp_path / "sheet.png",
    )  # fmt: skip
    assert len(re.findall(r"F1 of edges (?:with|without) it: [01]\.\d{3} over 3 pictures", said)) == 2
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (4 * 34 - 2, 2 * 34 - 2, 3)
    assert not np.array_equal(pixels[68:100], pixels[102:]), "the control steers"
