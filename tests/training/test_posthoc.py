"""Averages put together after training: the profiles, their best combination, and the command."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoints import native
from ldm.errors import UserError
from ldm.training.config import EmaConfig
from ldm.training.ema import Ema, coefficients, exponent, inner, reconstruct

ROOT = Path(__file__).parents[2]
STEPS = 200


def profile(until: float, power: float, n: int = STEPS) -> np.ndarray:
    """The share of each step, the integral of p over it; 0 behind the end."""
    edges = np.minimum(np.arange(n + 1) / until, 1) ** (power + 1)
    return np.diff(edges)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_has_its_width(width: float) -> None:
    power, t = exponent(width), (np.arange(100_000) + 0.5) / 100_000
    p = profile(100_000, power, 100_000)
    assert np.sqrt((p * t**2).sum() - (p * t).sum() ** 2) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize(("a", "b"), [((1.0, 3.0), (1.0, 7.0)), ((0.4, 6.9), (1.0, 16.0)), ((1.0, 2.0), (0.3, 2.0))])
def test_the_product_of_two_profiles(a: tuple[float, float], b: tuple[float, float]) -> None:
    n = 100_000
    p, q = (profile(until * n, power, n) * n for until, power in (a, b))
    assert inner(a, b) == pytest.approx((p * q).mean(), rel=1e-3)


def test_a_profile_that_was_kept_is_itself() -> None:
    kept = [(100.0, 6.9), (100.0, 16.0), (200.0, 6.9), (200.0, 16.0)]
    assert coefficients(kept, kept[2]) == pytest.approx([0, 0, 1, 0], abs=1e-9)


def run(folder: Path, every: int = 20) -> dict[float, torch.Tensor]:
    """A walk of weights, averages of it kept in `folder`; the true average of some widths after all steps."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn((STEPS, 6), generator=rng).cumsum(0) / STEPS**0.5
    parameter = nn.Parameter(torch.zeros(6))
    ema = Ema({"backbone.conv_out.bias": parameter}, EmaConfig(widths=(0.05, 0.1)))
    for step in range(STEPS):
        parameter.data.copy_(weights[step])
        ema.update(step, torch.ones(()))
        if (step + 1) % every == 0:
            ema.write(folder, step + 1)
    return {
        width: torch.from_numpy(profile(STEPS, exponent(width))).float() @ weights
        for width in (0.05, 0.07, 0.1, 0.15, 0.2)
    }


def test_any_width_is_found_again(tmp_path: Path) -> None:
    for width, expected in run(tmp_path).items():
        average, step = reconstruct(tmp_path, width)
        assert step == STEPS and set(average) == {"backbone.conv_out.bias"}
        near = 2e-3 if width in (0.05, 0.1) else 0.02  # those that were kept: but for fp16
        torch.testing.assert_close(average["backbone.conv_out.bias"], expected, atol=near, rtol=0)


def test_as_of_an_earlier_step(tmp_path: Path) -> None:
    run(tmp_path)
    whole = reconstruct(tmp_path, 0.05, 100)[0]["backbone.conv_out.bias"]
    for path in tmp_path.glob("*"):
        if int(path.stem) > 100:
            path.unlink()
    assert torch.equal(reconstruct(tmp_path, 0.05)[0]["backbone.conv_out.bias"], whole)


@pytest.mark.parametrize(
    ("width", "step", "message"), [(0.1, 10, "holds no averages until step 10"), (0.5, 0, "the width is 0.5")]
)
def test_bad_input(width: float, step: int, message: str, tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match=message):
        reconstruct(tmp_path, width, step)


def test_the_command_writes_a_model(ldm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> None:
    folder, out = tmp_path / "run", tmp_path / "out.safetensors"
    widths = ["--run.ema.widths", "[0.05, 0.2]", "--run.ema.snapshot_every", "2", "--run.steps", "4"]
    request.getfixturevalue("run")(ldm(*widths), folder)
    assert sorted(path.stem for path in (folder / "ema").iterdir()) == ["00000002", "00000004"]
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "--width", "0.05", "--out", str(out)])
    runpy.run_path(str(ROOT / "scripts/reconstruct_ema.py"), run_name="__main__")
    whole, again = native.load(folder / "model.safetensors"), native.load(out)
    assert again.spec.provenance["ema_width"] == 0.05
    for name, value in again.backbone.state_dict().items():  # the first width is what a run exports
        torch.testing.assert_close(value, whole.backbone.state_dict()[name], atol=2e-3, rtol=2e-3)
    assert not torch.equal(again.backbone.conv_in.weight, whole.backbone.conv_in.weight)  # of fp16
