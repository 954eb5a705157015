"""What `run.precision` means to the machine."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.training import processes
from ldm.training.config import OptimConfig, RunConfig
from ldm.training.learner import SCALE, STREAK, Batch, Learner, Loss, Losses
from ldm.training.processes import Processes, faults, precision


@pytest.fixture
def tf32() -> Iterator[list[Any]]:
    """Where torch keeps the choice, which is then put back."""
    both: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [flags.allow_tf32 for flags in both]
    yield both
    for flags, value in zip(both, before, strict=True):
        flags.allow_tf32 = value


@pytest.mark.parametrize(("name", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("auto", True)])
def test_only_fp32_is_exact(name: str, allowed: bool, vae, tmp_path: Path, tf32) -> None:
    for flags in tf32:
        flags.allow_tf32 = not allowed
    settings = vae("--run.precision", name)
    Processes(settings.run, settings.optim, tmp_path)
    assert [flags.allow_tf32 for flags in tf32] == [allowed, allowed]


@pytest.mark.parametrize(("name", "mixed"), [("fp32", "no"), ("tf32", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_what_accelerate_is_told(name: str, mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(steps=1, batch_size=1, precision=name, trackers=())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision(run) == mixed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(faults(run, OptimConfig(), 1))
    assert found == (["run.precision fp16 needs a GPU: take bf16, which CPUs compute in too"] if name == "fp16" else [])


def test_a_run_in_fp16_leaves_out_what_overflows_and_goes_on_bit_for_bit(
    ldm, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's matter, done here in the CPU's own fp16, which is slow; the scale is made too large on the way."""
    backward, seen = Learner.backward, set[torch.dtype]()

    def scaled(learner: Learner, batch: Batch, parts: int, *, last: bool) -> Losses:
        if batch["step"] in (0, 4):
            learner.scaler[SCALE].fill_(2.0**40 if batch["step"] else 2.0**14)
        return backward(learner, batch, parts, last=last)

    def forward(module: Loss, batch: Batch) -> Losses:
        with torch.autocast("cpu", torch.float16):
            seen.add(nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype)
            return module.function(batch)

    monkeypatch.setattr(processes, "faults", lambda *_: iter(()))
    monkeypatch.setattr(Learner, "backward", scaled)
    monkeypatch.setattr(Loss, "forward", forward)
    words = ["--run.precision", "fp16", "--run.checkpoint_every", "1", "--run.keep", "9", "--run.validate_on", "1"]
    for name, ends in (("whole", ["6"]), ("parts", ["2", "6"])):
        for steps in ends:
            run(ldm(*words, "--run.steps", steps), tmp_path / name)
    files = [sorted((tmp_path / name / "checkpoints").glob("*/state.safetensors")) for name in ("whole", "parts")]
    assert seen == {torch.float16} and len(files[0]) == 6
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]

    names = [f"learners.denoiser.{name}" for name in (SCALE, STREAK)]
    for step, (one, other) in enumerate(itertools.pairwise(load_file(file) for file in files[0]), 1):
        (_, streak), (scale, streak_after) = ([state[name] for name in names] for state in (one, other))
        moved = {name for name in one.keys() - names if not torch.equal(one[name], other[name])}
        if step == 4:
            assert not moved and scale == 2.0**39 and streak_after == 0 < streak
        elif step < 4:
            assert scale == 2.0**14 and streak_after == streak + 1
            for part in ("networks.", "ema.", "learners."):
                assert any(name.startswith(part) for name in moved)
