"""Two evaluations a step: Heun with EDM's churn, Restart, DPM-Solver-2 and DPM-Solver++(2S), each also ancestral.

Corrections are written with the difference of the two x0, which stays small where sigma and x are large. A step into
sigma = 0 is first order in all of them: there the second evaluation would have no noise to look at. So is a step of
Heun and DPM-Solver-2 from a level that is all noise: their corrections grow with the step, and flow's first is 975.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

from ldm.diffusion.samplers.common import (
    Denoise,
    Levels,
    Model,
    NoiseFn,
    State,
    Step,
    ancestral,
    begin,
    check_range,
    renoise,
)
from ldm.diffusion.schedules import BLIND


def _heun_step(model: Model, x: State, s: float, t: float) -> Step:
    """The trapezoidal rule on dx/dsigma = (x - x0) / sigma."""
    x0 = model(x, s)
    x = x0.lerp(x, t / s)
    if t > 0 and s <= BLIND:
        x = x.add(model(x, t) - x0, alpha=(s - t) / (2 * t))
    return Step(x, x0, t)


def heun(
    denoise: Denoise,
    x: State,
    sigmas: Levels,
    noise: NoiseFn,
    *,
    s_churn: float = 0.0,
    s_range: tuple[float, float] = (0.0, math.inf),
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, algorithm 2), stochastic where s_churn > 0.

    Before a step from a level within s_range the noise is raised by the share min(s_churn / steps, sqrt(2) - 1), with
    fresh noise of deviation s_noise.
    """
    check_range("s_churn", s_churn, 0)
    model, x, grid = begin(denoise, x, sigmas)
    share = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1)
    for s, t in pairwise(grid):
        if share > 0 and s_range[0] <= s <= s_range[1]:
            x = renoise(x, noise, s_noise * s * math.sqrt((1 + share) ** 2 - 1))
            s *= 1 + share
        step = _heun_step(model, x, s, t)
        x = step.x
        yield step


def restart(
    denoise: Denoise,
    x: State,
    sigmas: Levels,
    noise: NoiseFn,
    *,
    low: float = 0.1,
    high: float = 2.0,
    repeats: int = 2,
    steps: int = 4,
) -> Iterator[Step]:
    """Restart (Xu et al. 2023, algorithm 1): Heun that, down at `low`, adds noise back to `high` and descends anew.

    `repeats` times, in `steps` steps even in sigma^(1/7). Noise errs less than the ODE, the ODE is faster than noise.
    """
    check_range("repeats", repeats, 0)
    check_range("steps", steps, 1)
    check_range("high", high, low)
    model, x, grid = begin(denoise, x, sigmas)
    for s, t in pairwise(grid):
        step = _heun_step(model, x, s, t)
        yield step
        x = step.x
        if not (repeats and t <= low < s and 0 < t < high):
            continue
        again = [(high ** (1 / 7) + (t ** (1 / 7) - high ** (1 / 7)) * k / steps) ** 7 for k in range(steps)] + [t]
        for _ in range(repeats):
            x = renoise(x, noise, math.sqrt(high * high - t * t))
            for upper, lower in pairwise(again):
                step = _heun_step(model, x, upper, lower)
                x = step.x
                yield step


def dpm2(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """DPM-Solver-2 as Karras et al. 2022 use it: the midpoint rule, its middle at the geometric mean (k-diffusion)."""
    return dpm2_a(denoise, x, sigmas, noise, eta=0.0)


def dpm2_a(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver-2, ancestral (k-diffusion)."""
    check_range("eta", eta, 0, 1)
    model, x, grid = begin(denoise, x, sigmas)
    plan = [(s, t, *ancestral(s, t, eta)) for s, t in pairwise(grid)]
    for s, t, down, up in plan:
        x0 = model(x, s)
        moved = x0.lerp(x, down / s)
        if down > 0 and s <= BLIND:
            half = math.sqrt(s * down)
            moved = moved.add(model(x0.lerp(x, half / s), half) - x0, alpha=(s - down) / half)
        x = renoise(moved, noise, up)
        yield Step(x, x0, t)


def dpmpp_2s_a(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1, r = 1/2), ancestral (k-diffusion); eta 0 is the ODE."""
    check_range("eta", eta, 0, 1)
    model, x, grid = begin(denoise, x, sigmas)
    plan = [(s, t, *ancestral(s, t, eta)) for s, t in pairwise(grid)]
    for s, t, down, up in plan:
        x0 = ahead = model(x, s)
        if down > 0:
            half = math.sqrt(s * down)
            ahead = model(x0.lerp(x, half / s), half)
        x = renoise(ahead.lerp(x, down / s), noise, up)
        yield Step(x, x0, t)


def dpmpp_sde(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++ SDE (Lu et al. 2022b, appendix; k-diffusion): both its stages are ancestral.

    Both stages see one Brownian path, so the noise of the step contains that of its first half. With independent draws
    the variance of the result is 8% short at 60 steps.
    """
    check_range("eta", eta, 0, 1)
    model, x, grid = begin(denoise, x, sigmas)
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
        x = ahead.lerp(x, down / s)
        if up > 0:
            x = x.add(fresh, alpha=up)
        yield Step(x, x0, t)
