"""What `run.precision` means to the machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.config import OptimConfig, RunConfig
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
