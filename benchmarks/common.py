"""What benchmarks share: their flags, variants as processes that take turns, clocks, peak memory, and kept figures."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}  # of the children
LOAD = os.getloadavg()[0]  # before this program adds its own


def flags(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The flags that all have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timings of each; the median counts ({repeats})")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser


def add_variants(parser: argparse.ArgumentParser, variants: Sequence[str]) -> None:
    """The flags of those whose variants are processes."""
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants, help="which, the base first (all)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: what the threads worked")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)


def conditions(args: argparse.Namespace) -> str:
    """Under what the figures were taken, for the first line."""
    versions = f"torch {version('torch')}, diffusers {version('diffusers')}, load {LOAD:.1f}"
    return f"{args.threads} threads, {args.clock} time, {versions}" if "threads" in args else versions


def keep(args: argparse.Namespace, figures: Any) -> None:
    """Write the figures as JSON where that was asked for."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"arguments": sys.argv[1:], "conditions": conditions(args), "figures": figures}
        args.json.write_text(json.dumps(about, indent=1))


class Child:
    """This program once more, as one variant, which says what it has and then answers line by line."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, *sys.argv, "--child", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.has = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed")
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.communicate()


def answer(has: Any, to: Callable[[Any], Any]) -> None:
    """The child's side of it."""
    print(json.dumps(has), flush=True)
    for line in sys.stdin:
        print(json.dumps(to(json.loads(line))), flush=True)


def turns(variants: Sequence[str], rounds: int, apart: bool = False) -> Iterator[Child]:
    """Each variant's process, round by round; apart: it lives for one turn, so that only one holds its memory."""
    kept = {} if apart else {name: Child(name) for name in variants}
    for _ in range(rounds):
        for name in variants:
            child = kept.get(name) or Child(name)
            yield child
            if apart:
                child.close()
    for child in kept.values():
        child.close()


def seconds(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that was asked for; what threads work is shared out among them."""
    return (lambda: time.process_time() / args.threads) if args.clock == "cpu" else time.perf_counter


def timed(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def peak(run: Callable[[], Any]) -> float:
    """Most MiB that the process holds while something runs: what was freed before goes back, the mark is set anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**10


def flops(run: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def convolution(dtype: Any) -> Callable[[], Any]:
    """The best kernel there is, whose speed is taken as the ceiling: 3 x 3, channels-last."""
    import torch

    weight, x = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((256, 256, 3, 3), (1, 256, 64, 64))
    )
    return lambda: torch.conv2d(x, weight, padding=1)
