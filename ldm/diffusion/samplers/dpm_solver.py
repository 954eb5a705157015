"""DPM-Solver, singlestep (Lu et al. 2022a): Runge-Kutta methods of order 1 to 3 in lambda = -log sigma.

`dpm_solver` puts the stages on the run's own levels, so a run of n steps costs n evaluations. `dpm_adaptive` chooses
its levels by the difference of two orders.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from ldm.diffusion.samplers.common import Denoise, Levels, Model, NoiseFn, State, Step, begin, check_range
from ldm.diffusion.schedules import BLIND


def _phi(z: float) -> float:
    """expm1(z) / z - 1, also where z is small."""
    return math.expm1(z) / z - 1


def _singlestep(model: Model, x: State, levels: Sequence[float]) -> Iterator[Step]:
    """One step of order len(levels) - 1 from levels[0] to levels[-1], its stages at the levels between.

    Yields each stage, all of which approximate x at their level; the last is the step's result. Algorithms 1 and 2 of
    the paper, with eps_i - eps_0 written as differences of x0.
    """
    s = levels[0]
    first = model(x, s)
    moved = first.lerp(x, levels[1] / s)
    yield Step(moved, first, levels[1])
    if len(levels) == 2:
        return
    h, r1 = math.log(s / levels[-1]), math.log(s / levels[1]) / math.log(s / levels[-1])
    second = model(moved, levels[1])
    slope = (first - second) / levels[1]  # eps at the first stage less eps at the start
    if len(levels) == 3:
        t = levels[2]
        yield Step(first.lerp(x, t / s).add(slope, alpha=-t * math.expm1(h) / (2 * r1)), second, t)
        return
    _, _, middle, t = levels
    r2 = math.log(s / middle) / h
    bend = r2 / r1 * _phi(r2 * h)
    moved = first.lerp(x, middle / s).add(slope, alpha=-middle * bend)
    yield Step(moved, second, middle)
    third = model(moved, middle)
    slope = (first - third) / middle - bend * slope
    yield Step(first.lerp(x, t / s).add(slope, alpha=-t * _phi(h) / r2), third, t)


def dpm_solver(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, order: int = 3) -> Iterator[Step]:
    """DPM-Solver-1, 2 or 3: each `order` steps of the run form one step of that order; what remains, and a step into 0,
    or from a level that is all noise, is of lower order."""
    check_range("order", order, 1, 3)
    model, x, grid = begin(denoise, x, sigmas)
    last = len(grid) - 1
    end = last - 1 if grid[-1] == 0 else last  # a stage at sigma 0 would be at lambda = infinity
    i = 0
    while i < last:
        width = min(order, end - i) if i < end and grid[i] <= BLIND else 1
        for step in _singlestep(model, x, grid[i : i + width + 1]):
            yield step
        x = step.x
        i += width


def dpm_adaptive(
    denoise: Denoise,
    x: State,
    sigmas: Levels,
    noise: NoiseFn,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
) -> Iterator[Step]:
    """DPM-Solver-12 or -23 with error control (Lu et al. 2022a, appendix C): of the run only both ends are used.

    A step's error is the difference of its two orders, in units of max(atol, rtol * |x|), root mean square over each
    image, the greatest of the batch; the next length follows it as k-diffusion's controller does. Yields each accepted
    step. UserError where the steps become too small to go on.
    """
    check_range("order", order, 2, 3)
    model, x, grid = begin(denoise, x, sigmas)
    s, end = grid[0], grid[-1] if grid[-1] > 0 else grid[-2]
    h, before = 0.05, x
    stages = (1 / 3, 2 / 3) if order == 3 else (1 / 2,)
    while s > end * (1 + 1e-9):
        t = max(end, s * math.exp(-h))
        steps = list(_singlestep(model, x, [s, *(s * (t / s) ** r for r in stages), t]))
        if order == 3:  # DPM-Solver-2 from the same first stage
            slope = (steps[0].x0 - steps[1].x0) / steps[0].sigma
            rough = steps[0].x0.lerp(x, t / s).add(slope, alpha=-t * math.expm1(math.log(s / t)) / (2 * stages[0]))
        else:
            rough = steps[0].x0.lerp(x, t / s)
        unit = torch.maximum(rough.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = float(((rough - steps[-1].x) / unit).square().flatten(1).mean(1).max().sqrt())
        factor = 1 + math.atan((error + 1e-8) ** (-1 / order) - 1)
        if factor >= 0.81:
            before, x, s = rough, steps[-1].x, t
            yield Step(x, steps[0].x0, t)
        h *= factor
        check_range("the adaptive step in log sigma", h, 1e-6)
    for a, b in pairwise([s, *grid[-1:]]):
        if b < a:
            x0 = model(x, a)
            yield Step(x0.lerp(x, b / a), x0, b)
