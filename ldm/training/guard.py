"""The watch over inputs, losses and gradients that are not finite: a step that has one moves nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.dataset import Dataset
from ldm.errors import UserError
from ldm.training.learner import summed

KINDS = ("input", "loss", "gradient")


class Guard:
    """Decides on the device which steps are left out, and says so in `check`, since asking a GPU makes it wait."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit, self.skipped = limit, 0
        self._row = torch.zeros((), device=device)  # bad steps in a row, as the device knows them
        self._seen_row = 0  # and as of the last check
        self._inputs: list[Tensor] = []
        self._unread: list[tuple[int, Tensor]] = []

    def look(self, batch: dict[str, Any]) -> None:
        self._inputs += [v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point()]

    def see(self, step: int, losses: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        """1.0 if this step is to be left out, in all processes, else 0.0."""
        kinds = [[v.isfinite().all() for v in values] for values in (self._inputs, losses, norms)]
        self._inputs = []
        good = torch.ones((), dtype=torch.bool, device=self._row.device)
        bad = summed(torch.stack([~torch.stack([*kind, good]).all() for kind in kinds]).float())
        self._unread.append((step, bad))
        skip = (bad.sum() > 0) | (self._row >= self.limit)
        self._row = torch.where(skip, self._row + 1, 0)
        return skip.float()

    def check(self, dataset: Dataset, batch_size: int, say: Callable[[str], None], saved: Path) -> None:
        """Say which steps were left out since the last check, why, and the keys of their batches.

        UserError where they were too many in a row; `saved` is the folder of the checkpoints.
        """
        unread, self._unread = self._unread, []
        flags = torch.stack([bad for _, bad in unread]).tolist() if unread else []
        for (step, _), bad in zip(unread, flags, strict=True):
            self._seen_row = self._seen_row + 1 if any(bad) else 0
            if not self._seen_row:
                continue
            self.skipped += 1
            keys = dataset.__getitems__(range(step * batch_size, (step + 1) * batch_size))["key"]
            kinds = ", ".join(kind for kind, flag in zip(KINDS, bad, strict=True) if flag)
            fact = f"Not finite: {kinds}. Keys: {', '.join(keys)}"
            if self._seen_row >= self.limit:
                raise UserError(
                    f"{self.limit} steps in a row were left out, the last is step {step + 1}; saved is {saved}. "
                    f"Look at the samples, or take a lower --optim.lr or --run.precision fp32. {fact}"
                )
            say(f"step {step + 1} is left out, nothing moved. {fact}")

    def read(self) -> dict[str, int]:
        """How many were left out since the last line of the log, if any; begins anew."""
        skipped, self.skipped = self.skipped, 0
        return {"skipped": skipped} if skipped else {}

    def state(self) -> dict[str, int]:
        """As of the last check."""
        return {"in_a_row": self._seen_row, "skipped": self.skipped}

    def restore(self, state: dict[str, int]) -> None:
        self._seen_row, self.skipped = state["in_a_row"], state["skipped"]
        self._row.fill_(self._seen_row)
