"""The training loss, one for every prediction type: weight * (net - target)^2, target = (x0 - skip * x) / out.

A weighting is a function of sigma and of `out`, since a weight w on the error of x0 is w * out^2 on the network's.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.constants import column
from ldm.diffusion.denoiser import columns, evaluate
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.variance import variance_bound
from ldm.errors import UserError
from ldm.shapes import Latent, Sigma

Weighting = Callable[..., Tensor]  # (sigma, out), and gamma where a paper has such a number
WEIGHTINGS: dict[str, Weighting] = {
    # 1 on the network's own output: DDPM's simple loss, and under edm scalings EDM's weight.
    "uniform": lambda sigma, out: torch.ones_like(sigma),
    # The loss of a noise predictor, whatever the network predicts.
    "snr": lambda sigma, out: (out / sigma) ** 2,
    # min(SNR, gamma) on x0 (Hang et al. 2023): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v.
    "min_snr": lambda sigma, out, gamma=5.0: (sigma**-2).clamp(max=gamma) * out**2,
    # Min-SNR without its corner: 1 / (sigma^2 + 1 / gamma) on x0 (Crowson et al. 2024, Eq. 5).
    "soft_min_snr": lambda sigma, out, gamma=5.0: out**2 / (sigma**2 + 1 / gamma),
    # 1 / (1 + SNR)^gamma on the noise (Choi et al. 2022, Eq. 8, k = 1): less of what the eye does not see.
    "p2": lambda sigma, out, gamma=1.0: (out / sigma) ** 2 * (1 + sigma**-2) ** -gamma,
    # (sigma^2 + gamma^2) / (sigma gamma)^2 on x0, gamma being the data's deviation (Karras et al. 2022, table 1).
    "edm": lambda sigma, out, gamma=0.5: out**2 * (sigma**-2 + gamma**-2),
}


def find_weighting(name: str, gamma: float | None = None) -> Weighting:
    """A weighting with its own gamma, or the paper's. UserError where it has none, or gamma is not above 0."""
    weighting = WEIGHTINGS[name]
    if gamma is None:
        return weighting
    if "gamma" not in inspect.signature(weighting).parameters:
        raise UserError(f"loss.gamma is {gamma}, but the weighting {name!r} has no such number: leave it out")
    if gamma <= 0:
        raise UserError(f"loss.gamma is {gamma}: needs a number above 0")
    return partial(weighting, gamma=gamma)


def diffusion_loss(
    backbone: Callable[..., Tensor],
    prediction: Prediction,
    schedule: Schedule,
    x0: Latent,
    sigma: Sigma,
    noise: Latent,
    cond: Any,
    weighting: Weighting = WEIGHTINGS["uniform"],
    *,
    seen: Latent | None = None,
    vlb: float = 0.0,
) -> Float[Tensor, " b"]:
    """The weighted squared error of the network's output for each sample, averaged over c, h, w.

    seen: the noise in the network's input, where that is not `noise`, which it shall answer (input perturbation: Ning
    et al. 2023). A network of twice the channels says its variance too: then `vlb` times its bound joins the loss.
    """
    level = column(sigma, x0)
    x = x0 + level * noise
    scaling = columns(prediction(sigma), x)
    target = (x0 - scaling.skip * x) / scaling.out
    x = x if seen is None else x0 + level * seen
    output = evaluate(backbone, scaling.inp * x, schedule.label(sigma), cond)
    answer = output[:, : x0.shape[1]]
    weight = weighting(sigma, scaling.out.view(-1))
    loss = weight * (answer - target).square().flatten(1).mean(1)
    if output.shape == answer.shape:
        return loss
    guess = (scaling.skip * x + scaling.out * answer).detach()  # the bound moves the variance alone
    return loss + vlb * variance_bound(schedule, x0, guess, sigma, output[:, x0.shape[1] :])
