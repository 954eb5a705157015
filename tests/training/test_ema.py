"""The average in closed form."""

import pytest
import torch
from torch import nn

from ldm.training.config import EmaConfig
from ldm.training.ema import Ema

ALIVE = torch.tensor(1.0)


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


def test_applied_swaps_and_swaps_back():
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema({"w": parameter}, EmaConfig(0.5))
    parameter.data.fill_(1.0)
    with pytest.raises(RuntimeError), ema.applied():
        assert parameter == 0
        raise RuntimeError
    assert parameter == 1
    assert ema.shadows[0][0] == 0


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
    first = ema.shadows[0][0].item()
    with ema.applied():
        assert parameter.item() == first
    assert set(ema.tensors()) == {"0.w", "1.w"}


@pytest.mark.parametrize("width", [0.0, 0.3])
def test_a_width_that_cannot_be(width: float):
    with pytest.raises(ValueError, match="needs a share between 0 and 0.28"):
        EmaConfig(widths=(width,))
