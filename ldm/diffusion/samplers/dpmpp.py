"""DPM-Solver++, multistep (Lu et al. 2022b): exponential integrators of x0 in lambda = -log sigma."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.samplers.common import Denoise, NoiseFn, State, Step, begin


def dpmpp_2m(denoise: Denoise, x: State, sigmas: Sequence[float] | Tensor, noise: NoiseFn) -> Iterator[Step]:
    """DPM-Solver++(2M), algorithm 2: x0 extrapolated from two evaluations; first order at the start and into 0."""
    model, x, grid = begin(denoise, x, sigmas)
    previous: State | None = None
    last = 0.0
    for s, t in pairwise(grid):
        x0 = model(x, s)
        h = math.log(s / t) if t > 0 else math.inf
        ahead = x0 if previous is None or t == 0 else x0.lerp(previous, -h / (2 * last))
        x = ahead.lerp(x, t / s)
        previous, last = x0, h
        yield Step(x, x0, t)
