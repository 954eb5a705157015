"""Whole runs: they learn, they resume bit for bit, they stop where they must, and the folder says what happened."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.data.dataset import Batch
from ldm.errors import UserError
from ldm.training import checkpoint
from ldm.training.checkpoint import TENSORS
from ldm.training.loop import Outcome, train
from ldm.training.meter import Meter, binned
from ldm.training.tasks.autoencoder import AutoencoderTask
from ldm.training.tasks.denoising import DenoisingTask

TIMES = ("images_per_s", "data_wait_s", "save_stall_s")


def log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in record.items() if name not in TIMES} for record in records]
    for record in kept:
        for name in [name for name, value in record.items() if isinstance(value, list)]:
            record |= {f"{name}.{i}": value for i, value in enumerate(record.pop(name)) if value is not None}
    return kept


def weights(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"{step:08d}" / TENSORS).read_bytes()


def test_a_finished_run_can_be_taken_further(vae, run, tmp_path: Path):
    run(vae("--run.steps", "2"), tmp_path / "a")
    before = (tmp_path / "a/model.safetensors").stat().st_mtime_ns
    run(vae("--run.steps", "2"), tmp_path / "a")
    assert (tmp_path / "a/model.safetensors").stat().st_mtime_ns == before
    run(vae("--run.steps", "4"), tmp_path / "a")
    run(vae("--run.steps", "4"), tmp_path / "b")
    assert weights(tmp_path / "a", 4) == weights(tmp_path / "b", 4)


def test_a_damaged_checkpoint_costs_only_its_steps(vae, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = vae("--run.steps", "4", "--run.checkpoint_every", "2")
    run(settings, tmp_path / "run")
    whole = weights(tmp_path / "run", 4)
    path = tmp_path / "run/checkpoints/00000004" / TENSORS
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run(settings, tmp_path / "run")
    assert "damaged" in capsys.readouterr().err
    assert weights(tmp_path / "run", 4) == whole


def test_a_changed_setting_is_refused_by_name(vae, run, tmp_path: Path):
    run(vae("--run.steps", "1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"optim.lr \(was 0.005, now 0.1\)") as error:
        run(vae("--run.steps", "1", "--optim.lr", "0.1", "--run.keep", "7"), tmp_path / "run")
    assert "keep" not in str(error.value)
    run(vae("--run.steps", "2", "--run.log_every", "2", "--data.workers", "1"), tmp_path / "run")


def test_the_other_kind_of_run_is_refused(vae, ldm, run, tmp_path: Path):
    run(vae("--run.steps", "1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"backbone\.channels"):
        run(ldm("--run.steps", "1"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_accumulation_is_the_big_batch(kind: str, request: pytest.FixtureRequest, run, tmp_path: Path):
    settings = request.getfixturevalue(kind)
    same = ["--run.steps", "3", *([] if kind == "vae" else ["--loss.importance", "true"])]
    run(settings(*same), tmp_path / "one")
    run(settings(*same, "--optim.accumulate", "4"), tmp_path / "four")
    for one, four in zip(log(tmp_path / "one"), log(tmp_path / "four"), strict=True):
        assert one == pytest.approx(four, rel=2e-3)
    assert log(tmp_path / "one")[0] == pytest.approx(log(tmp_path / "four")[0], rel=1e-5)


def test_an_autoencoder_learns_a_handful(vae, run, tmp_path: Path):
    settings = vae("--run.steps", "60", "--run.batch_size", "8", "--loss.adversarial", "0", "--loss.pixel", "l2")
    run(settings, tmp_path / "run")
    losses = [record["loss"] for record in log(tmp_path / "run")]
    assert sum(losses[-3:]) < sum(losses[:3]) / 4


def test_a_denoiser_learns_a_handful(ldm, tmp_path: Path):
    settings = ldm("--run.steps", "120", "--run.batch_size", "8", "--prediction", "eps", "--optim.lr", "1e-2")
    task = DenoisingTask(settings)
    pictures = task.dataset

    class Same:
        def __len__(self) -> int:
            return 2

        def __getitems__(self, positions: Sequence[int]) -> Batch:
            return pictures.__getitems__([p % 2 for p in positions]) | {"position": torch.tensor(positions)}

    task.dataset = Same()
    train(task, settings, tmp_path / "run")
    losses = [record["loss"] for record in log(tmp_path / "run")]
    assert sum(losses[-20:]) / 20 < 0.6 * losses[0]


def poisoned(task: Any, what: str, positions: set[int], seen: dict[int, Any]) -> None:
    """From now on the input, loss or gradient of each batch with one of these positions is not finite.

    `seen` gets the parameters before each step.
    """
    objectives = task.objectives

    def hit(batch: Batch) -> bool:
        return bool(positions & set(batch["position"].tolist()))

    def wrapped() -> list[Any]:
        first, *rest = objectives()

        def loss(batch: Batch) -> dict[str, torch.Tensor]:
            seen[batch["step"]] = [p.clone() for p in next(iter(first.networks.values())).parameters()]
            losses = first.loss(batch)
            if what == "loss" and hit(batch):
                losses["loss"] = losses["loss"] * math.nan
            if what == "gradient" and hit(batch):
                losses["loss"].register_hook(lambda gradient: gradient * math.inf)
            return losses

        return [first._replace(loss=loss), *rest]

    task.objectives = wrapped
    if what == "input":
        to = task.to
        task.to = lambda device: (to(device), setattr(task, "dataset", Infinite(task.dataset, positions)))[0]


class Infinite:
    """A dataset of cached latents, one of which is infinite."""

    def __init__(self, dataset: Any, positions: set[int]) -> None:
        self.dataset, self.positions = dataset, positions

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        batch = self.dataset.__getitems__(positions)
        for row, position in enumerate(positions):
            if position in self.positions:
                batch["mean"][row, 0, 0, 0] = math.inf
        return batch


@pytest.mark.parametrize(
    ("kind", "what"), [("vae", "loss"), ("vae", "gradient"), ("ldm", "loss"), ("ldm", "gradient"), ("ldm", "input")]
)
def test_what_is_not_finite_costs_its_step_only(
    kind: str, what: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cached = ["--cache", str(tmp_path)] if what == "input" else []
    settings = request.getfixturevalue(kind)("--run.steps", "4", "--run.log_every", "2", *cached)
    task = AutoencoderTask(settings) if kind == "vae" else DenoisingTask(settings)
    seen: dict[int, Any] = {}
    poisoned(task, what, {9}, seen)  # in step 3
    assert train(task, settings, tmp_path / "run") == Outcome(4)
    said = capsys.readouterr().err
    assert said.count("is left out") == 1 and f"{what}" in said and "step 3" in said
    for key in task.dataset.__getitems__(range(8, 12))["key"]:
        assert key in said
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True) if a.ndim > 1)
    first, second = log(tmp_path / "run")
    assert "skipped" not in first and second["skipped"] == 1
    assert all(math.isfinite(value) for value in second.values())
    _, (tensors, _) = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert all(value.isfinite().all() for value in tensors.values())


def test_the_average_does_not_move_in_a_step_left_out(ldm, run, tmp_path: Path):
    settings = ldm("--run.steps", "3", "--run.checkpoint_every", "1", "--run.keep", "9")
    task = DenoisingTask(settings)
    poisoned(task, "loss", {9}, {})
    train(task, settings, tmp_path / "run")
    assert weights(tmp_path / "run", 1) != weights(tmp_path / "run", 2)
    assert weights(tmp_path / "run", 2) == weights(tmp_path / "run", 3)  # networks, average and optimiser


def test_too_many_in_a_row_stop_the_run_also_over_a_restart(ldm, run, tmp_path: Path):
    overrides = ["--run.max_skipped", "3", "--run.checkpoint_every", "1", "--run.keep", "9", "--run.steps"]

    def start(steps: int, bad: set[int]) -> None:
        task = DenoisingTask(settings := ldm(*overrides, str(steps)))
        poisoned(task, "loss", bad, {})
        train(task, settings, tmp_path / "run")

    start(6, {0, 5, 17, 21})  # two, two that are well, two
    with pytest.raises(UserError, match="3 steps in a row were left out, the last is step 7;.*Not finite: loss"):
        start(9, {25})
    assert weights(tmp_path / "run", 6) == weights(tmp_path / "run", 4)


def test_a_signal_saves_and_goes_on_bit_for_bit(ldm, run, tmp_path: Path):
    settings = ldm("--run.log_every", "3")
    run(settings, tmp_path / "whole")
    torch.manual_seed(settings.run.seed)
    task = DenoisingTask(settings)
    latent = task.latent

    def interrupting(batch: Batch) -> torch.Tensor:
        if batch["step"] == 1:
            signal.raise_signal(signal.SIGTERM)
        return latent(batch)

    task.latent = interrupting
    outcome = train(task, settings, tmp_path / "stopped")
    assert outcome == Outcome(2, signal.SIGTERM) and outcome.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(settings, tmp_path / "stopped")
    assert weights(tmp_path / "whole", 4) == weights(tmp_path / "stopped", 4)
    assert log(tmp_path / "whole") == log(tmp_path / "stopped")


def test_the_folder_of_a_run(vae, run, tmp_path: Path):
    settings = vae(
        *("--run.steps", "4", "--run.trackers", "[tensorboard]", "--run.validate_every", "2", "--run.validate_on", "5"),
        *("--run.sample_every", "3", "--run.log_every", "2", "--run.keep", "1", "--run.checkpoint_every", "2"),
    )
    folder = tmp_path / "run"
    run(settings, folder)
    from ldm import config

    assert config.load(type(settings), folder / "config.yaml") == settings
    records = log(folder)
    assert [(r["step"], r["images"]) for r in records] == [(2, 8), (4, 16)]
    for record in records:
        assert record.keys() >= {
            "loss",
            "pixel",
            "kl",
            "lr",
            "grad_norm",
            "discriminator_loss",
            "seen_psnr",
            "seen_ssim",
        }
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["00000003.png", "00000004.png"]
    assert [path.name for path in checkpoint.complete(folder / "checkpoints")] == ["00000004"]
    assert list((folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize("folder_is_a_file", [True, False])
def test_a_folder_that_cannot_be(vae, run, tmp_path: Path, folder_is_a_file: bool):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run folder"):
        run(vae(), tmp_path / "file" if folder_is_a_file else tmp_path / "file/run")


def test_a_batch_that_cannot_be_shared(vae, run, tmp_path: Path):
    with pytest.raises(UserError, match="batch_size 4 cannot be shared evenly by 1 processes"):
        run(vae("--optim.accumulate", "3"), tmp_path / "run")


def test_steps_are_compiled_and_previews_are_not(ldm, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[Callable[..., Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    run(ldm("--run.compile", "true", "--run.steps", "1"), tmp_path / "run")
    assert {type(module).__name__ for module in compiled} == {"UNet", "Encoder"}


def test_when_the_model_is_written(ldm, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written, export = list[int](), DenoisingTask.export

    def noted(task: DenoisingTask, path: Path, provenance: dict[str, Any]) -> None:
        written.append(provenance["steps"])
        export(task, path, provenance)

    monkeypatch.setattr(DenoisingTask, "export", noted)
    run(ldm("--run.steps", "3", "--run.checkpoint_every", "1"), tmp_path / "end")
    assert written == [3]
    run(ldm("--run.steps", "3"), tmp_path / "end")
    assert written == [3]
    (tmp_path / "end/model.safetensors").unlink()
    run(ldm("--run.steps", "3"), tmp_path / "end")
    assert written == [3, 3]
    run(ldm("--run.steps", "3", "--run.export_every", "2"), tmp_path / "each")
    assert written == [3, 3, 2, 3]


def test_means_are_those_of_every_process(tmp_path: Path):
    rows = {"loss": [[1.0, 2.0], [3.0, 2.0]]}
    for rank, count, kept in ((1, 2, [3.0, 2.0]), (0, 1, [4.0, 4.0]), (0, 3, [4.0, 4.0]), (2, 3, [0.0, 0.0])):
        meter = Meter(torch.device("cpu"))
        meter.restore(rows, rank, count)
        assert meter.sums["loss"].tolist() == kept


def test_the_loss_by_noise_level_is_in_the_log(ldm, run, tmp_path: Path):
    run(ldm("--run.steps", "4", "--run.log_every", "4", "--run.batch_size", "8"), tmp_path)
    (record,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(record["loss_by_sigma"]) == 8
    assert min(filter(None, record["loss_by_sigma"])) < record["loss"] < max(filter(None, record["loss_by_sigma"]))
    sums, counts = binned(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 0.1, 0.99]), 4)
    assert sums.tolist() == [3, 0, 0, 5] and counts.tolist() == [2, 0, 0, 1]


def test_a_tracker_that_is_not_installed(ldm, run, tmp_path: Path):
    with pytest.raises(UserError, match="pip install notracker"):
        run(ldm("--run.trackers", "[notracker]"), tmp_path)


def test_two_runs_in_one_folder_are_refused(vae, run, tmp_path: Path):
    """The lock is of a process and goes with it, however it dies."""
    (tmp_path / "run").mkdir()
    lock = "f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, sys; {lock}", str(tmp_path / "run/.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(UserError, match="another run is going on in"):
            run(vae(), tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()
    assert run(vae("--run.steps", "1"), tmp_path / "run").step == 1
