"""An objective with its optimiser: the part of the loop that moves parameters."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.training.config import OptimConfig
from ldm.training.optim import clipped, fill_slots, make_optimizer, named, slots

Batch = dict[str, Any]  # of ldm.data.dataset, on the device; and `step`
Losses = dict[str, Tensor]  # "loss", which is minimised, and other scalars for the log


class Objective(NamedTuple):
    """What one optimiser minimises: the networks it moves, by name, their loss, and the first step at which it acts.

    The objectives of a task see each batch in turn, before any of them moves.
    """

    name: str
    networks: Mapping[str, nn.Module]
    loss: Callable[[Batch], Losses]
    start: int = 0


class Loss(nn.Module):
    """An objective as a module, which accelerate wraps: for mixed precision, for gradients averaged over processes."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(objective.networks)
        self.function = objective.loss

    def forward(self, batch: Batch) -> Losses:
        return self.function(batch)


GROWTH = 2000  # steps without overflow before the scale of an fp16 loss doubles
SCALE, STREAK = "scale", "streak"


class Learner:
    """An objective with its optimiser. main: its values stand in the log under plain names.

    In fp16 the loss is multiplied by a scale that halves whenever a gradient overflows, which leaves that step out
    (Micikevicius et al. 2018); this is no fault, so that nobody is told.
    """

    def __init__(self, objective: Objective, config: OptimConfig, accelerator: Accelerator, *, main: bool) -> None:
        self.objective, self.config, self.accelerator, self.main = objective, config, accelerator, main
        self.module = accelerator.prepare_model(Loss(objective))
        parameters = named(objective.networks)
        self.parameters = [p for p in parameters.values() if p.requires_grad]
        self.optimizer = make_optimizer(parameters, config)
        self.loss = torch.zeros((), device=accelerator.device)
        self.overflow = torch.zeros((), device=accelerator.device)
        half = accelerator.mixed_precision == "fp16"
        self.scaler = {SCALE: torch.full_like(self.loss, 2.0**16), STREAK: torch.zeros_like(self.loss)} if half else {}

    def backward(self, batch: Batch, parts: int, *, last: bool) -> Losses:
        """Add the gradients of one part of a batch; processes average them once, after the last part."""
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            losses = self.module(batch)
            (losses["loss"] * self.scaler.get(SCALE, 1) / parts).backward()
        self.loss = self.loss + losses["loss"].detach()
        return {self.tag(name): value.detach() for name, value in losses.items()}

    def tag(self, name: str) -> str:
        return name if self.main else f"{self.objective.name}_{name}"

    def clip(self) -> Tensor:
        """Clip the gradients and return their norm, 0 where they overflowed."""
        if not self.scaler:
            return clipped(self.parameters, self.config.clip)
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1 / self.scaler[SCALE])
        norm = clipped(self.parameters, self.config.clip)
        self.overflow = (~norm.isfinite()).float()
        streak = torch.where(self.overflow > 0, 0, self.scaler[STREAK] + 1)
        self.scaler[SCALE].mul_(1 - 0.5 * self.overflow).mul_(1 + (streak == GROWTH).float())
        self.scaler[STREAK].copy_(streak % GROWTH)
        return torch.where(self.overflow > 0, 0, norm)

    def step(self, lr: float, skip: Tensor) -> None:
        """Move the parameters, unless `skip` is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        skip = torch.maximum(skip, self.overflow)
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # read by the fused kernel
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros_like(self.loss)

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor, of all that the next step depends on besides the networks."""
        return slots(self.optimizer) | self.scaler

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the state one that has the names of these tensors, and their values."""
        fill_slots(self.optimizer, tensors)
        for name in self.scaler.keys() & tensors.keys():
            self.scaler[name].copy_(tensors[name])


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, which must all ask for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value
