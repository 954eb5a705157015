"""The average in closed form."""

import pytest
import torch
from torch import nn

from ldm.training import ema as ema_module
from ldm.training.config import EmaConfig
from ldm.training.ema import Ema
from ldm.training.memory import Counter
from ldm.training.sharding import holding

ALIVE, DEFAULT = torch.tensor(1.0), EmaConfig()


def average(values: list[float], config: EmaConfig) -> float:
    parameter = nn.Parameter(torch.tensor([values[0]]))
    ema = Ema({"w": parameter}, config)
    for step, value in enumerate(values[1:]):
        parameter.data.fill_(value)
        ema.update(step, ALIVE)
    return ema.shadows[0][0].item()


def test_without_warmup():
    values = [1.0, 5.0, -2.0, 7.0]
    expected = 0.9**3 * 1 + 0.1 * (0.9**2 * 5 + 0.9 * -2 + 7)
    assert average(values, EmaConfig(0.9, warmup=False)) == pytest.approx(expected, rel=1e-6)


def test_warmup_forgets_the_start():
    decays = [1 / 10, 2 / 11, 3 / 12]
    values, expected = [1.0, 5.0, -2.0, 7.0], 1.0
    for decay, value in zip(decays, values[1:], strict=True):
        expected = decay * expected + (1 - decay) * value
    assert average(values, EmaConfig(0.9)) == pytest.approx(expected, rel=1e-6)
    assert Ema({}, EmaConfig(0.9)).decays(10**6) == [0.9]


def test_decay_0_is_the_last_weights():
    assert average([1.0, 2.0, 3.0], EmaConfig(0.0)) == 3.0


def test_nothing_moves_when_stopped():
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema({"w": parameter}, EmaConfig(0.5))
    parameter.data.fill_(1.0)
    ema.update(0, 1 - ALIVE)
    assert ema.shadows[0][0] == 0


def test_networks_hold_the_average_and_then_their_own():
    network = nn.Linear(1, 1, bias=False)
    own, average = network.weight, torch.zeros(1, 1)
    with pytest.raises(RuntimeError), holding(nn.ModuleDict({"net": network}), {"net.weight": average}):
        assert network.weight.data_ptr() == average.data_ptr(), "nothing is copied"
        raise RuntimeError
    assert network.weight is own


def test_on_a_gpu_the_average_needs_no_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ema_module, "PART", 1000)
    there = [nn.Parameter(torch.zeros(100, device="meta")) for _ in range(50)]
    ema, alive = Ema({f"w{i}": p for i, p in enumerate(there)}, EmaConfig(0.5)), ALIVE.to("meta")
    with Counter([*there, *ema.shadows[0], alive]) as counter:
        ema.update(0, alive)
    assert 0 < counter.peak <= 1100 * 4 < 50 * 100 * 4


def test_in_parts_each_weight_moves_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ema_module, "PART", 1000)
    ema = Ema(
        {str(i): nn.Parameter(torch.full((n,), float(n))) for i, n in enumerate((700, 200, 300, 5000, 1))}, DEFAULT
    )
    torch._foreach_zero_(ema.shadows[0])
    with torch.no_grad():
        ema.move(ema.shadows[0], torch.tensor(0.25))
    assert len(ema.parts) > 2 and [s.unique().item() for s in ema.shadows[0]] == [175, 50, 75, 1250, 0.25]


def test_powers_of_time_weigh_each_step_by_the_integral_of_their_profile():
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema({"w": parameter}, EmaConfig(widths=(0.05, 0.2)))
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    for step, value in enumerate(values):
        parameter.data.fill_(value)
        ema.update(step, ALIVE)
    for shadow, power in zip(ema.shadows, ema.exponents, strict=True):
        shares = [(t / 5) ** (power + 1) - ((t - 1) / 5) ** (power + 1) for t in range(1, 6)]
        assert shadow[0].item() == pytest.approx(sum(s * v for s, v in zip(shares, values, strict=True)), rel=1e-5)
    assert set(ema.tensors()) == {"0.w", "1.w"}


@pytest.mark.parametrize("width", [0.0, 0.3])
def test_a_width_that_cannot_be(width: float):
    with pytest.raises(ValueError, match="needs a share between 0 and 0.28"):
        EmaConfig(widths=(width,))
