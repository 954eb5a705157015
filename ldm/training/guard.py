"""The watch over losses and gradients that are not finite."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data.dataset import Dataset
from ldm.errors import UserError


class Guard:
    """Remembers, on the device, the first step whose loss or gradient was not finite; nothing may move from then on.

    The device is asked only in `check`, since asking a GPU makes it wait: a bad step may be reported some steps later,
    but the weights are those before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad_step = torch.full((), -1, device=device)

    def see(self, step: int, values: list[Tensor], accelerator: Accelerator) -> Tensor:
        """1.0 if this or an earlier step was bad in any process, else 0.0."""
        bad = ~torch.stack(values).isfinite().all()
        if accelerator.num_processes > 1:
            bad = accelerator.reduce(bad.float(), "sum") > 0
        self.bad_step = torch.where(bad & (self.bad_step < 0), step, self.bad_step)
        return (self.bad_step >= 0).float()

    def check(self, dataset: Dataset, batch_size: int, good: Path | None) -> None:
        """UserError with the step, the keys of its batch and the last good checkpoint, if a step was bad."""
        step = int(self.bad_step)
        if step < 0:
            return
        keys = dataset.__getitems__(range(step * batch_size, (step + 1) * batch_size))["key"]
        raise UserError(
            f"the loss or a gradient of step {step + 1} is not finite; the last good checkpoint is {good or 'none'}. "
            f"Look at its samples or take a lower --optim.lr or --run.precision fp32. Its keys: {', '.join(keys)}"
        )
