"""What goes into the log: means of losses, kept on the device until somebody looks, and the time."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from ldm.training.learner import summed


class Meter:
    """Means of scalars since the last line of the log, and of histograms, which come as sums and counts (2, bins)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}  # (2,) or (2, bins): sum and count

    def add(self, values: Mapping[str, Tensor], weight: float, skip: Tensor) -> None:
        """`skip` 1: these are forgotten."""
        for name, value in values.items():
            pair = value.float() if value.ndim else torch.stack([value.float(), torch.ones_like(value.float())])
            pair = torch.where(skip > 0, 0.0, pair * weight)
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self) -> dict[str, Any]:
        """The means over steps and processes, None or nothing where there is none; begins anew."""
        record: dict[str, Any] = {}
        for name, pair in self.sums.items():
            total, count = summed(pair).tolist()
            if isinstance(count, list):
                record[name] = [t / c if c else None for t, c in zip(total, count, strict=True)]
            elif count:
                record[name] = total / count
        self.sums = {}
        return record

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The sums of every process, which must all ask for them."""
        return {name: accelerator.gather(pair[None]).tolist() for name, pair in self.sums.items()}

    def restore(self, state: dict[str, Any], rank: int, count: int) -> None:
        """Those of this one of `count` processes; where there were more or fewer, the first takes what all had."""
        for name, rows in state.items():
            pairs = torch.tensor(rows, device=self.device)
            self.sums[name] = pairs[rank] if len(pairs) == count else pairs.sum(0) * (rank == 0)


def binned(values: Float[Tensor, " b"], places: Float[Tensor, " b"], bins: int = 8) -> Float[Tensor, "2 bins"]:
    """Sums and counts of values whose places in 0..1 fall into equal bins: a histogram for the log."""
    rows = (places * bins).long().clamp(0, bins - 1)
    return torch.zeros(2, bins, device=values.device).index_add(1, rows, torch.stack([values, torch.ones_like(values)]))


class Clock:
    """Seconds since the last line of the log: those in training, and those spent waiting for data or for a save."""

    def __init__(self) -> None:
        self.images, self._began, self._spent = 0, time.monotonic(), defaultdict[str, float](float)

    @contextmanager
    def on(self, what: Literal["data", "save", "pause"]) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """Images a second without pauses; the seconds waited for data, and those that saves held it up. Begins anew."""
        images, spent = self.images, self._spent
        seconds = time.monotonic() - self._began - spent["pause"]
        self.__init__()  # type: ignore[misc]
        speed = {"images_per_s": round(images / seconds, 2)}
        return speed | {"data_wait_s": round(spent["data"], 3), "save_stall_s": round(spent["save"], 4)}


def memory(device: torch.device) -> dict[str, float]:
    return {"gpu_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)} if device.type == "cuda" else {}
