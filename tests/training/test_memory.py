"""The memory of a step is said before it is taken: compared with what torch's allocator then gives out."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ldm.config import load, to_dict
from ldm.diffusion import constants
from ldm.training import loop
from ldm.training.config import ControlRun, DistilRun, LdmRun
from ldm.training.loop import train
from ldm.training.memory import predict
from ldm.training.tasks.autoencoder import AutoencoderTask
from ldm.training.tasks.controlnet import ControlTask
from ldm.training.tasks.denoising import DenoisingTask
from ldm.training.tasks.distil import DistilTask

TOLERANCE = 0.15
CASES = {
    "vae with discriminator": ("vae", ["--model.channels", "[32, 64]"]),
    "vae bf16": ("vae", ["--model.channels", "[32, 64]", "--run.precision", "bf16"]),
    "unet": ("ldm", ["--backbone.channels", "[64, 128]", "--run.batch_size", "8"]),
    "unet, in parts": ("ldm", ["--backbone.channels", "[64, 128]", "--optim.accumulate", "2", "--cache", "HERE"]),
    "controlnet": ("control", []),
    "consistency": ("distil", ["--optim.kind", "adafactor"]),
    "progressive": ("distil", ["--distil.method", "progressive", "--distil.steps", "4"]),
    "reflow": ("distil", ["--distil.method", "reflow", "--distil.steps", "2"]),
}
TUNED: dict[str, tuple[type[LdmRun], Any]] = {"control": (ControlRun, ControlTask), "distil": (DistilRun, DistilTask)}


def made(kind: str, overrides: list[str], request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The settings of a run and its task; fine-tuning is of the embedded model."""
    if kind in TUNED:
        settings = request.getfixturevalue("ldm")("--data.size", "64", "--run.steps", "2")
        text = {"data": to_dict(settings.data), "run": to_dict(settings.run)}
        (path := request.getfixturevalue("tmp_path") / "tuned.yaml").write_text(json.dumps(text))
        return (settings := load(TUNED[kind][0], path, overrides)), TUNED[kind][1](settings)
    settings = request.getfixturevalue(kind)("--run.steps", "2", "--data.size", "64", *overrides)
    return settings, (AutoencoderTask if kind == "vae" else DenoisingTask)(settings)


def allocated(trace: Path) -> int:
    """The most bytes that were given out at one time, besides what tests before have left."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    first = min(events, key=lambda event: event["ts"])["args"]
    return max(event["args"]["Total Allocated"] for event in events) - first["Total Allocated"] + first["Bytes"]


QUICK = ("vae bf16", "controlnet", "consistency")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_predicted_is_what_a_run_takes(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind, overrides = CASES[name]
    overrides = [str(tmp_path) if word == "HERE" else word for word in overrides]
    # on a GPU the copy for a checkpoint lies elsewhere
    monkeypatch.setattr(loop, "copied", lambda tensors, keep: {})
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        settings, task = made(kind, overrides, request)
        monkeypatch.setattr(task, "validate", dict)
        monkeypatch.setattr(task, "sample", lambda: (torch.zeros(1, 3, 8, 8), 1))
        monkeypatch.setattr(task, "export", lambda *_: None)
        predicted = predict(task, settings)
        train(task, settings, tmp_path / "run")
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert predicted.total == pytest.approx(allocated(tmp_path / "trace.json"), rel=TOLERANCE)


def test_a_prediction_uses_constants_and_leaves_none_without_data(request: pytest.FixtureRequest, tmp_path: Path):
    settings, task = made("distil", ["--optim.kind", "adafactor"], request)
    constants.forget()
    constants.scalar(1.0, torch.float32)  # met by the prediction, as it is
    predict(task, settings)
    assert not isinstance(constants.scalar(1.0, torch.float32), FakeTensor)
    for n in range(1, 2 * settings.run.batch_size + 1):
        assert not isinstance(constants.uniform(1.0, n, torch.float32, torch.device("cpu")), FakeTensor)


def test_what_the_prediction_knows(ldm, tmp_path: Path):
    def of(*overrides: str, processes: int = 1) -> Any:
        settings = ldm(*overrides)
        return predict(DenoisingTask(settings), settings, processes)

    plain = of("--run.batch_size", "8")
    assert of("--run.batch_size", "16").step > 1.5 * plain.step
    assert of("--run.batch_size", "16", processes=2).step == plain.step + plain.weights
    assert of("--run.batch_size", "8", "--optim.kind", "muon").optimizer == plain.optimizer / 2
    assert of("--run.batch_size", "8", "--text.train", "true", "--freeze", "[text.*]").weights < plain.weights
    split = of("--run.batch_size", "16", "--run.shard", "true", processes=2)
    assert (split.optimizer, split.average) == (plain.optimizer // 2, plain.average // 2)
    assert str(plain).startswith(f"{plain.total / 1e6:.1f} MB for a step: weights")


def test_the_task_is_left_as_it_was(vae, run, tmp_path: Path):
    settings = vae("--run.steps", "2")
    results = []
    for name in ("asked", "not"):
        torch.manual_seed(0)
        task = AutoencoderTask(settings)
        if name == "asked":
            predict(task, settings)
        train(task, settings, tmp_path / name)
        results.append((tmp_path / name / "checkpoints/00000002/state.safetensors").read_bytes())
    assert results[0] == results[1]
