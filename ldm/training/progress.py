"""Where a run stands, for a person: a bar on a terminal, a line every so often elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0  # between two lines where there is no terminal


class Bar:
    """`with Bar(steps) as bar: bar.step(); bar.show("loss 0.1")`, on stderr; in all processes but one not shown."""

    def __init__(self, steps: int, *, shown: bool = True) -> None:
        self.steps, self.done, self.shown = steps, 0, shown
        self._console = Console(stderr=True)
        self._live = shown and self._console.is_terminal
        self._start, self._began, self._last = 0, time.monotonic(), -QUIET_SECONDS
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._progress.add_task("", total=steps, facts="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, done: int) -> None:
        """The first step to come is number `done`."""
        self.step(done)
        self._start, self._began = done, time.monotonic()

    def step(self, count: int = 1) -> None:
        self.done += count
        self._progress.advance(self._task, count)

    def reach(self, done: int, facts: str) -> None:
        self.step(done - self.done)
        self.show(facts)

    def show(self, facts: str) -> None:
        """Say how it goes, such as "loss 0.12  300 images/s"."""
        self._progress.update(self._task, facts=facts)
        if not self._live and (time.monotonic() - self._last >= QUIET_SECONDS or self.done == self.steps):
            self._last = time.monotonic()
            left = (self._last - self._began) / max(self.done - self._start, 1) * (self.steps - self.done)
            self.say(f"step {self.done}/{self.steps}  {facts}  {left:.0f} s left")

    def say(self, line: str) -> None:
        if self._live:
            self._console.print(line, markup=False, highlight=False)
        elif self.shown:
            sys.stderr.write(line + "\n")


def facts(record: Mapping[str, Any]) -> str:
    """What a bar shows of a line of the log: "loss 0.12  300 images/s  31.2 GB"."""
    forms = (("loss", "loss {:.4g}"), ("images_per_s", "{:.4g} images/s"), ("gpu_gb", "{:.1f} GB"))
    return "  ".join(form.format(record[name]) for name, form in forms if name in record)
