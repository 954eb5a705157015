"""Where the steps of a run lie: each spacing is a function (schedule, n) -> n falling noise levels, in float64.

Those named after training steps (trailing, leading, linspace, ...) are even in the schedule's own time; those named
after a curve (karras, exponential, ...) are even in a function of sigma, over the schedule's `window`.
"""

from collections.abc import Callable
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


def linspace(schedule: Noising, n: int) -> Tensor:
    """From the last training step to the first, both included."""
    return schedule.at(_line(TRAIN_STEPS - 1, 0, n))


def karras(schedule: Noising, n: int, rho: float = 7.0) -> Tensor:
    """Even in sigma^(1/rho) (Karras et al. 2022, Eq. 5)."""
    low, high = schedule.window
    return _line(high ** (1 / rho), low ** (1 / rho), n) ** rho


Spacing = Callable[[Noising, int], Tensor]
SPACINGS: dict[str, Spacing] = {"trailing": trailing, "leading": leading, "linspace": linspace, "karras": karras}
