"""Learned variances of the reverse steps and the bound that trains them (Nichol & Dhariwal 2021, Eq. 15 and 16).

In the coordinate x = x0 + sigma * eps, where the step from sigma to the level `below` has the posterior
N((1 - r) x0 + r x, below^2 (1 - r)) with r = (below / sigma)^2.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.constants import column
from ldm.diffusion.schedules import Schedule
from ldm.shapes import Latent, Sigma


def bounds(sigma: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """ln of the least and the greatest variance of a step: DDPM's beta-tilde and beta, moved to this coordinate."""
    gap = sigma**2 - below**2
    return (below**2 * gap / sigma**2).log(), (gap * (1 + below**2) / (1 + sigma**2)).log()


def variance_bound(schedule: Schedule, x0: Latent, guess: Latent, sigma: Sigma, said: Latent) -> Float[Tensor, " b"]:
    """The term of each sample's bound, (b,), in bits an element: how far the step taken is from the step known x0.

    guess: x0 as the network has it; said: its raw answer, -1 for the least variance and 1 for the greatest. At the
    lowest level it is the likelihood of x0 itself.
    """
    levels = sigma.double()
    step = schedule.label(levels).round()
    below = schedule.at((step - 1).clamp(min=0))
    first = step == 0
    # As the paper does: the last step has the posterior variance 0, and takes that of the one before.
    least, most = bounds(torch.where(first, schedule.at(torch.ones_like(step)), levels), below)
    most = torch.where(first, bounds(levels, torch.zeros_like(levels))[1], most)
    least, most, moved = (column(v.float(), x0) for v in (least, most, 1 - (below / levels) ** 2))
    first = column(first, x0)
    share = (said.float() + 1) / 2
    logvar = share * most + (1 - share) * least
    gap = torch.where(first, 1.0, moved) * (x0 - guess).float()
    likelihood = 0.5 * (math.log(2 * math.pi) + logvar + gap**2 * (-logvar).exp())
    divergence = 0.5 * (logvar - least + (least - logvar).exp() + gap**2 * (-logvar).exp() - 1)
    nats = torch.where(first, likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2)
