"""Where the steps of a run lie: each spacing is a function (schedule, n) -> n falling noise levels, in float64.

Those named after training steps (trailing, leading, linspace, ...) are even in the schedule's own time; those named
after a curve (karras, exponential, ...) are even in a function of sigma, over the schedule's `window`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

TRAIN_STEPS = 1000
LAST = TRAIN_STEPS - 1
Map = Callable[[Tensor], Tensor]
Spacing = Callable[[Any, int], Tensor]  # (an ldm.diffusion.schedules.Schedule, n)


def through(xs: Tensor, ys: Tensor) -> Map:
    """Piecewise linear, exact on the points of a table, constant beyond them; each device has its copy once."""
    table = lru_cache(lambda device: (xs.to(device), ys.to(device)))

    def interpolate(x: Tensor) -> Tensor:
        xs, ys = table(x.device)
        x = x.clamp(xs[0], xs[-1])
        right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
        left = right - 1
        return torch.lerp(ys[left], ys[right], (x - xs[left]) / (xs[right] - xs[left]))

    return interpolate


def _line(first: float, last: float, n: int) -> Tensor:
    return torch.linspace(first, last, n, dtype=torch.float64)


def _down(first: float, n: int) -> Tensor:
    """n even values from the first, the 0 behind them left out."""
    return _line(first, 0, n + 1)[:-1]


def _strides(n: int, stride: int) -> Tensor:
    """n whole strides down to training step 1, both ends included."""
    return torch.arange(n, -1, -1, dtype=torch.float64) * stride + 1


def _curve(of: Callable[[float], float], back: Callable[[Tensor], Tensor]) -> Spacing:
    """Even in a function of sigma, given with its inverse."""
    return lambda schedule, n: back(_line(of(schedule.window[1]), of(schedule.window[0]), n))


def beta(schedule: Any, n: int) -> Tensor:
    """Training steps at the quantiles of a Beta(0.6, 0.6) density: denser at both ends (Lee et al. 2024)."""
    # With t = sin(angle)^2 the density is (sin cos)^(2 * 0.6 - 1), which has no pole for the sum to miss.
    angle = _line(0, math.pi / 2, 20_001)
    share = torch.cumulative_trapezoid(angle.sin() ** 0.2 * angle.cos().clamp(min=0) ** 0.2, angle)
    share = torch.cat([share.new_zeros(1), share / share[-1]])
    levels: Tensor = schedule.at(through(share, angle)(_down(1, n)).sin() ** 2 * LAST)
    return levels


def align_your_steps(schedule: Any, n: int, table: Sequence[float]) -> Tensor:
    """A published schedule, whatever the model's own, interpolated in log sigma to n steps; its end becomes 0."""
    logs, last = torch.tensor(table, dtype=torch.float64).log(), len(table) - 1
    return through(_line(0, last, len(table)), logs)(_line(0, last, n + 1)[:-1]).exp()


# Sabour et al. 2024, the optimised schedules of their project page, for 10 steps each.
SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)

SPACINGS: dict[str, Spacing] = {
    # From the last training step, at equal strides down to 0 (Lin et al. 2024, table 2).
    "trailing": lambda schedule, n: schedule.sigma(_down(1, n)),
    # Whole strides up from step 1, as DDIM in CompVis: the last training steps are left out.
    "leading": lambda schedule, n: schedule.at(_strides(n, TRAIN_STEPS // n)[1:]),
    # Whole strides for one step more, the lowest left out: what diffusers' DPM-Solver means by leading.
    "leading_dpm": lambda schedule, n: schedule.at(_strides(n, TRAIN_STEPS // (n + 1))[:-1]),
    # Even in time from 0.999 down: what diffusers' DPM-Solver does for flows.
    "flow_dpm": lambda schedule, n: schedule.sigma(_down(0.999, n)),
    # From the last training step to the first, both included.
    "linspace": lambda schedule, n: schedule.at(_line(LAST, 0, n)),
    # Even in sigma^(1/7) (Karras et al. 2022, Eq. 5).
    "karras": _curve(lambda sigma: sigma ** (1 / 7), lambda root: root**7),
    # Even in log sigma; in k-diffusion polyexponential is that too, at its default of rho 1.
    "exponential": _curve(math.log, torch.exp),
    "polyexponential": _curve(math.log, torch.exp),
    # The first n of n + 1 even steps from the last training step to the first (Stability's generative models).
    "sgm_uniform": lambda schedule, n: schedule.at(_down(LAST, n)),
    # Trailing, cut down to whole training steps (ComfyUI).
    "simple": lambda schedule, n: schedule.at(LAST - (torch.arange(n, dtype=torch.float64) * TRAIN_STEPS / n).floor()),
    "beta": beta,
    # Even in arctan sigma: KL-optimal for Gaussian data of unit variance (Sabour et al. 2024, section 3.2).
    "kl_optimal": _curve(math.atan, torch.tan),
    "align_your_steps": partial(align_your_steps, table=SD1),
    "align_your_steps_sdxl": partial(align_your_steps, table=SDXL),
    "align_your_steps_svd": partial(align_your_steps, table=SVD),
}
