"""The first-order family: one step that keeps down / s of the noise, then adds fresh noise of deviation up.

In x = x0 + sigma * eps the steps of DDIM (Song et al. 2021, Eq. 12), Euler (Karras et al. 2022, algorithm 1), flow
matching's Euler, DDPM (Ho et al. 2020, algorithm 2), Euler ancestral (Crowson's k-diffusion), the multistep sampling of
latent consistency models (Luo et al. 2023, algorithm 3) and of trajectory consistency distillation (Zheng et al. 2024,
algorithm 4) are the same formula; they differ in how (down, up) follow from the levels s and t of a step.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from ldm.diffusion.samplers.common import (
    Denoise,
    Levels,
    NoiseFn,
    State,
    Step,
    ancestral,
    begin,
    check_range,
    renoise,
)


def _first_order(
    denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, split: Callable[[float, float], tuple[float, float]]
) -> Iterator[Step]:
    model, x, grid = begin(denoise, x, sigmas)
    plan = [(s, t, *split(s, t)) for s, t in pairwise(grid)]
    for s, t, down, up in plan:
        x0 = model(x, s)
        # lerp, for x + slope * (t - s) loses 1e-4 to cancellation at sigma 1e4.
        x = renoise(x0.lerp(x, down / s), noise, up)
        yield Step(x, x0, t)


def ddim(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 0.0) -> Iterator[Step]:
    """DDIM: deterministic at eta 0, DDPM at eta 1."""
    check_range("eta", eta, 0, 1)
    return _first_order(denoise, x, sigmas, noise, lambda s, t: ancestral(s, t, eta))


def ddpm(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """DDPM's ancestral sampling, with the variance of the posterior given x0."""
    return ddim(denoise, x, sigmas, noise, eta=1.0)


def euler(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE."""
    return ddim(denoise, x, sigmas, noise)


def euler_a(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, *, eta: float = 1.0) -> Iterator[Step]:
    """Euler ancestral: goes down further than asked and adds noise back; DDIM's formula with another default."""
    return ddim(denoise, x, sigmas, noise, eta=eta)


def lcm(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn) -> Iterator[Step]:
    """Jump to x0, add all the noise of the next level: for networks distilled to consistency."""
    return _first_order(denoise, x, sigmas, noise, lambda s, t: (0.0, t))


def tcd(
    denoise: Denoise,
    x: State,
    sigmas: Levels,
    noise: NoiseFn,
    *,
    eta: float = 0.3,
    below: Callable[[float, float], float] | None = None,
) -> Iterator[Step]:
    """Jump to a level below the next, then add noise up to it: for networks distilled to trajectory consistency.

    `below(t, eta)` is that level, (1 - eta) * t unless given; the paper takes (1 - eta) of the training step.
    """
    check_range("eta", eta, 0, 1)

    def split(s: float, t: float) -> tuple[float, float]:
        down = below(t, eta) if below and t > 0 else (1 - eta) * t
        return down, math.sqrt(t * t - down * down)

    return _first_order(denoise, x, sigmas, noise, split)
