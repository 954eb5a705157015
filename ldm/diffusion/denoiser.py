"""Any network of any family as one function, x0 = D(x, sigma, cond), with x = x0 + sigma * eps."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.constants import column, level, scalar, uniform, wide
from ldm.diffusion.predictions import Prediction, Scaling
from ldm.diffusion.schedules import Schedule
from ldm.shapes import Latent, Sigma


def _dtype(network: nn.Module) -> torch.dtype | None:
    """Of its first parameter. `next(network.parameters())` takes eight times as long, a tenth of all a step costs."""
    for parameter in network._parameters.values():
        if parameter is not None:
            return parameter.dtype
    return next((found for child in network._modules.values() if child and (found := _dtype(child))), None)


def evaluate(backbone: Callable[..., Tensor], z: Latent, label: Tensor, cond: Any) -> Tensor:
    """The network's raw output at its own input z, in z's dtype, while it runs in its own: in sampling and training."""
    dtype, inputs = (_dtype(backbone) if isinstance(backbone, nn.Module) else None) or z.dtype, z
    if isinstance(cond, Conditioning):
        if cond.tokens.dtype != dtype:
            cond = cond.to(z.device, dtype)
        if cond.concat is not None:
            inputs = torch.cat([z, cond.concat.to(z.dtype)], dim=1)
            cond = dataclasses.replace(cond, concat=None)
    # The label stays wide: bf16 rounds training step 999 to 1000.
    answer = backbone(inputs if inputs.dtype == dtype else inputs.to(dtype), label, cond)
    return answer if answer.dtype == z.dtype else answer.to(z.dtype)


def columns(scaling: Scaling, x: Tensor) -> Scaling:
    """The factors as (b, 1, 1, 1), to multiply x with."""
    return Scaling(*(column(factor, x) for factor in scaling))


_At = tuple[Tensor | None, float, Tensor, Tensor]  # at one level: skip (None is 1), out, inp, label


class Denoiser:
    """A backbone, what it predicts, and its schedule, as one function."""

    def __init__(self, backbone: Callable[..., Tensor], prediction: Prediction, schedule: Schedule) -> None:
        self.backbone = backbone
        self.prediction = prediction
        self.schedule = schedule
        # A run asks for few levels, each for its whole batch: worked out once, on the CPU in float64.
        self.at = lru_cache(4096)(self._at)

    def _at(self, level: float, n: int, dtype: torch.dtype, device: torch.device) -> _At:
        sigma = torch.tensor([level], dtype=torch.float64)
        skip, out, inp = (float(factor) for factor in self.prediction(sigma))
        label = uniform(float(self.schedule.label(sigma)), n, dtype, device)
        return None if skip == 1 else scalar(skip, dtype), out, scalar(inp, dtype), label

    def __call__(self, x: Latent, sigma: Sigma, cond: Any) -> Latent:
        """The expected clean latent given the noisy x at level sigma: (b, c, h, w), in fp32 or x's wider dtype."""
        x = wide(x)
        one = level(sigma)
        if one is not None:
            skip, out, inp, label = self.at(one, len(x), x.dtype, x.device)
            answer = self._answer(x * inp, label, cond)
            return (x if skip is None else x * skip).add(answer, alpha=out)
        sigma = sigma.to(x.dtype)
        scaling = columns(self.prediction(sigma), x)
        answer = self._answer(scaling.inp * x, self.schedule.label(sigma), cond)
        return scaling.skip * x + scaling.out * answer

    def _answer(self, z: Latent, label: Tensor, cond: Any) -> Latent:
        """The network's, without the variances that it may say behind it."""
        answer = evaluate(self.backbone, z, label, cond)
        return answer if answer.shape == z.shape else answer[:, : z.shape[1]]
