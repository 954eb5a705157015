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

Groups = list[dict[str, Any]]
Parameters = Mapping[str, nn.Parameter]
# What Prodigy learns, which it keeps beside its settings.
_LEARNED = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
_NUMBER = "#"  # after the name of what is no tensor in memory


def make_optimizer(parameters: Parameters, config: OptimConfig) -> Optimizer:
    """The optimiser that a config names, over parameters by name; those that are frozen are left out.

    Biases, gains and other vectors do not decay. UserError where nothing is left, or its library is not installed.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise UserError("freeze leaves nothing to train: name fewer parameters")
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trained.items():
        scale = [rate for pattern, rate in config.rates.items() if matches(name, pattern)][-1:] or [1.0]
        groups.setdefault((parameter.ndim >= 2, scale[0]), []).append((name, parameter))
    return OPTIMIZERS[config.kind](
        [
            {"params": pairs, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
            for (decays, scale), pairs in groups.items()
        ],
        config,
    )


def adamw(groups: Groups, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused: its step takes `found_inf`, a tensor, and so is left out unasked."""
    return torch.optim.AdamW(_bare(groups), lr=config.lr, betas=config.betas, fused=True)


def adamw8bit(groups: Groups, config: OptimConfig) -> Optimizer:
    """AdamW with moments of 8 bits (Dettmers et al. 2022); those of small parameters stay at 32."""
    bitsandbytes = _library("bitsandbytes", "adamw8bit")
    made: Optimizer = bitsandbytes.optim.AdamW8bit(_bare(groups), lr=config.lr, betas=config.betas)
    return made


def prodigy(groups: Groups, config: OptimConfig) -> Optimizer:
    """AdamW that finds its own rate (Mishchenko & Defazio 2024); `lr` multiplies it and is best left at 1."""
    if config.rates:
        raise UserError("optim.rates has no meaning for prodigy, which finds one rate for all: leave it out")
    library = _library("prodigyopt", "prodigy")
    made: Optimizer = library.Prodigy(
        _bare(groups), lr=config.lr, betas=config.betas, safeguard_warmup=config.warmup > 0
    )
    return made


def adafactor(groups: Groups, config: OptimConfig) -> Optimizer:
    """Second moments as rows times columns (Shazeer & Stern 2018): next to no memory."""
    return torch.optim.Adafactor(_bare(groups), lr=config.lr)


def muon(groups: Groups, config: OptimConfig) -> Optimizer:
    """Matrices along the nearest orthogonal one of their momentum (Jordan et al. 2024), at AdamW's size of a step.

    Tables of embeddings, convolutions and vectors go by AdamW.
    """
    parts: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for part, wanted in zip(parts, (True, False), strict=True):
            pairs = [(n, p) for n, p in group["params"] if (p.ndim == 2 and "embedding" not in n) == wanted]
            part.extend([group | {"params": pairs}] if pairs else [])
    if not parts[0]:
        raise UserError("optim.kind muon: nothing that is trained is a matrix; take adamw")
    first = torch.optim.Muon(_bare(parts[0]), lr=config.lr, adjust_lr_fn="match_rms_adamw")
    return Both(first, torch.optim.AdamW(_bare(parts[1]), lr=config.lr, betas=config.betas)) if parts[1] else first


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


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "prodigy": prodigy,
    "adafactor": adafactor,
    "muon": muon,
}


def _bare(groups: Groups) -> Groups:
    return [group | {"params": [parameter for _, parameter in group["params"]]} for group in groups]


def _library(name: str, kind: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"optim.kind {kind} needs {name}: pip install {name}, or take another kind") from None


def slots(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that an optimiser remembers, by name: its tensors themselves, its numbers as tensors."""
    kept: dict[str, Any] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        kept |= {f"{index}.{slot}": value for slot, value in optimizer.state.get(parameter, {}).items()}
    for index, group in enumerate(optimizer.param_groups):
        kept |= {f"group{index}.{key}": group[key] for key in _LEARNED if "d_max" in group and key in group}
    return {
        name if isinstance(value, Tensor) else name + _NUMBER: torch.as_tensor(
            value, dtype=torch.float64 if isinstance(value, float) else None
        )
        for name, value in kept.items()
    }


def fill_slots(optimizer: Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Undo `slots`."""
    for index, parameter in enumerate(_parameters(optimizer)):
        optimizer.state[parameter] = {
            slot: _like(parameter, value) for slot, value in _below(f"{index}.", kept).items()
        }
    for index, group in enumerate(optimizer.param_groups):
        group |= _below(f"group{index}.", kept)


def _below(prefix: str, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    found = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
    return {
        name.removesuffix(_NUMBER): value.item() if name.endswith(_NUMBER) else value for name, value in found.items()
    }


def _like(parameter: Tensor, value: Any) -> Any:
    """A slot on the parameter's device, laid out in memory as it: the fused kernel walks over both by address."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(split_as(parameter, value))
    return value.to(parameter.device, copy=True)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def freeze(networks: Mapping[str, nn.Module], patterns: Sequence[str]) -> None:
    """Leave parameters as they are: those whose name fits a pattern, such as `encoder.*` or `backbone.conv_in.*`.

    UserError for a pattern that fits none.
    """
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
    """Learning rate of update `step` (the first is 0) of `steps`.

    A linear rise over `warmup` updates, then constant, or half a cosine down to 0 at the end.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
