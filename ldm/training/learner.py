"""An objective with its optimiser: the part of the loop that moves parameters."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.training.config import OptimConfig
from ldm.training.optim import adamw, clipped

Batch = dict[str, Any]  # of ldm.data.dataset, on the device; and `step`
Losses = dict[str, Tensor]  # "loss", which is minimised, and other scalars for the log


class Objective(NamedTuple):
    """What one optimiser minimises: the networks it moves, their loss, and the first step at which it acts.

    The objectives of a task see each batch in turn, before any of them moves.
    """

    name: str
    networks: tuple[nn.Module, ...]
    loss: Callable[[Batch], Losses]
    start: int = 0


class Loss(nn.Module):
    """An objective as a module, which accelerate wraps: for mixed precision, for gradients averaged over processes."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.networks = nn.ModuleList(objective.networks)
        self.function = objective.loss

    def forward(self, batch: Batch) -> Losses:
        return self.function(batch)


class Learner:
    """An objective with its optimiser. main: its values stand in the log under plain names."""

    def __init__(self, objective: Objective, config: OptimConfig, accelerator: Accelerator, *, main: bool) -> None:
        self.objective, self.config, self.accelerator, self.main = objective, config, accelerator, main
        self.module = accelerator.prepare_model(Loss(objective))
        self.parameters = [p for network in objective.networks for p in network.parameters() if p.requires_grad]
        self.optimizer = adamw(self.parameters, config)
        self.loss = torch.zeros((), device=accelerator.device)

    def backward(self, batch: Batch, parts: int, *, last: bool) -> Losses:
        """Add the gradients of one part of a batch; processes average them once, after the last part."""
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            losses = self.module(batch)
            self.accelerator.backward(losses["loss"] / parts)
        self.loss = self.loss + losses["loss"].detach()
        return {self.tag(name): value.detach() for name, value in losses.items()}

    def tag(self, name: str) -> str:
        return name if self.main else f"{self.objective.name}_{name}"

    def clip(self) -> Tensor:
        return clipped(self.parameters, self.config.clip)

    def step(self, lr: float, skip: Tensor) -> None:
        """Move the parameters, unless `skip` is 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # read by the fused kernel: 1 leaves all as it is
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros_like(self.loss)


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, which must all ask for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value
