"""The training loss, one for every prediction type: weight * (net - target)^2, target = (x0 - skip * x) / out.

A weighting is a function of sigma and of `out`, since a weight w on the error of x0 is w * out^2 on the network's.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import columns, evaluate
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.schedules import Schedule
from ldm.shapes import Latent, Sigma

Weighting = Callable[[Tensor, Tensor], Tensor]


def uniform(sigma: Tensor, out: Tensor) -> Tensor:
    """1 on the network's own output: DDPM's simple loss, and under edm scalings EDM's weight."""
    return torch.ones_like(sigma)


def snr(sigma: Tensor, out: Tensor) -> Tensor:
    """The loss of a noise predictor, whatever the network predicts."""
    return (out / sigma) ** 2


def min_snr(sigma: Tensor, out: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on x0 (Hang et al. 2023): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v."""
    return (sigma**-2).clamp(max=gamma) * out**2


def soft_min_snr(sigma: Tensor, out: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR without its corner: 1 / (sigma^2 + 1 / gamma) on x0 (Crowson et al. 2024, Eq. 5)."""
    return out**2 / (sigma**2 + 1 / gamma)


WEIGHTINGS: dict[str, Weighting] = {
    "uniform": uniform,
    "snr": snr,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
}


def diffusion_loss(
    backbone: Callable[..., Tensor],
    prediction: Prediction,
    schedule: Schedule,
    x0: Latent,
    sigma: Sigma,
    noise: Latent,
    cond: Any,
    weighting: Weighting = uniform,
) -> Float[Tensor, " b"]:
    """The loss of each sample, (b,): the weighted squared error of the network's output, averaged over c, h, w."""
    x = x0 + sigma.view((-1,) + (1,) * (x0.ndim - 1)) * noise
    scaling = columns(prediction(sigma), x)
    output = evaluate(backbone, scaling.inp * x, schedule.label(sigma), cond)
    target = (x0 - scaling.skip * x) / scaling.out
    weight = weighting(sigma, scaling.out.view(-1))
    return weight * (output - target).square().flatten(1).mean(1)
