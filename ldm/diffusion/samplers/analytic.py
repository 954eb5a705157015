"""Analytic-DPM (Bao et al. 2022): DDPM with the optimal variance of the reverse step, estimated from the model itself.

DDPM's posterior variance holds for one x0; given only x there are many. The optimal variance adds theirs, which the
model knows: Var(x0 | x) = sigma^2 (1 - E[eps^2]) on average over x (theorem 1, with eps the predicted noise).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.constants import column
from ldm.diffusion.samplers.common import Denoise, Grid, Levels, Model, NoiseFn, State, Step, begin


def spread(denoise: Denoise, x0: State, sigmas: Levels, noise: NoiseFn) -> list[float]:
    """Var(x0 | x) per dimension at each level but the last, by Monte Carlo over clean samples x0."""
    model, x0, grid = begin(denoise, x0, sigmas)
    found = []
    for s in grid[:-1]:
        x = x0.add(noise(x0), alpha=s)
        found.append(float(_spread(x, model(x, s), s).mean()))
    model.settle()
    return found


def _spread(x: State, x0: State, s: float) -> Tensor:
    """Of each image over its dimensions, within the bounds that any distribution keeps: (b,)."""
    return s * s * (1 - ((x - x0) / s).square().flatten(1).mean(1)).clamp(0, 1)


def analytic_dpm(
    model: Model, x: State, grid: Grid, noise: NoiseFn, *, variance: Sequence[float] | None = None
) -> Iterator[Step]:
    """DDPM's mean with the optimal variance. `variance` is what `spread` found; without it each image gives its own
    estimate at each step, fit for images of thousands of dimensions."""
    for i, (s, t) in enumerate(pairwise(grid)):
        x0 = model(x, s)
        kept = (t / s) ** 2
        posterior, share = t * t * (1 - kept), (1 - kept) ** 2
        if t == 0:
            moved = x0  # the last step gives the mean
        elif variance is not None:
            moved = x0.lerp(x, kept).add(noise(x), alpha=math.sqrt(posterior + share * variance[i]))
        else:
            deviation = (posterior + share * _spread(x, x0, s)).sqrt()
            moved = x0.lerp(x, kept) + column(deviation, x) * noise(x)
        x = moved
        yield Step(x, x0, t)
