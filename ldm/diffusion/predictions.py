"""What a network predicts: each type is a function sigma -> (skip, out, inp) with D(x) = skip * x + out * net(inp * x).

All in the coordinate x = x0 + sigma * eps, the form of Karras et al. 2022 (EDM), Eq. 7. Training takes its target from
the same numbers, (x0 - skip * x) / out, so training and sampling cannot disagree.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """Three factors, each of the shape of sigma."""

    skip: Tensor
    out: Tensor
    inp: Tensor


Prediction = Callable[[Tensor], Scaling]


def eps(sigma: Tensor) -> Scaling:
    """The noise (Ho et al. 2020); the network sees the variance-preserving latent."""
    return Scaling(torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt())


def x0(sigma: Tensor) -> Scaling:
    """The clean latent itself."""
    return Scaling(torch.zeros_like(sigma), torch.ones_like(sigma), (1 + sigma**2).rsqrt())


def v(sigma: Tensor) -> Scaling:
    """The velocity alpha * eps - sigma_vp * x0 (Salimans & Ho 2022, appendix D)."""
    inp = (1 + sigma**2).rsqrt()
    return Scaling(inp**2, -sigma * inp, inp)


def flow(sigma: Tensor) -> Scaling:
    """The straight line's velocity eps - x0 at t = sigma / (1 + sigma) (Lipman et al. 2023, Liu et al. 2023)."""
    inp = 1 / (1 + sigma)
    return Scaling(inp, -sigma * inp, inp)


def edm(sigma: Tensor, sd: float = 0.5) -> Scaling:
    """Unit-variance input and target for data of deviation `sd` (Karras et al. 2022, table 1)."""
    inp = (sigma**2 + sd**2).rsqrt()
    return Scaling((sd * inp) ** 2, sigma * sd * inp, inp)


PREDICTIONS: dict[str, Prediction] = {"eps": eps, "x0": x0, "v": v, "flow": flow, "edm": edm}
