"""Ctrl-C and SIGTERM as a wish: the step in hand is finished and saved, then the run ends."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts() -> Iterator[Callable[[], int]]:
    """Within it, a function that gives the number of the signal that came, or 0. A second Ctrl-C interrupts at once."""
    came, owner = 0, os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if os.getpid() != owner:  # a process that reads data: it ends with this one
            return
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = number
        sys.stderr.write("\nfinishing this step, then saving (Ctrl-C again: at once, without saving)\n")

    if threading.current_thread() is not threading.main_thread():  # only there may Python set handlers
        yield lambda: 0
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
