"""What goes into the log: means of losses, kept on the device until somebody looks, and the time."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Means of scalars since the last line of the log."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + value.float() * weight
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and processes; begins anew."""
        values = torch.stack([value / self.counts[name] for name, value in self.sums.items()])
        means = dict(zip(self.sums, accelerator.reduce(values, "mean").tolist(), strict=True))
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": {name: value.item() for name, value in self.sums.items()}, "counts": self.counts}

    def restore(self, state: dict[str, Any]) -> None:
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])


class Clock:
    """Seconds since the last line of the log, without pauses, and those of them that were spent waiting for data."""

    def __init__(self) -> None:
        self.images = 0
        self._began = time.monotonic()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """Images a second, and the wait for data in seconds; begins anew."""
        seconds = time.monotonic() - self._began
        record = {"images_per_s": round(self.images / seconds, 2), "data_wait_s": round(self._waited, 3)}
        self.__init__()  # type: ignore[misc]
        return record
