"""A run works its numbers out once, and reads none of them back from where the pictures are."""

from typing import Any

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.constants import first, level, scalar, uniform
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import bind, cfg, interval
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import ScheduleConfig, make_schedule

CPU = torch.device("cpu")


def network(z: torch.Tensor, label: torch.Tensor, cond: Any) -> torch.Tensor:
    return z.sin() * cond.tokens.mean()


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "dpm_adaptive"])  # its error decides what it does next
def test_no_step_reads_the_level_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each such read would wait for all that is queued. Only the guard against NaN reads: one sum a call."""
    cond, schedule = Conditioning(torch.ones(2, 3, 4)), make_schedule(ScheduleConfig())
    denoiser = Denoiser(network, PREDICTIONS["v"], schedule)
    denoise = interval(cfg(denoiser, cond, cond.map(torch.neg), 4.0), bind(denoiser, cond), 0.5, 8.0)
    sigmas, x = schedule.steps(6), torch.randn(2, 4, 4, 4) * 14
    calls, asked = [0], [0]
    read = torch.Tensor.__float__

    def counted(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked[0] += 1
        return denoise(x, sigma)

    def guard(value: torch.Tensor) -> float:
        calls[0] += 1
        return read(value)

    def refuse(*_: Any) -> None:
        raise AssertionError("a value was read back")

    def run() -> None:
        for _ in SAMPLERS[name](counted, x, sigmas, torch.randn_like):
            pass

    run()  # what is worked out once is worked out here
    asked[0] = 0
    sigmas = sigmas.tolist()
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    monkeypatch.setattr(torch.Tensor, "__float__", guard)
    run()
    assert calls == asked and asked[0] >= 6


def test_a_level_is_known_as_its_dtype_has_it() -> None:
    made = uniform(0.1, 3, torch.float32, CPU)
    assert torch.equal(made, torch.full((3,), 0.1)) and level(made) == first(made) == float(torch.tensor(0.1)) != 0.1
    assert level(uniform(0.1, 3, torch.float64, CPU)) == 0.1
    assert level(torch.tensor([2.0, 2.0])) == 2.0
    mixed = torch.tensor([2.0, 3.0])
    assert level(mixed) is None and first(mixed) == 2.0
    assert uniform(0.1, 3, torch.float32, CPU) is made and scalar(0.1, torch.float32) is scalar(0.1, torch.float32)


def test_what_inference_mode_made_serves_autograd() -> None:
    with torch.inference_mode():
        factor, levels = scalar(0.123, torch.float64), uniform(0.123, 2, torch.float64, CPU)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (x.square() * factor / levels).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, torch.full_like(x, 2.0))
