"""Several evaluations a step: Heun with EDM's churn, Restart, DPM-Solver of its three forms, and Runge-Kutta starts.

A step into sigma = 0 is first order in all of them: there the second evaluation would have no noise to look at. So is a
step from a level that is all noise where the correction grows with the step, for flow's first is 975.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from ldm.diffusion.samplers.common import Grid, Model, NoiseFn, Row, State, Step, ancestral, check_range, follow
from ldm.diffusion.samplers.multistep import ipndm
from ldm.diffusion.schedules import BLIND


def _stages(
    levels: Sequence[float], kept: Sequence[float], weights: Sequence[Sequence[float]], *, shown: bool = False
) -> list[Row]:
    """A row for each stage of a step: `kept` of the state that it began with, and `weights` on the past, oldest first.

    Evaluated at levels[k]. A stage follows linearly from the one before it: nobody has to remember where it all began.
    """
    rows: list[Row] = []
    last, before = 1.0, [0.0] * len(levels)
    for (s, t), keep, now in zip(pairwise(levels), kept, weights, strict=True):
        ratio = keep / last
        row = [new - ratio * old for new, old in zip(now, before, strict=False)]
        row[-1] -= 1 - ratio
        told = t if shown or len(rows) == len(kept) - 1 else None
        rows.append(Row(s, told, ratio, row[::-1] if any(row) else ()))
        last, before[: len(now)] = keep, now
    return rows


def _corrected(
    s: float, t: float, middle: float, unit: float, *, end: float | None = None, up: float = 0.0, lift: float = 0.0
) -> list[Row]:
    """A first-order step, corrected by how x0 changes to the level `middle`, times (s - t) / unit.

    Heun's method: middle t, unit 2 t (the trapezoidal rule on dx/dsigma = (x - x0) / sigma). DPM-Solver-2: unit middle,
    the geometric mean. DPM-Solver++(2S): unit s, with which the correction stays small over any step. end: the level
    with the noise `up`, t where there is none.
    """
    rows = [Row(s, t, t / s)]
    if t > 0 and (s <= BLIND or unit == s):
        change = (s - t) / unit
        rows = _stages([s, middle, t], [middle / s, t / s], [[1 - middle / s], [1 - t / s - change, change]])
    rows[0] = rows[0]._replace(lift=lift)
    rows[-1] = rows[-1]._replace(t=t if end is None else end, up=up)
    return rows


def heun(
    grid: Grid, *, s_churn: float = 0.0, s_range: tuple[float, float] = (0.0, math.inf), s_noise: float = 1.0
) -> list[Row]:
    """Heun's method (algorithm 2), stochastic where s_churn > 0.

    Before a step from a level within s_range the noise is raised by the share min(s_churn / steps, sqrt(2) - 1), with
    fresh noise of deviation s_noise.
    """
    check_range("s_churn", s_churn, 0)
    rows = []
    for s, t in pairwise(grid):
        share = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1) if s_range[0] <= s <= s_range[1] else 0.0
        rows += _corrected(s * (1 + share), t, t, 2 * t, lift=s_noise * s * math.sqrt((1 + share) ** 2 - 1))
    return rows


def restart(grid: Grid, *, low: float = 0.1, high: float = 2.0, repeats: int = 2, steps: int = 4) -> list[Row]:
    """Restart (algorithm 1): Heun that, down at `low`, adds noise back to `high` and descends anew.

    `repeats` times, in `steps` steps even in sigma^(1/7). Noise errs less than the ODE, the ODE is faster than noise.
    """
    check_range("repeats", repeats, 0)
    check_range("steps", steps, 1)
    check_range("high", high, low)
    rows = []
    for s, t in pairwise(grid):
        rows += _corrected(s, t, t, 2 * t)
        if t <= low < s and 0 < t < high:
            even = [(high ** (1 / 7) + (t ** (1 / 7) - high ** (1 / 7)) * k / steps) ** 7 for k in range(steps)]
            again = [row for pair in pairwise([*even, t]) for row in _corrected(*pair, pair[1], 2 * pair[1])]
            again[0] = again[0]._replace(lift=math.sqrt(high * high - t * t))
            rows += again * repeats
    return rows


def two_stages(grid: Grid, *, unit: Callable[[float, float], float], eta: float = 1.0) -> list[Row]:
    """DPM-Solver-2 as Karras et al. 2022 use it, or DPM-Solver++(2S) with r = 1/2: see `_corrected` for unit(s, half).

    Down to the level that leaves room for fresh noise; eta 0 is the ODE.
    """
    check_range("eta", eta, 0, 1)
    rows = []
    for s, t in pairwise(grid):
        down, up = ancestral(s, t, eta)
        half = math.sqrt(s * down)
        rows += _corrected(s, down, half, unit(s, half), end=t, up=up)
    return rows


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


def _dpm_step(levels: Sequence[float]) -> list[Row]:
    """One step of order len(levels) - 1, after algorithms 1 and 2, eps_i - eps_0 written as differences of x0.

    All its stages approximate x at their level.
    """
    s, *inner, t = levels
    shares = [math.log(s / level) / math.log(s / t) for level in inner]  # r_1 and r_2
    changes: list[list[float]] = [[]]  # of each stage, by the differences of x0 from that at the start
    if len(inner) == 1:
        changes.append([(s - t) / (2 * shares[0] * inner[0])])
    elif inner:
        h, (first, second), (r1, r2) = math.log(s / t), inner, shares
        bend, last = r2 / r1 * _phi(r2 * h), t * _phi(h) / r2
        changes += [[second * bend / first], [-last * bend / first, last / second]]
    kept = [level / s for level in levels[1:]]
    weights = [[1 - keep - sum(change), *change] for keep, change in zip(kept, changes, strict=True)]
    return _stages(levels, kept, weights, shown=True)


def dpm_solver(grid: Grid, *, order: int = 3) -> list[Row]:
    """DPM-Solver-1, 2 or 3, its stages on the run's own levels, so that n steps cost n evaluations.

    Each `order` steps of the run form one step of that order; what remains, and a step into 0, or from a level that is
    all noise, is of lower order.
    """
    check_range("order", order, 1, 3)
    end = len(grid) - 1 - (grid[-1] == 0)  # a stage at sigma 0 would be at lambda = infinity
    rows: list[Row] = []
    while (i := len(rows)) < len(grid) - 1:
        width = min(order, end - i) if i < end and grid[i] <= BLIND else 1
        rows += _dpm_step(grid[i : i + width + 1])
    return rows


def dpm_adaptive(
    model: Model, x: State, grid: Grid, noise: NoiseFn, *, order: int = 3, rtol: float = 0.05, atol: float = 0.0078
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
        steps = list(follow(model, x, _dpm_step([s, *(s * (t / s) ** r for r in stages), t]), noise))
        rough = steps[0].x0.lerp(x, t / s)
        if order == 3:  # DPM-Solver-2 from the same first stage
            slope = (steps[0].x0 - steps[1].x0) / steps[0].sigma
            rough = rough.add(slope, alpha=-(s - t) / (2 * stages[0]))
        unit = torch.maximum(rough.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = float(((rough - steps[-1].x) / unit).square().flatten(1).mean(1).max().sqrt())
        factor = 1 + math.atan((error + 1e-8) ** (-1 / order) - 1)
        if factor >= 0.81:
            before, x, s = rough, steps[-1].x, t
            yield Step(x, steps[0].x0, t)
        h *= factor
        check_range("the adaptive step in log sigma", h, 1e-6)
    if grid[-1] < s:
        yield from follow(model, x, _dpm_step([s, grid[-1]]), noise)


def mean(s: float, t: float) -> float:
    """The middle of a step in sigma, in which Runge-Kutta 4 is of fourth order."""
    return (s + t) / 2


def pseudo(grid: Grid, *, starts: int, middle: Callable[[float, float], float] = mean) -> list[Row]:
    """Adams-Bashforth 4 behind Runge-Kutta steps: one of two stages, Heun's (CompVis), or three of four (algorithm 2).

    `middle(s, t)` is the level half way; the paper takes the middle training step.
    """
    shares = (1 / 2, 1 / 2) if starts == 1 else (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    rows: list[Row] = []
    begun: list[int] = []  # the number of the evaluation that each step began with
    for (s, t), row in zip(pairwise(grid), ipndm(grid), strict=True):
        begun.insert(0, len(rows))
        if len(begun) > starts:  # of the past it wants what steps began with
            wanted = dict(zip(begun, row.weights, strict=False))
            rows.append(row._replace(weights=[wanted.get(k, 0.0) for k in range(begun[0], min(wanted) - 1, -1)]))
        elif t == 0 or s > BLIND:
            rows.append(Row(s, t, t / s))
        else:
            levels = [s, *[middle(s, t)] * (len(shares) - 2), t, t]  # each stage from the slope of the one before it
            slopes = [[*[0.0] * k, (end - s) / level] for k, (level, end) in enumerate(pairwise(levels[:-1]))]
            whole = [(t - s) * share / level for share, level in zip(shares, levels, strict=False)]
            rows += _stages(levels, [1.0] * len(shares), [*slopes, whole])
    return rows
