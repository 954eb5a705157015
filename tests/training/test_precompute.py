"""scripts/precompute.py: what it keeps trains as what it was made of, by one process or several."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.data.cache import fill
from ldm.data.shards import Shards, write_manifest, write_shard
from ldm.errors import UserError
from ldm.files import sha256
from ldm.training.tasks.denoising import DenoisingTask

SCRIPT = Path(__file__).parents[2] / "scripts/precompute.py"
ASSETS = Path(__file__).parents[1] / "assets/shards"
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
        (["--cash", "x"], "did you mean 'cache'"),
    ],
)
def test_one_line_for_what_cannot_be(monkeypatch, settings, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *settings, *more)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_script_keeps_beside_the_shards_and_a_run_finds_them(monkeypatch, ldm, settings, frozen, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(ASSETS, shards)
    where = [*frozen, "--data.shards", str(shards)]
    run(monkeypatch, *settings, *where, "--text")
    (home,) = shards.glob("latents-*")
    assert len(list(home.glob("0*"))) == 2
    task = build(ldm, *where, "--cache", "beside")
    assert "states" in task.dataset.__getitems__([0])
    assert list(shards.glob("latents-*")) == [home]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.slow
def test_accelerate_launch_killed_and_run_again_keeps_what_one_process_keeps(settings, tmp_path):
    """Two processes, killed once the first shard is there; `accelerate launch` is started by its module, since its
    command imports torchvision, which may not fit torch."""
    shards = tmp_path / "shards"
    source = Shards(str(ASSETS))
    threes = [[(f"{i}", source.sample(0, i).members) for i in range(3 * s, 3 * s + 3)] for s in range(6)]
    write_manifest(shards, [write_shard(shards / f"{s:05d}.tar", samples) for s, samples in enumerate(threes)])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    launch += ["--main_process_port", "29711"]
    command = [str(SCRIPT), *settings, "--data.shards", str(shards), "--batch", "1", "--data.workers", "0"]
    process = subprocess.Popen([*launch, *command, "--cache", str(tmp_path / "two")], env=env, start_new_session=True)
    limit = time.monotonic() + 300
    while not list(tmp_path.glob("two/0*")) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    before = {path: path.stat().st_ino for path in tmp_path.glob("two/0*")}
    assert 0 < len(before) < 6
    subprocess.run([*launch, *command, "--cache", str(tmp_path / "two")], env=env, check=True, timeout=300)
    subprocess.run([sys.executable, *command, "--cache", str(tmp_path / "one")], env=env, check=True, timeout=300)
    assert {path: path.stat().st_ino for path in before} == before
    assert {n: d for n, d in digests(tmp_path / "two").items() if not n.endswith(".tmp")} == digests(tmp_path / "one")
    assert len(digests(tmp_path / "one")) == 7
