"""Multistep solvers: one evaluation a step, and a polynomial through the last ones, integrated over the step.

On the noise eps = (x - x0) / sigma the probability-flow ODE is dx = eps dsigma: Adams-Bashforth and its kin (`lms`,
`deis`, `ipndm`). On x0 it is dx = -(x - x0) dlambda in lambda = -log sigma, and exact in x: DPM-Solver++, UniPC,
SA-Solver, ER-SDE. There a corrector can go over a step again once x0 at its end is known, at no extra evaluation. All
of that is linear in x and the past, so that a step, and the correction of the one before it, come down to one row of
weights.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise, zip_longest

import numpy as np

from ldm.diffusion.samplers.common import Grid, Row, check_range
from ldm.errors import unknown

BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def exponential_moments(rate: float, h: float, n: int) -> list[float]:
    """The integrals of tau^i * exp(rate * tau) over [0, h], i < n."""
    z = rate * h
    if abs(z) < 1:  # the recursion below cancels, the series does not
        terms = list(accumulate(range(1, 18), lambda term, k: term * z / k, initial=1.0))
        return [h ** (i + 1) * sum(term / (i + 1 + k) for k, term in enumerate(terms)) for i in range(n)]
    moments = [math.expm1(z) / rate]
    for i in range(1, n):
        moments.append((h**i * math.exp(z) - i * moments[-1]) / rate)  # by parts
    return moments


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w with sum(w_j * p(nodes_j)) = the integral of p, for all polynomials p of degree < len(nodes).

    The moments are the integrals of 1, tau, tau^2, ...
    """
    weights = []
    for j, node in enumerate(nodes):
        basis = [1.0]  # coefficients of the j-th Lagrange polynomial, lowest power first
        for other in (*nodes[:j], *nodes[j + 1 :]):
            scale = 1 / (node - other)
            basis = [(low - other * high) * scale for low, high in zip([0.0, *basis], [*basis, 0.0], strict=True)]
        weights.append(sum(c * moment for c, moment in zip(basis, moments, strict=False)))
    return weights


def _recent(grid: Grid, i: int, points: int) -> Grid:
    """The levels of the last evaluations before step i, newest first."""
    return grid[max(0, i + 1 - points) : i + 1][::-1]


def _adams(grid: Grid, points: int, weigh: Callable[[Grid, float], Sequence[float]]) -> list[Row]:
    """weigh(levels of the past, level t of the step's end) -> weights on eps there."""
    check_range("order", points, 1, 4)
    rows = []
    for i, (s, t) in enumerate(pairwise(grid)):
        levels = _recent(grid, i, points)
        newest, *older = (w / level for w, level in zip(weigh(levels, t), levels, strict=False))  # on x - x0
        rows.append(Row(s, t, t / s, [newest - (t - s) / s, *older] if older else ()))
    return rows


def lms(grid: Grid, *, order: int = 4) -> list[Row]:
    """Exact quadrature in sigma; the first steps take fewer points."""

    def weigh(levels: Grid, t: float) -> list[float]:
        h = t - levels[0]
        return lagrange_weights([u - levels[0] for u in levels], [h ** (k + 1) / (k + 1) for k in range(len(levels))])

    return _adams(grid, order, weigh)


def deis(grid: Grid, *, order: int = 3) -> list[Row]:
    """tAB in log rho (Eq. 15): quadrature of the polynomial in log sigma; the first steps take fewer points."""

    def weigh(levels: Grid, t: float) -> list[float]:
        s = levels[0]
        if t == 0:
            return [-s]
        moments = exponential_moments(-1.0, math.log(s / t), len(levels))  # dsigma = -s exp(-tau) dtau
        return lagrange_weights([math.log(s / u) for u in levels], [-s * m for m in moments])

    return _adams(grid, order, weigh)


def ipndm(grid: Grid) -> list[Row]:
    """The coefficients of even steps, whatever the steps, which on curved grids leaves second order."""
    return _adams(grid, 4, lambda levels, t: [(t - levels[0]) * c for c in BASHFORTH[len(levels) - 1]])


# Published solvers on x0 differ only in the moments of a step's kernel that they use, their rule:
RULES = {
    "exact": "the moments themselves",
    "midpoint": "half the step for the first moment of two points (DPM-Solver++ 2M, UniPC's B2)",
    "taylor": "the first moment of two points to leading order (UniPC's B1, SA-Solver)",
    "published": "exact for two points; for three, half the second moment, as the code of DPM-Solver++ 3M has it",
}


def _moments(rule: str, rate: float, h: float, n: int) -> list[float]:
    """Moments of the kernel rate * exp(-rate * (h - tau)) over a step of length h."""
    exact = [rate * math.exp(-rate * h) * m for m in exponential_moments(rate, h, n)]
    if n == 2 and rule == "midpoint":
        exact[1] = exact[0] * h / 2
    elif n == 2 and rule == "taylor":
        exact[1] = rate * h * h / 2
    elif n == 3 and rule == "published":
        exact[2] /= 2
    return exact


def _row(s: float, t: float, keep: float, weights: Sequence[float], up: float) -> Row:
    """A row from whole weights on x0, whose sum is 1 - keep."""
    newest, *older = weights
    return Row(s, t, keep, [newest - (1 - keep), *older] if older else (), up)


def _exponential(
    grid: Grid, tau: Callable[[float], float], rule: str, *, predict: int, correct: int = 0, settle: bool = False
) -> list[Row]:
    """dx = -(x - x0) (1 + tau^2) dlambda + noise (SA-Solver: Xue et al. 2023, Eq. 14), exactly in x.

    tau(sigma) 0 is the probability-flow ODE, 1 the reverse SDE. predict, correct: the points of either, 0 for none;
    settle: the order falls before a last 0.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    rows = []
    amend: list[float] = []  # what the corrector changes of the step before, as weights on x0
    last = len(grid) - 2
    for i, (s, t) in enumerate(pairwise(grid)):
        if t == 0:
            rows.append(Row(s, t, 0.0))
            continue
        h, noisy = math.log(s / t), tau(s) ** 2
        left = last - i + 1 if settle and grid[-1] == 0 else len(grid)
        past = [math.log(s / level) for level in _recent(grid, i, max(predict, correct))]
        first, again = (
            lagrange_weights(nodes, _moments(rule, 1 + noisy, h, len(nodes)))
            for nodes in (past[: min(predict, left)], [h, *past[: min(correct - 1, left)]] if correct else [])
        )
        keep = t / s * math.exp(-noisy * h)
        weights = [keep * change + weight for change, weight in zip_longest(amend, first, fillvalue=0.0)]
        rows.append(_row(s, t, keep, weights, t * math.sqrt(-math.expm1(-2 * noisy * h))))
        if again:  # by then every x0 that the predictor used is one place older
            amend = [new - old for new, old in zip_longest(again, [0.0, *first], fillvalue=0.0)]
    return rows


def dpmpp(grid: Grid, *, points: int = 2, rule: str = "exact", eta: float = 0.0) -> list[Row]:
    """DPM-Solver++ of two points (algorithm 2) or three, on the reverse SDE where eta > 0 (appendix).

    First order at the start and into 0. k-diffusion's `heun` is rule exact, its 3M rule published.
    """
    check_range("eta", eta, 0)
    return _exponential(grid, lambda sigma: math.sqrt(eta), rule, predict=points)


def unipc(grid: Grid, *, order: int = 3, rule: str = "midpoint") -> list[Row]:
    """UniPC (algorithms 1 and 2); rule midpoint is its B2, taylor its B1."""
    check_range("order", order, 1, 3)
    return _exponential(grid, lambda sigma: 0.0, rule, predict=order, correct=order + 1, settle=True)


def middle(sigma: float) -> float:
    """tau 1 in the middle of the run: the training steps 200 to 800 of the scaled-linear schedule."""
    return 1.0 if 0.57 <= sigma <= 5.1 else 0.0


def sa_solver(grid: Grid, *, tau: Callable[[float], float] = middle, rule: str = "taylor") -> list[Row]:
    """SA-Solver (algorithm 1), predictor and corrector of two points; tau(sigma) sets the noise."""
    return _exponential(grid, tau, rule, predict=2, correct=2, settle=True)


def er_noise(sigma: float) -> float:
    """The paper's fifth and recommended scale, Eq. 21."""
    return sigma * (math.exp(sigma**0.3) + 10)


@cache
def _gauss() -> list[tuple[float, float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def er_sde(grid: Grid, *, order: int = 3, phi: Callable[[float], float] = er_noise) -> list[Row]:
    """ER-SDE-Solver-1, 2 or 3 (algorithms 1 to 3): x0 as the polynomial in sigma through its last evaluations.

    A step keeps r = phi(t) / phi(s) of the noise and adds back what is missing of t; phi(sigma) = sigma is the ODE.
    """
    check_range("order", order, 1, 3)
    rows = []
    for i, (s, t) in enumerate(pairwise(grid)):
        if t == 0:
            rows.append(Row(s, t, 0.0))
            continue
        nodes = [level - s for level in _recent(grid, i, order)]
        keep, h = phi(t) / phi(s), math.log(s / t)
        points = [(s * math.exp(-h * z), h * w) for z, w in _gauss()]  # du = u dlog(u)
        moments = [1 - keep]  # of phi(t) phi'(u) / phi(u)^2 over the step, by parts, so that phi' is not needed
        for k in range(1, len(nodes)):
            rest = sum(w * u * (u - s) ** (k - 1) / phi(u) for u, w in points)
            moments.append((t - s) ** k + k * phi(t) * rest)
        missing = 1 - (s * keep / t) ** 2
        up = t * math.sqrt(missing) if missing > 1e-12 else 0.0
        rows.append(_row(s, t, keep, lagrange_weights(nodes, moments), up))
    return rows
