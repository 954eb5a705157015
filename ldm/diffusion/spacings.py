"""Where the steps of a run lie: each spacing is a function (schedule, n) -> n falling noise levels, in float64.

Those named after training steps (trailing, leading, linspace, ...) are even in the schedule's own time; those named
after a curve (karras, exponential, ...) are even in a function of sigma, over the schedule's `window`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.errors import UserError

TRAIN_STEPS = 1000


@runtime_checkable  # for the tests, which check annotations as they run
class Noising(Protocol):
    """What a spacing needs to know of a schedule."""

    @property
    def window(self) -> tuple[float, float]: ...

    def sigma(self, time: Tensor) -> Tensor: ...

    def at(self, step: Tensor) -> Tensor: ...


def _line(first: float, last: float, n: int) -> Tensor:
    return torch.linspace(first, last, n, dtype=torch.float64)


def trailing(schedule: Noising, n: int) -> Tensor:
    """From the last training step, at equal strides down to 0 (Lin et al. 2024, table 2)."""
    return schedule.sigma(_line(1, 0, n + 1)[:-1])


def leading(schedule: Noising, n: int) -> Tensor:
    """Whole strides up from step 1, as DDIM in CompVis: the last training steps are left out."""
    if n > TRAIN_STEPS:
        raise UserError(f"{n} steps with leading spacing: at most {TRAIN_STEPS}, or choose trailing")
    return schedule.at(torch.arange(n - 1, -1, -1, dtype=torch.float64) * (TRAIN_STEPS // n) + 1)


def leading_dpm(schedule: Noising, n: int) -> Tensor:
    """Whole strides for one step more, the lowest left out: what diffusers' DPM-Solver means by leading."""
    if n >= TRAIN_STEPS:
        raise UserError(f"{n} steps with this leading spacing: fewer than {TRAIN_STEPS}, or choose trailing")
    return schedule.at(torch.arange(n, 0, -1, dtype=torch.float64) * (TRAIN_STEPS // (n + 1)) + 1)


def flow_dpm(schedule: Noising, n: int) -> Tensor:
    """Even in time from 0.999 down: what diffusers' DPM-Solver does for flows."""
    return schedule.sigma(_line(0.999, 0, n + 1)[:-1])


def linspace(schedule: Noising, n: int) -> Tensor:
    """From the last training step to the first, both included."""
    return schedule.at(_line(TRAIN_STEPS - 1, 0, n))


def sgm_uniform(schedule: Noising, n: int) -> Tensor:
    """The first n of n + 1 even steps from the last training step to the first (Stability's generative models)."""
    return schedule.at(_line(TRAIN_STEPS - 1, 0, n + 1)[:-1])


def simple(schedule: Noising, n: int) -> Tensor:
    """Trailing, cut down to whole training steps (ComfyUI)."""
    if n > TRAIN_STEPS:
        raise UserError(f"{n} steps with simple spacing: at most {TRAIN_STEPS}, or choose trailing")
    strides = (torch.arange(n, dtype=torch.float64) * TRAIN_STEPS / n).floor()
    return schedule.at(TRAIN_STEPS - 1 - strides)


def beta(schedule: Noising, n: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Training steps at the quantiles of a Beta(a, b) density: denser at both ends (Lee et al. 2024)."""
    # With t = sin(angle)^2 the density is sin^(2a-1) cos^(2b-1), which has no pole for the sum to miss.
    angle = _line(0, math.pi / 2, 20_001)
    density = angle.sin() ** (2 * a - 1) * angle.cos().clamp(min=0) ** (2 * b - 1)
    share = torch.cumulative_trapezoid(density, angle)
    share = torch.cat([share.new_zeros(1), share / share[-1]])
    wanted = _line(1, 0, n + 1)[:-1]
    right = torch.searchsorted(share, wanted).clamp(1, len(share) - 1)
    part = (wanted - share[right - 1]) / (share[right] - share[right - 1])
    return schedule.at(torch.lerp(angle[right - 1], angle[right], part).sin() ** 2 * (TRAIN_STEPS - 1))


def karras(schedule: Noising, n: int, rho: float = 7.0) -> Tensor:
    """Even in sigma^(1/rho) (Karras et al. 2022, Eq. 5)."""
    low, high = schedule.window
    return _line(high ** (1 / rho), low ** (1 / rho), n) ** rho


def polyexponential(schedule: Noising, n: int, rho: float = 1.0) -> Tensor:
    """Even in log(sigma)^(1/rho) over the window (k-diffusion); at rho 1, its default, the exponential spacing."""
    low, high = (math.log(level) for level in schedule.window)
    return (_line(1, 0, n) ** rho * (high - low) + low).exp()


def exponential(schedule: Noising, n: int) -> Tensor:
    """Even in log sigma."""
    return polyexponential(schedule, n)


def kl_optimal(schedule: Noising, n: int) -> Tensor:
    """Even in arctan sigma: KL-optimal for Gaussian data of unit variance (Sabour et al. 2024, section 3.2)."""
    low, high = schedule.window
    return _line(math.atan(high), math.atan(low), n).tan()


# Sabour et al. 2024, the optimised schedules of their project page, for 10 steps each.
SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def align_your_steps(schedule: Noising, n: int, table: Sequence[float] = SD1) -> Tensor:
    """A published schedule, whatever the model's own, interpolated in log sigma to n steps; its end becomes 0."""
    logs = torch.tensor(table, dtype=torch.float64).log()
    place = _line(0, len(table) - 1, n + 1)[:-1]
    left = place.floor().long()
    return torch.lerp(logs[left], logs[left + 1], place - left).exp()


Spacing = Callable[[Noising, int], Tensor]
SPACINGS: dict[str, Spacing] = {
    "trailing": trailing,
    "leading": leading,
    "leading_dpm": leading_dpm,
    "flow_dpm": flow_dpm,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "beta": beta,
    "kl_optimal": kl_optimal,
    "align_your_steps": align_your_steps,
    "align_your_steps_sdxl": partial(align_your_steps, table=SDXL),
    "align_your_steps_svd": partial(align_your_steps, table=SVD),
}
