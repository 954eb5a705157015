"""Any network of any family as one function, x0 = D(x, sigma, cond), with x = x0 + sigma * eps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.predictions import Prediction, Scaling
from ldm.diffusion.schedules import Schedule
from ldm.shapes import Latent, Sigma


def evaluate(
    backbone: Callable[..., Tensor], prediction: Prediction, schedule: Schedule, x: Latent, sigma: Sigma, cond: Any
) -> tuple[Tensor, Scaling]:
    """The network's raw output at x, in x's dtype, and the scalings it is to be read with, each (b, 1, 1, 1).

    The network runs in the dtype of its own parameters. Sampling and training both come through here.
    """
    column = (-1,) + (1,) * (x.ndim - 1)
    scaling = Scaling(*(factor.view(column) for factor in prediction(sigma)))
    parameter = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    dtype = x.dtype if parameter is None else parameter.dtype
    z = scaling.inp * x
    if isinstance(cond, Conditioning):
        if cond.tokens.dtype != dtype:
            cond = cond.to(x.device, dtype)
        if cond.concat is not None:
            z = torch.cat([z, cond.concat.to(z.dtype)], dim=1)
            cond = dataclasses.replace(cond, concat=None)
    # The label stays wide: bf16 rounds training step 999 to 1000.
    return backbone(z.to(dtype), schedule.label(sigma), cond).to(x.dtype), scaling


class Denoiser(nn.Module):
    """A backbone, what it predicts, and its schedule."""

    def __init__(self, backbone: Callable[..., Tensor], prediction: Prediction, schedule: Schedule) -> None:
        super().__init__()
        self.backbone = backbone
        self.prediction = prediction
        self.schedule = schedule

    def forward(self, x: Latent, sigma: Sigma, cond: Any) -> Latent:
        """The expected clean latent given the noisy x at level sigma: (b, c, h, w), in fp32 or x's wider dtype."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = sigma.to(x.dtype)
        out, scaling = evaluate(self.backbone, self.prediction, self.schedule, x, sigma, cond)
        return scaling.skip * x + scaling.out * out
