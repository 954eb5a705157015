"""Several evaluations a step: Heun with EDM's churn, Restart, DPM-Solver of its three forms, and Runge-Kutta starts.

Corrections are written with the difference of the two x0, which stays small where sigma and x are large. A step into
sigma = 0 is first order in all of them: there the second evaluation would have no noise to look at. So is a step from a
level that is all noise where the correction grows with the step, for flow's first is 975.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.samplers.common import Grid, Model, NoiseFn, State, Step, ancestral, check_range, follow, renoise
from ldm.diffusion.samplers.multistep import ipndm
from ldm.diffusion.schedules import BLIND


def _corrected(model: Model, x: State, s: float, t: float, middle: float, unit: float) -> Step:
    """A first-order step, corrected by how x0 changes to the level `middle`, times (s - t) / unit.

    Heun's method: middle t, unit 2 t (the trapezoidal rule on dx/dsigma = (x - x0) / sigma). DPM-Solver-2: unit middle,
    the geometric mean. DPM-Solver++(2S): unit s, with which the correction stays small over any step.
    """
    x0 = model(x, s)
    moved = x0.lerp(x, t / s)
    if t > 0 and (s <= BLIND or unit == s):
        ahead = model(moved if middle == t else x0.lerp(x, middle / s), middle)
        moved = moved.add(ahead - x0, alpha=(s - t) / unit)
    return Step(moved, x0, t)


def heun(
    model: Model,
    x: State,
    grid: Grid,
    noise: NoiseFn,
    *,
    s_churn: float = 0.0,
    s_range: tuple[float, float] = (0.0, math.inf),
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Heun's method (algorithm 2), stochastic where s_churn > 0.

    Before a step from a level within s_range the noise is raised by the share min(s_churn / steps, sqrt(2) - 1), with
    fresh noise of deviation s_noise.
    """
    check_range("s_churn", s_churn, 0)
    share = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1)
    for s, t in pairwise(grid):
        if share > 0 and s_range[0] <= s <= s_range[1]:
            x = renoise(x, noise, s_noise * s * math.sqrt((1 + share) ** 2 - 1))
            s *= 1 + share
        yield (step := _corrected(model, x, s, t, t, 2 * t))
        x = step.x


def restart(
    model: Model,
    x: State,
    grid: Grid,
    noise: NoiseFn,
    *,
    low: float = 0.1,
    high: float = 2.0,
    repeats: int = 2,
    steps: int = 4,
) -> Iterator[Step]:
    """Restart (algorithm 1): Heun that, down at `low`, adds noise back to `high` and descends anew.

    `repeats` times, in `steps` steps even in sigma^(1/7). Noise errs less than the ODE, the ODE is faster than noise.
    """
    check_range("repeats", repeats, 0)
    check_range("steps", steps, 1)
    check_range("high", high, low)
    for s, t in pairwise(grid):
        again = [(high ** (1 / 7) + (t ** (1 / 7) - high ** (1 / 7)) * k / steps) ** 7 for k in range(steps)]
        back = repeats if t <= low < s and 0 < t < high else 0
        for number, levels in enumerate([[s, t], *[[*again, t]] * back]):
            x = renoise(x, noise, math.sqrt(high * high - t * t)) if number else x
            for upper, lower in pairwise(levels):
                yield (step := _corrected(model, x, upper, lower, lower, 2 * lower))
                x = step.x


def two_stages(
    model: Model, x: State, grid: Grid, noise: NoiseFn, *, unit: Callable[[float, float], float], eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver-2 as Karras et al. 2022 use it, or DPM-Solver++(2S) with r = 1/2: see `_corrected` for unit(s, half).

    Down to the level that leaves room for fresh noise; eta 0 is the ODE.
    """
    check_range("eta", eta, 0, 1)
    for s, t in pairwise(grid):
        down, up = ancestral(s, t, eta)
        half = math.sqrt(s * down)
        moved, x0, _ = _corrected(model, x, s, down, half, unit(s, half))
        x = renoise(moved, noise, up)
        yield Step(x, x0, t)


def dpmpp_sde(model: Model, x: State, grid: Grid, noise: NoiseFn, *, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++ SDE (appendix; k-diffusion): both its stages are ancestral.

    Both stages see one Brownian path, so the noise of the step contains that of its first half. With independent draws
    the variance of the result is 8% short at 60 steps.
    """
    check_range("eta", eta, 0, 1)
    for s, t in pairwise(grid):
        x0 = ahead = model(x, s)
        down, up = ancestral(s, t, eta)
        fresh = x  # no noise is added where up is 0
        if t > 0:
            half = math.sqrt(s * t)
            half_down, half_up = ancestral(s, half, eta)
            trial = x0.lerp(x, half_down / s)
            if half_up > 0:
                early = noise(x)
                share = math.sqrt(t / (s + t))  # of the first half's noise in the whole step's
                fresh = early * share + noise(x) * math.sqrt(1 - share * share)
                trial = trial.add(early, alpha=half_up)
            ahead = model(trial, half)
        moved = ahead.lerp(x, down / s)
        x = moved.add(fresh, alpha=up) if up > 0 else moved
        yield Step(x, x0, t)


def _phi(z: float) -> float:
    """expm1(z) / z - 1, also where z is small."""
    return math.expm1(z) / z - 1


def _dpm_step(model: Model, x: State, levels: Sequence[float]) -> Iterator[Step]:
    """One step of order len(levels) - 1 from levels[0] to levels[-1], its stages at the levels between.

    Yields each stage, all of which approximate x at their level; the last is the step's result. Algorithms 1 and 2 of
    the paper, with eps_i - eps_0 written as differences of x0.
    """
    s, t = levels[0], levels[-1]
    first = model(x, s)
    moved = first.lerp(x, levels[1] / s)
    yield Step(moved, first, levels[1])
    if len(levels) == 2:
        return
    h, r1 = math.log(s / t), math.log(s / levels[1]) / math.log(s / t)
    second = model(moved, levels[1])
    slope = (first - second) / levels[1]  # eps at the first stage less eps at the start
    if len(levels) == 3:
        yield Step(first.lerp(x, t / s).add(slope, alpha=-t * math.expm1(h) / (2 * r1)), second, t)
        return
    middle = levels[2]
    r2 = math.log(s / middle) / h
    bend = r2 / r1 * _phi(r2 * h)
    moved = first.lerp(x, middle / s).add(slope, alpha=-middle * bend)
    yield Step(moved, second, middle)
    third = model(moved, middle)
    slope = (first - third) / middle - bend * slope
    yield Step(first.lerp(x, t / s).add(slope, alpha=-t * _phi(h) / r2), third, t)


def dpm_solver(model: Model, x: State, grid: Grid, noise: NoiseFn, *, order: int = 3) -> Iterator[Step]:
    """DPM-Solver-1, 2 or 3, its stages on the run's own levels, so that n steps cost n evaluations.

    Each `order` steps of the run form one step of that order; what remains, and a step into 0, or from a level that is
    all noise, is of lower order.
    """
    check_range("order", order, 1, 3)
    last = len(grid) - 1
    end = last - 1 if grid[-1] == 0 else last  # a stage at sigma 0 would be at lambda = infinity
    i = 0
    while i < last:
        width = min(order, end - i) if i < end and grid[i] <= BLIND else 1
        for step in _dpm_step(model, x, grid[i : i + width + 1]):
            yield step
        x = step.x
        i += width


def dpm_adaptive(
    model: Model,
    x: State,
    grid: Grid,
    noise: NoiseFn,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
) -> Iterator[Step]:
    """DPM-Solver-12 or -23 with error control (appendix C): of the run only both ends are used.

    A step's error is the difference of its two orders, in units of max(atol, rtol * |x|), root mean square over each
    image, the greatest of the batch; the next length follows it as k-diffusion's controller does. Yields each accepted
    step. UserError where the steps become too small to go on.
    """
    check_range("order", order, 2, 3)
    s, end = grid[0], grid[-1] if grid[-1] > 0 else grid[-2]
    h, before = 0.05, x
    stages = (1 / 3, 2 / 3) if order == 3 else (1 / 2,)
    while s > end * (1 + 1e-9):
        t = max(end, s * math.exp(-h))
        steps = list(_dpm_step(model, x, [s, *(s * (t / s) ** r for r in stages), t]))
        rough = steps[0].x0.lerp(x, t / s)
        if order == 3:  # DPM-Solver-2 from the same first stage
            slope = (steps[0].x0 - steps[1].x0) / steps[0].sigma
            rough = rough.add(slope, alpha=-t * math.expm1(math.log(s / t)) / (2 * stages[0]))
        unit = torch.maximum(rough.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = float(((rough - steps[-1].x) / unit).square().flatten(1).mean(1).max().sqrt())
        factor = 1 + math.atan((error + 1e-8) ** (-1 / order) - 1)
        if factor >= 0.81:
            before, x, s = rough, steps[-1].x, t
            yield Step(x, steps[0].x0, t)
        h *= factor
        check_range("the adaptive step in log sigma", h, 1e-6)
    if grid[-1] < s:
        yield from _dpm_step(model, x, [s, grid[-1]])


def _runge_kutta(model: Model, x: State, s: float, levels: Sequence[float], weights: Sequence[float]) -> Step:
    """A step from s to levels[-1], each stage from the slope of the one before it."""
    x0, t = model(x, s), levels[-1]
    if t == 0 or s > BLIND:
        return Step(x0.lerp(x, t / s), x0, t)
    slopes = [(x - x0) / s]
    for level in levels:
        trial = x.add(slopes[-1], alpha=level - s)
        slopes.append((trial - model(trial, level)) / level)
    moved = x0.lerp(x, 1 + weights[0] * (t - s) / s)
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        moved.add_(slope, alpha=weight * (t - s))
    return Step(moved, x0, t)


def mean(s: float, t: float) -> float:
    """The middle of a step in sigma, in which Runge-Kutta 4 is of fourth order."""
    return (s + t) / 2


def pseudo(
    model: Model, x: State, grid: Grid, noise: NoiseFn, *, starts: int, middle: Callable[[float, float], float] = mean
) -> Iterator[Step]:
    """Adams-Bashforth 4 behind Runge-Kutta steps: one of two stages, Heun's (CompVis), or three of four (algorithm 2).

    `middle(s, t)` is the level half way; the paper takes the middle training step.
    """
    past: list[Tensor] = []
    first = min(starts, len(grid) - 1)
    weights = (1 / 2, 1 / 2) if starts == 1 else (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    for s, t in pairwise(grid[: first + 1]):
        step = _runge_kutta(model, x, s, [*[middle(s, t)] * (len(weights) - 2), t], weights)
        past.insert(0, x - step.x0)
        x = step.x
        yield step
    yield from follow(model, x, grid[first:], ipndm(grid)[first:], noise, of_noise=True, past=past)
