"""The first-order family: one step that keeps down / s of the noise, then adds fresh noise of deviation up.

In x = x0 + sigma * eps the steps of DDIM, Euler, flow matching's Euler, DDPM, Euler ancestral, and of what samples
distilled networks are the same formula; they differ in how (down, up) follow from the levels s and t of a step.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from ldm.diffusion.samplers.common import Grid, Row, ancestral, check_range


def _rows(grid: Grid, split: Callable[[float, float], tuple[float, float]]) -> list[Row]:
    return [Row(s, t, down / s, up=up) for s, t in pairwise(grid) for down, up in [split(s, t)]]


def ddim(grid: Grid, *, eta: float = 0.0) -> list[Row]:
    """Deterministic, and Euler's method, at eta 0; DDPM, and Euler ancestral, at eta 1."""
    check_range("eta", eta, 0, 1)
    return _rows(grid, lambda s, t: ancestral(s, t, eta))


def lcm(grid: Grid) -> list[Row]:
    """Jump to x0, add all the noise of the next level: for networks distilled to consistency."""
    return _rows(grid, lambda s, t: (0.0, t))


def tcd(grid: Grid, *, eta: float = 0.3, below: Callable[[float, float], float] | None = None) -> list[Row]:
    """Jump to a level below the next, then add noise up to it: for networks distilled to trajectory consistency.

    `below(t, eta)` is that level, (1 - eta) * t unless given; the paper takes (1 - eta) of the training step.
    """
    check_range("eta", eta, 0, 1)

    def split(s: float, t: float) -> tuple[float, float]:
        down = below(t, eta) if below and t > 0 else (1 - eta) * t
        return down, math.sqrt(t * t - down * down)

    return _rows(grid, split)
