"""Linear multistep solvers on the noise eps = (x - x0) / sigma, in which the probability-flow ODE is dx/dsigma = eps.

Each keeps its last evaluations and weights them: `lms` by exact quadrature in sigma, `deis` by quadrature of the
polynomial in log sigma (Zhang & Chen 2023, log-rho), `ipndm`, `plms` and `pndm` by the Adams-Bashforth coefficients of
even steps (Liu et al. 2022), whatever the steps: on curved grids that leaves second order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.constants import scalar
from ldm.diffusion.samplers.common import Denoise, Levels, Model, NoiseFn, State, Step, begin, check_range
from ldm.diffusion.samplers.weights import exponential_moments, lagrange_weights
from ldm.diffusion.schedules import BLIND

BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _eps(x: State, x0: State, s: float) -> Tensor:
    return (x - x0).div_(scalar(s, x.dtype))


def _advance(x: State, x0: State, s: float, weights: Sequence[float], past: Sequence[Tensor]) -> State:
    """x + sum(weights * past), where past[0] is eps at x: that term as a lerp, for less is lost at high sigma."""
    moved = x0.lerp(x, 1 + weights[0] / s)
    for weight, eps in zip(weights[1:], past[1:], strict=False):
        moved.add_(eps, alpha=weight)
    return moved


def _even_weights(s: float, t: float, points: int) -> list[float]:
    return [(t - s) * c for c in BASHFORTH[points - 1]]


def _run(
    model: Model, x: State, grid: list[float], plan: Sequence[Sequence[float]], past: list[Tensor]
) -> Iterator[Step]:
    """One evaluation a step, combined by the plan's weights, newest first."""
    for (s, t), weights in zip(pairwise(grid), plan, strict=True):
        x0 = model(x, s)
        past.insert(0, _eps(x, x0, s))
        del past[len(BASHFORTH) :]
        x = _advance(x, x0, s, weights, past)
        yield Step(x, x0, t)


@lru_cache(maxsize=8)
def _lms_plan(grid: tuple[float, ...], order: int) -> list[list[float]]:
    plan = []
    for i, (s, t) in enumerate(pairwise(grid)):
        nodes = [level - s for level in reversed(grid[max(0, i + 1 - order) : i + 1])]
        plan.append(lagrange_weights(nodes, [(t - s) ** (k + 1) / (k + 1) for k in range(len(nodes))]))
    return plan


@lru_cache(maxsize=8)
def _deis_plan(grid: tuple[float, ...], order: int) -> list[list[float]]:
    plan = []
    for i, (s, t) in enumerate(pairwise(grid)):
        if t == 0:
            plan.append([-s])
            continue
        nodes = [math.log(s / level) for level in reversed(grid[max(0, i + 1 - order) : i + 1])]
        moments = exponential_moments(-1.0, math.log(s / t), len(nodes))  # dsigma = -s exp(-tau) dtau
        plan.append(lagrange_weights(nodes, [-s * m for m in moments]))
    return plan


def lms(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep by exact quadrature in sigma (Crowson's k-diffusion); the first steps take fewer points."""
    check_range("order", order, 1, 4)
    model, x, grid = begin(denoise, x, sigmas)
    return _run(model, x, grid, _lms_plan(tuple(grid), order), [])


def deis(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, order: int = 3) -> Iterator[Step]:
    """DEIS, tAB in log rho (Zhang & Chen 2023, Eq. 15); the first steps take fewer points."""
    check_range("order", order, 1, 4)
    model, x, grid = begin(denoise, x, sigmas)
    return _run(model, x, grid, _deis_plan(tuple(grid), order), [])


def ipndm(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """Improved PNDM (Zhang & Chen 2023, appendix): Adams-Bashforth 4 that starts with fewer points."""
    model, x, grid = begin(denoise, x, sigmas)
    return _run(model, x, grid, [_even_weights(s, t, min(i + 1, 4)) for i, (s, t) in enumerate(pairwise(grid))], [])


def plms(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, as CompVis has it): its first step is Heun's, at two evaluations."""
    model, x, grid = begin(denoise, x, sigmas)
    (s, t), past = grid[:2], list[Tensor]()
    x0 = model(x, s)
    past.append(_eps(x, x0, s))
    moved = x0.lerp(x, t / s)
    if t > 0 and s <= BLIND:
        slope = _eps(moved, model(moved, t), t)
        moved = _advance(x, x0, s, [(t - s) / 2, (t - s) / 2], [past[0], slope])
    yield Step(moved, x0, t)
    rest = grid[1:]
    plan = [_even_weights(s, t, min(i + 2, 4)) for i, (s, t) in enumerate(pairwise(rest))]
    yield from _run(model, moved, rest, plan, past)


def mean(s: float, t: float) -> float:
    """The middle of a step in sigma, in which Runge-Kutta 4 is of fourth order."""
    return (s + t) / 2


def pndm(
    denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, middle: Callable[[float, float], float] = mean
) -> Iterator[Step]:
    """PNDM (Liu et al. 2022, algorithm 2): three Runge-Kutta steps of four evaluations, then Adams-Bashforth 4.

    `middle(s, t)` is the level half way; the paper takes the middle training step.
    """
    model, x, grid = begin(denoise, x, sigmas)
    past: list[Tensor] = []
    start = min(3, len(grid) - 1)
    for s, t in pairwise(grid[: start + 1]):
        half = middle(s, t)
        x0 = model(x, s)
        first = _eps(x, x0, s)
        past.insert(0, first)
        if t > 0:
            trial = x0.lerp(x, half / s)
            second = _eps(trial, model(trial, half), half)
            trial = _advance(x, x0, s, [0.0, half - s], [first, second])
            third = _eps(trial, model(trial, half), half)
            trial = _advance(x, x0, s, [0.0, t - s], [first, third])
            fourth = _eps(trial, model(trial, t), t)
            weights = [(t - s) * c for c in (1 / 6, 1 / 3, 1 / 3, 1 / 6)]
            x = _advance(x, x0, s, weights, [first, second, third, fourth])
        else:
            x = x0
        yield Step(x, x0, t)
    rest = grid[start:]
    yield from _run(model, x, rest, [_even_weights(s, t, 4) for s, t in pairwise(rest)], past)
