"""An objective with its optimiser: the part of the loop that moves parameters."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.training.config import OptimConfig
from ldm.training.optim import fill_slots, make_optimizer, named, slots
from ldm.training.sharding import shard, whole

Batch = dict[str, Any]  # of ldm.data.dataset, on the device; and `step`
Losses = dict[str, Tensor]  # "loss", which is minimised, and other scalars for the log


class Objective(NamedTuple):
    """What one optimiser minimises: the networks it moves, by name, their loss, and the first step at which it acts."""

    name: str
    networks: Mapping[str, nn.Module]
    loss: Callable[[Batch], Losses]
    start: int = 0


class Loss(nn.Module):
    """An objective as a module, which accelerate wraps: for mixed precision, for gradients averaged over processes."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.networks, self.function = nn.ModuleDict(objective.networks), objective.loss

    def forward(self, batch: Batch) -> Losses:
        return self.function(batch)


GROWTH = 2000  # steps without overflow before the scale of an fp16 loss doubles
SCALE, STREAK = "scale", "streak"


class Learner:
    """An objective with its optimiser. main: its values stand in the log under plain names. split: see `sharding`.

    In fp16 the loss is multiplied by a scale that halves whenever a gradient overflows, which leaves that step out
    untold (Micikevicius et al. 2018).
    """

    def __init__(
        self, objective: Objective, config: OptimConfig, accelerator: Accelerator, *, main: bool, split: bool = False
    ) -> None:
        self.objective, self.config, self.accelerator = objective, config, accelerator
        self.prefix = "" if main else f"{objective.name}_"  # of its values in the log
        self.split, module = split, Loss(objective)
        if split:
            module = shard(module.to(accelerator.device), accelerator.device, accelerator.num_processes)
        self.module = accelerator.prepare_model(module, evaluation_mode=split)
        parameters = named(objective.networks)
        self.parameters = [p for p in parameters.values() if p.requires_grad]
        self.optimizer = make_optimizer(parameters, config)
        self.loss = torch.zeros((), device=accelerator.device)
        self.overflow = torch.zeros((), device=accelerator.device)
        half = accelerator.mixed_precision == "fp16"
        self.scaler = {SCALE: torch.full_like(self.loss, 2.0**16), STREAK: torch.zeros_like(self.loss)} if half else {}

    def backward(self, batch: Batch, parts: int, *, last: bool) -> Losses:
        """Add the gradients of one part of a batch; processes average them once, after the last part."""
        if self.split:
            self.module.set_requires_gradient_sync(last)
        with nullcontext() if last or self.split else self.accelerator.no_sync(self.module):
            losses = self.module(batch)
            (losses["loss"] * self.scaler.get(SCALE, 1) / parts).backward()
        self.loss = self.loss + losses["loss"].detach()
        return {self.prefix + name: value.detach() for name, value in losses.items()}

    def clip(self) -> Tensor:
        """The norm of the gradients, 0 where their scale was too much; `step` brings it to at most `config.clip`."""
        scale = self.scaler.get(SCALE, torch.ones_like(self.loss)).clone()
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = whole(norm).float() / scale
        self.divisor = scale * (norm / self.config.clip).clamp(min=1) if self.config.clip else scale
        if not self.scaler:
            return norm
        self.overflow = (~norm.isfinite()).float()
        streak = torch.where(self.overflow > 0, 0, self.scaler[STREAK] + 1)
        self.scaler[SCALE].mul_(1 - 0.5 * self.overflow).mul_(1 + (streak == GROWTH).float())
        self.scaler[STREAK].copy_(streak % GROWTH)
        return torch.where((self.overflow > 0) & (scale > 1), 0, norm)  # below 1 it is no fault of the scale

    def step(self, lr: float, skip: Tensor) -> None:
        """Move the parameters by their gradients, unless `skip` is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        skip = torch.maximum(skip, self.overflow)
        if isinstance(self.optimizer, torch.optim.AdamW):  # its fused kernel reads both, and divides on its way
            self.optimizer.grad_scale, self.optimizer.found_inf = self.divisor, skip  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skip:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.divisor)
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
