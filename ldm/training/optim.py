"""The optimiser of an objective and its learning rate."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.config import OptimConfig


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; biases, gains and other vectors do not decay.

    Fused because its step takes `found_inf`, a tensor: a step can be left out without asking the device first.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise UserError("freeze leaves nothing to train: name fewer parameters")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def freeze(networks: Mapping[str, nn.Module], patterns: Sequence[str]) -> None:
    """Leave parameters as they are: those whose name fits a pattern, such as `encoder.*` or `backbone.conv_in.*`.

    UserError for a pattern that fits none.
    """
    for pattern in patterns:
        found = [p for name, p in named(networks) if matches(name, pattern)]
        if not found:
            known = ", ".join(f"{name}.*" for name in networks)
            raise UserError(f"freeze: no parameter is named {pattern!r} (there are {known}: as in a model file)")
        for parameter in found:
            parameter.requires_grad_(False)


def named(networks: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter by the name that it has in a model file."""
    return [(f"{prefix}.{name}", p) for prefix, network in networks.items() for name, p in network.named_parameters()]


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name fits a pattern of a shell, with the network's own name in front or without."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.split(".", 1)[1], pattern)


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
