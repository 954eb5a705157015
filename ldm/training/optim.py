"""The optimiser of an objective, its state and its learning rate."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.errors import UserError
from ldm.training.config import OptimConfig
from ldm.training.sharding import split_as

Groups = list[dict[str, Any]]  # of pairs, a name and its parameter
Parameters = Mapping[str, nn.Parameter]
# What Prodigy learns, which it keeps beside its settings.
_LEARNED = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
_NUMBER = "#"  # after the name of what is no tensor in memory


def make_optimizer(parameters: Parameters, config: OptimConfig) -> Optimizer:
    """The optimiser that a config names, over parameters by name; frozen ones are left out, vectors do not decay.

    UserError where nothing is left, or its library is not installed.
    """
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            scale = [rate for pattern, rate in config.rates.items() if matches(name, pattern)][-1:] or [1.0]
            groups.setdefault((parameter.ndim >= 2, scale[0]), []).append((name, parameter))
    if not groups:
        raise UserError("freeze leaves nothing to train: name fewer parameters")
    made = [
        {"params": pairs, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (decays, scale), pairs in groups.items()
    ]
    return OPTIMIZERS[config.kind](made, config)


def adamw(groups: Groups, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused: its step takes `found_inf`, a tensor, and so is left out unasked."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def adamw8bit(groups: Groups, config: OptimConfig) -> Optimizer:
    """AdamW with moments of 8 bits (Dettmers et al. 2022); those of small parameters stay at 32."""
    kind: Callable[..., Optimizer] = _library("bitsandbytes", "adamw8bit").optim.AdamW8bit
    return kind(groups, lr=config.lr, betas=config.betas)


def prodigy(groups: Groups, config: OptimConfig) -> Optimizer:
    """AdamW that finds its own rate (Mishchenko & Defazio 2024); `lr` multiplies it and is best left at 1."""
    if config.rates:
        raise UserError("optim.rates has no meaning for prodigy, which finds one rate for all: leave it out")
    kind: Callable[..., Optimizer] = _library("prodigyopt", "prodigy").Prodigy
    return kind(groups, lr=config.lr, betas=config.betas, safeguard_warmup=config.warmup > 0)


def adafactor(groups: Groups, config: OptimConfig) -> Optimizer:
    """Second moments as rows times columns (Shazeer & Stern 2018): next to no memory."""
    return torch.optim.Adafactor(groups, lr=config.lr)


def muon(groups: Groups, config: OptimConfig) -> Optimizer:
    """Matrices along the nearest orthogonal one of their momentum (Jordan et al. 2024), the rest by AdamW."""
    parts: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for part, wanted in zip(parts, (True, False), strict=True):
            pairs = [(n, p) for n, p in group["params"] if (p.ndim == 2 and "embedding" not in n) == wanted]
            part.extend([group | {"params": pairs}] if pairs else [])
    if not parts[0]:
        raise UserError("optim.kind muon: nothing that is trained is a matrix; take adamw")
    first = torch.optim.Muon(parts[0], lr=config.lr, adjust_lr_fn="match_rms_adamw")
    return Both(first, torch.optim.AdamW(parts[1], lr=config.lr, betas=config.betas)) if parts[1] else first


class Both(Optimizer):
    """Two optimisers of different parameters as one; they share their groups and their state with it."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], Optimizer]]
OPTIMIZERS = {"adamw": adamw, "adamw8bit": adamw8bit, "prodigy": prodigy, "adafactor": adafactor, "muon": muon}


def _library(name: str, kind: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"optim.kind {kind} needs {name}: pip install {name}, or take another kind") from None


def slots(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that an optimiser remembers, by name: its tensors themselves, its numbers as tensors."""
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]
    kept: dict[str, Any] = {f"{i}.{slot}": value for i, state in enumerate(states) for slot, value in state.items()}
    for index, group in enumerate(optimizer.param_groups):
        kept |= {f"group{index}.{key}": group[key] for key in _LEARNED if "d_max" in group and key in group}
    for name in [name for name, value in kept.items() if not isinstance(value, Tensor)]:
        value = kept.pop(name)
        kept[name + _NUMBER] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return kept


def fill_slots(optimizer: Optimizer, kept: Mapping[str, Tensor]) -> None:
    values = {n.removesuffix(_NUMBER): v.item() if n.endswith(_NUMBER) else v for n, v in kept.items()}

    def below(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    for index, parameter in enumerate(_parameters(optimizer)):
        optimizer.state[parameter] = state = below(f"{index}.")
        for slot, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # laid out as it, for the fused kernel
                state[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(split_as(parameter, value))
            elif isinstance(value, Tensor):
                state[slot] = value.to(parameter.device, copy=True)
    for index, group in enumerate(optimizer.param_groups):
        group |= below(f"group{index}.")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def freeze(networks: Mapping[str, nn.Module], patterns: Sequence[str]) -> None:
    """Leave parameters as they are whose name fits a pattern, such as `encoder.*`. UserError for one that fits none."""
    check_patterns(networks, patterns, "freeze")
    for name, parameter in named(networks).items():
        if any(matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def check_patterns(networks: Mapping[str, nn.Module], patterns: Iterable[str], where: str) -> None:
    """UserError for a pattern that no parameter's name fits."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in named(networks)):
            known = ", ".join(f"{name}.*" for name in networks)
            raise UserError(f"{where}: no parameter is named {pattern!r} (there are {known}: as in a model file)")


def named(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter by the name that it has in a model file."""
    return {f"{prefix}.{name}": p for prefix, network in networks.items() for name, p in network.named_parameters()}


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name fits a pattern of a shell, with the network's own name in front or without."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.split(".", 1)[1], pattern)


def rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0): a linear rise, then constant, or half a cosine down to 0 at the end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
