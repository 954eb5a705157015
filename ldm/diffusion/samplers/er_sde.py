"""ER-SDE-Solver (Cui et al. 2023): the family of reverse SDEs that share the marginals, by a noise scale phi(sigma).

A step keeps r = phi(t) / phi(s) of the noise and adds back what is missing of t; phi(sigma) = sigma is the ODE.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.constants import scalar
from ldm.diffusion.samplers.common import Denoise, Levels, NoiseFn, State, Step, begin, check_range, renoise
from ldm.diffusion.samplers.weights import lagrange_weights


def er_noise(sigma: float) -> float:
    """The paper's fifth and recommended scale, Eq. 21."""
    return sigma * (math.exp(sigma**0.3) + 10)


@cache
def _gauss(n: int) -> list[tuple[float, float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(((nodes + 1) / 2).tolist(), (vectors[0] ** 2).tolist(), strict=True))


def _moments(phi: Callable[[float], float], s: float, t: float, n: int) -> list[float]:
    """Integrals of (u - s)^k * phi(t) phi'(u) / phi(u)^2 over the step, by parts, so that phi' is not needed."""
    h = math.log(s / t)
    points = [(s * math.exp(-h * z), h * w) for z, w in _gauss(24)]  # du = u dlog(u)
    moments = [1 - phi(t) / phi(s)]
    for k in range(1, n):
        rest = sum(w * u * (u - s) ** (k - 1) / phi(u) for u, w in points)
        moments.append((t - s) ** k + k * phi(t) * rest)
    return moments


@lru_cache(maxsize=8)
def _plan(grid: tuple[float, ...], order: int, phi: Callable[[float], float]) -> list[tuple[float, float, list[float]]]:
    """Of each step what it keeps of x, the noise it adds, and its weights on x0, newest first."""
    plan = []
    for i, (s, t) in enumerate(pairwise(grid)):
        if t == 0:
            plan.append((0.0, 0.0, [1.0]))
            continue
        nodes = [level - s for level in reversed(grid[max(0, i + 1 - order) : i + 1])]
        keep = phi(t) / phi(s)
        missing = 1 - (s * keep / t) ** 2
        up = t * math.sqrt(missing) if missing > 1e-12 else 0.0
        plan.append((keep, up, lagrange_weights(nodes, _moments(phi, s, t, len(nodes)))))
    return plan


def er_sde(
    denoise: Denoise,
    x: State,
    sigmas: Levels,
    noise: NoiseFn,
    *,
    order: int = 3,
    phi: Callable[[float], float] = er_noise,
) -> Iterator[Step]:
    """ER-SDE-Solver-1, 2 or 3 (algorithms 1 to 3): x0 as the polynomial in sigma through its last evaluations."""
    check_range("order", order, 1, 3)
    model, x, grid = begin(denoise, x, sigmas)
    past: list[Tensor] = []
    for (s, t), (keep, up, weights) in zip(pairwise(grid), _plan(tuple(grid), order, phi), strict=True):
        x0 = model(x, s)
        past = [x0, *past[: order - 1]]
        x = x * scalar(keep, x.dtype)
        for weight, value in zip(weights, past, strict=False):
            x.add_(value, alpha=weight)
        x = renoise(x, noise, up)
        yield Step(x, x0, t)
