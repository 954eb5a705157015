"""scripts/precompute.py: what it keeps trains as what it was made of, by one process or several."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.data.cache import fill
from ldm.errors import UserError
from ldm.training.tasks.denoising import DenoisingTask

SCRIPT = Path(__file__).parents[2] / "scripts/precompute.py"
CPU = torch.device("cpu")


@pytest.fixture
def frozen(tiny_model: Path) -> list[str]:
    return ["--text.train", "false", "--text.weights", str(tiny_model), "--text.tower.layers", "2"]


def build(ldm, *overrides: str) -> DenoisingTask:
    torch.manual_seed(0)
    task = DenoisingTask(ldm(*overrides))
    for parameter in task.backbone.parameters():
        if not parameter.any():  # what starts at zero would hide all behind it
            torch.nn.init.normal_(parameter, std=0.1)
    task.to(CPU)
    return task


def losses(task: DenoisingTask) -> torch.Tensor:
    return torch.stack(
        [task.denoising_loss({"step": 0} | task.dataset.__getitems__(range(p, p + 4)))["loss"] for p in (0, 4, 60)]
    )


def test_losses_with_kept_latents_and_text_are_those_without(ldm, tmp_path, frozen):
    dropout = ["--loss.caption_dropout", "0.5", "--data.flip", "true"]
    plain = build(ldm, *frozen, *dropout)
    fill(plain.pictures, plain.encoders(text=True, crops=1), tmp_path / "kept")
    kept = build(ldm, *frozen, *dropout, "--cache", str(tmp_path / "kept"))
    batch = kept.dataset.__getitems__(range(4))
    assert {"mean", "std", "states", "tokens"} <= set(batch) and "image" not in batch
    kept.text.encode = None  # type: ignore[assignment]  # no text is encoded any more
    torch.testing.assert_close(losses(kept), losses(plain), rtol=2e-3, atol=0)  # fp16
    dropped = torch.tensor([True, False, True, False])
    empty = plain.encode_text(plain.text.tokenize([""])).tokens[0]
    torch.testing.assert_close(kept.conditions(batch, dropped).tokens[2], empty, rtol=0, atol=2e-3)


def test_text_of_a_trained_tower_cannot_be_kept(ldm):
    with pytest.raises(UserError, match="set text.train to false"):
        build(ldm).encoders(text=True, crops=1)


@pytest.fixture
def settings(tmp_path: Path, texts, tiny_model: Path) -> list[str]:
    path = tmp_path / "ldm.yaml"
    path.write_text(texts["ldm"])
    return [str(path), "--autoencoder", str(tiny_model)]


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_keeps_and_goes_on(monkeypatch, settings, frozen, tmp_path, capsys):
    folder = tmp_path / "kept"
    command = [*settings, *frozen, "--cache", str(folder), "--text", "--batch", "16"]
    run(monkeypatch, *command)
    assert "60 pictures are encoded" in capsys.readouterr().out
    assert json.loads((folder / "cache.json").read_text())["text"]
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("0000*")}
    assert len(first) == 2 and (folder / "empty.safetensors").is_file()
    gone = sorted(folder.glob("0000*"))[1]
    gone.unlink()
    run(monkeypatch, *command)
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("0000*")}
    assert [name for name in first if first[name] != again[name]] == [gone.name]


def test_the_script_keeps_crops(monkeypatch, settings, tmp_path):
    run(monkeypatch, *settings, "--cache", str(tmp_path / "kept"), "--data.crop", "random", "--crops", "3")
    assert json.loads((tmp_path / "kept/cache.json").read_text())["crops"] == 3


@pytest.mark.parametrize(
    "more, message",
    [
        (["--crops", "0"], "whole number of at least 1"),
        ([], "give --cache DIR"),
        (["--cash", "x"], "did you mean 'cache'"),
    ],
)
def test_one_line_for_what_cannot_be(monkeypatch, settings, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *settings, *more)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_keep_what_one_keeps(settings, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29711", "--"]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        command = [*start, str(SCRIPT), *settings, "--cache", str(tmp_path / name)]
        subprocess.run(command, env=env, check=True, timeout=300)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 3
