"""Any network of any family as one function, x0 = D(x, sigma, cond), with x = x0 + sigma * eps."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.predictions import Prediction, Scaling
from ldm.diffusion.schedules import Schedule
from ldm.shapes import Latent, Sigma


def evaluate(backbone: Callable[..., Tensor], z: Latent, label: Tensor, cond: Any) -> Tensor:
    """The network's raw output at its own input z, in z's dtype. Sampling and training both come through here.

    The network runs in the dtype of its own parameters, and sees `cond.concat` as further channels.
    """
    parameter = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    dtype = z.dtype if parameter is None else parameter.dtype
    inputs = z
    if isinstance(cond, Conditioning):
        if cond.tokens.dtype != dtype:
            cond = cond.to(z.device, dtype)
        if cond.concat is not None:
            inputs = torch.cat([z, cond.concat.to(z.dtype)], dim=1)
            cond = dataclasses.replace(cond, concat=None)
    # The label stays wide: bf16 rounds training step 999 to 1000.
    return backbone(inputs.to(dtype), label, cond).to(z.dtype)


def columns(scaling: Scaling, x: Tensor) -> Scaling:
    """The factors as (b, 1, 1, 1), to multiply x with."""
    return Scaling(*(factor.view((-1,) + (1,) * (x.ndim - 1)) for factor in scaling))


class Denoiser(nn.Module):
    """A backbone, what it predicts, and its schedule."""

    def __init__(self, backbone: Callable[..., Tensor], prediction: Prediction, schedule: Schedule) -> None:
        super().__init__()
        self.backbone = backbone
        self.prediction = prediction
        self.schedule = schedule
        # A run asks for few levels, each for its whole batch: worked out once, on the CPU in float64.
        self.at = lru_cache(4096)(self._at)

    def _at(self, level: float) -> tuple[float, float, float, float]:
        sigma = torch.tensor([level], dtype=torch.float64)
        skip, out, inp = self.prediction(sigma)
        return float(skip), float(out), float(inp), float(self.schedule.label(sigma))

    def forward(self, x: Latent, sigma: Sigma, cond: Any) -> Latent:
        """The expected clean latent given the noisy x at level sigma: (b, c, h, w), in fp32 or x's wider dtype."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        levels = set(sigma.tolist())
        if len(levels) == 1:
            skip, out, inp, step = self.at(levels.pop())
            answer = evaluate(self.backbone, x * inp, x.new_full((len(x),), step), cond)
            return (x if skip == 1 else x * skip).add(answer, alpha=out)
        sigma = sigma.to(x.dtype)
        scaling = columns(self.prediction(sigma), x)
        answer = evaluate(self.backbone, scaling.inp * x, self.schedule.label(sigma), cond)
        return scaling.skip * x + scaling.out * answer
