"""The first-order family: one step that keeps sigma_next / sigma of the noise, and adds fresh noise where eta > 0.

In x = x0 + sigma * eps the steps of DDIM (Song et al. 2021, Eq. 12), Euler (Karras et al. 2022, algorithm 1), flow
matching's Euler, DDPM (Ho et al. 2020, algorithm 2) and Euler ancestral (Crowson, k-diffusion) are the same formula.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.samplers.common import Denoise, NoiseFn, State, Step, ancestral, begin, check_range


def ddim(
    denoise: Denoise, x: State, sigmas: Sequence[float] | Tensor, noise: NoiseFn, *, eta: float = 0.0
) -> Iterator[Step]:
    """DDIM: deterministic at eta 0, DDPM at eta 1."""
    check_range("eta", eta, 0, 1)
    model, x, grid = begin(denoise, x, sigmas)
    splits = [ancestral(s, t, eta) for s, t in pairwise(grid)]
    for (s, t), (down, up) in zip(pairwise(grid), splits, strict=True):
        x0 = model(x, s)
        # lerp, for x + slope * (t - s) loses 1e-4 to cancellation at sigma 1e4.
        x = x0.lerp(x, down / s)
        if up > 0:
            x = x.add(noise(x), alpha=up)
        yield Step(x, x0, t)


def euler(denoise: Denoise, x: State, sigmas: Sequence[float] | Tensor, noise: NoiseFn) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE."""
    return ddim(denoise, x, sigmas, noise)


def euler_a(
    denoise: Denoise, x: State, sigmas: Sequence[float] | Tensor, noise: NoiseFn, *, eta: float = 1.0
) -> Iterator[Step]:
    """Euler ancestral: goes down further than asked and adds noise back."""
    return ddim(denoise, x, sigmas, noise, eta=eta)
