"""Exponential multistep solvers: DPM-Solver++ (Lu et al. 2022b), its SDE form, UniPC, SA-Solver.

All solve dx = -(x - x0) (1 + tau^2) dlambda + noise in lambda = -log sigma, exactly in x and with x0 as the polynomial
through its last evaluations (SA-Solver: Xue et al. 2023, Eq. 14). tau 0 is the probability-flow ODE, tau 1 the reverse
SDE. A predictor uses past evaluations; a corrector goes over the step again once x0 at its end is known, at no extra
evaluation (UniPC: Zhao et al. 2023). All of that is linear in x and the past x0, so that a step, and the correction of
the one before it, come down to one sum whose weights are worked out once for a run.

Published solvers differ only in the moments of a step's kernel that they use, its RULE:
    exact      the moments themselves
    midpoint   half the step for the first moment of two points (DPM-Solver++ 2M, UniPC's B2)
    taylor     the first moment of two points to leading order (UniPC's B1, SA-Solver)
    published  exact for two points; for three, half the second moment, as the code of DPM-Solver++ 3M has it
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from ldm.diffusion.constants import scalar
from ldm.diffusion.samplers.common import Denoise, Levels, NoiseFn, State, Step, begin, check_range, renoise
from ldm.diffusion.samplers.weights import exponential_moments, lagrange_weights
from ldm.errors import UserError

Rule = Literal["exact", "midpoint", "taylor", "published"]


class _Solver(NamedTuple):
    """Points of the predictor and of the corrector (0: none), the rule, and whether the order falls before a last 0."""

    predict: int
    correct: int = 0
    rule: Rule = "exact"
    settle: bool = False


class _Plan(NamedTuple):
    """One step: what it keeps of x, the noise it adds, and its weights on x0, newest first."""

    keep: float
    up: float
    weights: list[float]


def _moments(rule: Rule, rate: float, h: float, n: int) -> list[float]:
    """Moments of the kernel rate * exp(-rate * (h - tau)) over a step of length h."""
    exact = [rate * math.exp(-rate * h) * m for m in exponential_moments(rate, h, n)]
    if n == 2 and rule == "midpoint":
        exact[1] = exact[0] * h / 2
    elif n == 2 and rule == "taylor":
        exact[1] = rate * h * h / 2
    elif n == 3 and rule == "published":
        exact[2] /= 2
    return exact


@lru_cache(maxsize=8)
def _plan(grid: tuple[float, ...], taus: tuple[float, ...], solver: _Solver) -> list[_Plan]:
    """The coefficients of a whole run."""
    predict, correct, rule, settle = solver
    plans = []
    amend: list[float] = []  # what the corrector changes of the step before, as weights on x0
    last = len(grid) - 2
    for i, (s, t) in enumerate(pairwise(grid)):
        if t == 0:
            plans.append(_Plan(0.0, 0.0, [1.0]))
            continue
        h, noisy = math.log(s / t), taus[i] ** 2
        left = last - i + 1 if settle and grid[-1] == 0 else len(grid)
        near = grid[max(0, i + 1 - max(predict, correct)) : i + 1]
        past = [math.log(s / level) for level in reversed(near)]  # lambda of past levels, relative to this
        predictor, corrector = past[: min(predict, left)], [h, *past[: min(correct - 1, left)]] if correct else []
        up = t * math.sqrt(-math.expm1(-2 * noisy * h))
        first, again = (
            lagrange_weights(nodes, _moments(rule, 1 + noisy, h, len(nodes))) for nodes in (predictor, corrector)
        )
        keep = t / s * math.exp(-noisy * h)
        weights = [keep * change + weight for change, weight in zip_longest(amend, first, fillvalue=0.0)]
        plans.append(_Plan(keep, up, weights))
        if again:  # by then every x0 that the predictor used is one place older
            amend = [new - old for new, old in zip_longest(again, [0.0, *first], fillvalue=0.0)]
    return plans


def ode(sigma: float) -> float:
    """tau 0 everywhere."""
    return 0.0


def middle(sigma: float) -> float:
    """tau 1 in the middle of the run: the training steps 200 to 800 of the scaled-linear schedule."""
    return 1.0 if 0.57 <= sigma <= 5.1 else 0.0


def _multistep(
    denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, solver: _Solver, tau: Callable[[float], float] = ode
) -> Iterator[Step]:
    if solver.rule not in get_args(Rule):
        raise UserError(f"unknown rule {solver.rule!r}: choose one of {', '.join(get_args(Rule))}")
    model, x, grid = begin(denoise, x, sigmas)
    plans = _plan(tuple(grid), tuple(tau(s) for s in grid[:-1]), solver)
    past: list[Tensor] = []  # x0, newest first
    for (s, t), (keep, up, weights) in zip(pairwise(grid), plans, strict=True):
        x0 = model(x, s)
        past = [x0, *past[: solver.predict]]
        x = renoise(x * scalar(keep, x.dtype), noise, up)
        for weight, value in zip(weights, past, strict=False):
            x.add_(value, alpha=weight)
        yield Step(x, x0, t)


def dpmpp_2m(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: first order at the start and into 0."""
    return _multistep(denoise, x, sigmas, noise, _Solver(2, rule="midpoint"))


def dpmpp_3m(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, rule: Rule = "exact") -> Iterator[Step]:
    """DPM-Solver++(3M): three points. `published` is what other toolkits compute."""
    return _multistep(denoise, x, sigmas, noise, _Solver(3, rule=rule))


def dpmpp_2m_sde(
    denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 1.0, rule: Rule = "midpoint"
) -> Iterator[Step]:
    """DPM-Solver++(2M) on the reverse SDE (Lu et al. 2022b, appendix); k-diffusion's `heun` is rule exact."""
    check_range("eta", eta, 0)
    return _multistep(denoise, x, sigmas, noise, _Solver(2, rule=rule), lambda sigma: math.sqrt(eta))


def dpmpp_3m_sde(
    denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 1.0, rule: Rule = "exact"
) -> Iterator[Step]:
    """DPM-Solver++(3M) on the reverse SDE (Crowson's k-diffusion, which has rule `published`)."""
    check_range("eta", eta, 0)
    return _multistep(denoise, x, sigmas, noise, _Solver(3, rule=rule), lambda sigma: math.sqrt(eta))


def unipc(
    denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, order: int = 3, rule: Rule = "midpoint"
) -> Iterator[Step]:
    """UniPC of order 2 or 3 (Zhao et al. 2023, algorithms 1 and 2); rule midpoint is its B2, taylor its B1."""
    check_range("order", order, 1, 3)
    return _multistep(denoise, x, sigmas, noise, _Solver(order, order + 1, rule, settle=True))


def sa_solver(
    denoise: Denoise,
    x: State,
    sigmas: Levels,
    noise: NoiseFn,
    *,
    tau: Callable[[float], float] = middle,
    rule: Rule = "taylor",
) -> Iterator[Step]:
    """SA-Solver (Xue et al. 2023, algorithm 1), predictor and corrector of two points; tau(sigma) sets the noise."""
    return _multistep(denoise, x, sigmas, noise, _Solver(2, 2, rule, settle=True), tau)
