"""The scripts as a person runs them."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training.trainee import records

from ldm import config
from ldm.checkpoints import native
from ldm.models import speed
from ldm.training.config import LdmRun, VaeRun

ROOT = Path(__file__).parents[2]
SHARDS = str(ROOT / "tests/assets/shards/{00000..00001}.tar")


def command(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a script in this process: its exit code, stdout and stderr."""

    def run(script: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command(script, *arguments)[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return int(end.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optim.lrr", "1"], "unknown field 'optim.lrr' (did you mean 'lr'?)"),
        (["--run.precision", "fp17"], "run.precision is 'fp17'"),
        (["--run.batch_size", "0"], "run: batch_size is 0: give at least 1"),
        (["--run.steps", "0"], "run: steps is 0: give at least 1"),
        (["--run.log_every", "-1"], "run: log_every is -1: give at least 0"),
        (["--optim.accumulate", "0"], "optim: accumulate is 0: give at least 1"),
        (["--data.shards", "nowhere/{0..3}.tar"], "nowhere/0.tar"),
        ([], "no shards match"),
    ],
)
def test_one_line_for_a_mistake(here, overrides: list[str], message: str, tmp_path: Path):
    code, _, error = here("train_vae.py", "configs/tiny/vae.yaml", "--run", tmp_path / "run", *overrides)
    assert code == 2 and message in error and error.count("\n") == 1


def test_the_run_folder_and_the_config_are_asked_for(here, tmp_path: Path):
    code, _, error = here("train_vae.py", "configs/tiny/vae.yaml")
    assert code == 2 and "--run" in error and error.count("\n") == 1
    code, _, error = here("train_vae.py", "nowhere.yaml", "--run", tmp_path)
    assert code == 2 and "cannot read config" in error


def test_help_lists_the_fields(here, monkeypatch: pytest.MonkeyPatch):
    kept: list[bool] = []
    monkeypatch.setattr(speed, "keep_memory", lambda: kept.append(True))
    code, text, _ = here("train_ldm.py", "--help")
    assert kept, "a training script keeps the memory that it frees"
    assert code == 0 and "--optim.lr 0.0001" in text and "--run.steps (needed)" in text


def test_ctrl_c_saves_and_the_same_command_goes_on(here, tmp_path: Path):
    run = tmp_path / "run"
    arguments = ["configs/tiny/vae.yaml", "--run", run, "--data.shards", SHARDS, "--run.trackers", "[]"]
    arguments += ["--data.size", "32", "--data.workers", "1", "--run.log_every", "1", "--loss.adversarial", "0"]
    steps = ["--run.steps", "100000"]
    process = subprocess.Popen(
        command("train_vae.py", *arguments, *steps), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = run / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the processes that read data get it too
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert error.startswith("memory: ") and "for a step: weights" in error
    assert "Traceback" not in error and "which is saved" in error and error.count("finishing this step") == 1
    done = int(next((run / "checkpoints").iterdir()).name)
    assert done == json.loads(log.read_text().splitlines()[-1])["step"]

    code, _, error = here("train_vae.py", *arguments, "--run.steps", str(done + 1))
    assert code == 0 and "going on from" in error
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, done + 2))
    assert native.read_spec(run / "model.safetensors").provenance["steps"] == done + 1


@pytest.mark.parametrize(("name", "kind"), [("tiny/vae", VaeRun), ("tiny/ldm", LdmRun)])
def test_configs_are_whole_and_name_no_shards(name: str, kind: type):
    settings = config.load(kind, ROOT / f"configs/{name}.yaml")
    assert settings.data.shards == ""


@pytest.mark.slow
def test_tiny_runs_end_in_a_model(tmp_path: Path):
    vae, ldm = tmp_path / "vae", tmp_path / "ldm"
    subprocess.run(
        command("train_vae.py", ROOT / "configs/tiny/vae.yaml", "--run", vae, "--data.shards", SHARDS), check=True
    )
    model = ["--autoencoder", vae / "model.safetensors"]
    arguments = [ROOT / "configs/tiny/ldm.yaml", "--run", ldm, "--data.shards", SHARDS, *model]
    subprocess.run(command("train_ldm.py", *arguments), check=True)
    for folder, metric, least in ((vae, "seen_psnr", 15.0), (ldm, "seen_loss", 0.0)):
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert records[-1]["loss"] < 0.8 * records[0]["loss"]
        assert records[-1][metric] > least
    assert native.load(ldm / "model.safetensors").backbone is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_two_processes_take_the_steps_of_one(kind: str, texts: dict[str, str], tmp_path: Path, tiny_model: Path):
    (tmp_path / "config.yaml").write_text(texts[kind])
    extra = (
        []
        if kind == "vae"
        else ["--autoencoder", str(tiny_model), "--cache", str(tmp_path), "--loss.importance", "true"]
    )
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    for name, launch in (("one", [sys.executable]), ("two", two)):
        script = str(ROOT / f"scripts/train_{kind}.py")
        arguments = [script, str(tmp_path / "config.yaml"), "--run", str(tmp_path / name), *extra]
        subprocess.run([*launch, *arguments], check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    logs = [records(tmp_path / name) for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=5e-3)
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-5)
