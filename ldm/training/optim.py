"""The optimiser of an objective and its learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.training.config import OptimConfig


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; biases, gains and other vectors do not decay.

    Fused because its step takes `found_inf`, a tensor: a step can be left out without asking the device first.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (the first is 0) of `steps`.

    A linear rise over `warmup` updates, then constant, or half a cosine down to 0 at the end.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def clipped(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients to a joint norm of at most `limit` (0: leave them) and return the norm that they had."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit or math.inf, foreach=True)
