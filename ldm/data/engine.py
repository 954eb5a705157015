"""Who does the parts of a preparation: this process, processes beside it, or a Ray cluster.

The work is a callable that can be pickled, `work(part, tick)`; `tick()` is called for each sample. What a part yields
depends on nothing but the part, so that any engine, with any number of processes, makes the same bytes.
"""

import errno
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from ldm.errors import UserError

Part = TypeVar("Part")
Result = TypeVar("Result")
Tick = Callable[[], None]
Work = Callable[[Part, Tick], Result]
Show = Callable[[int], None]
_TRIES = 4  # of a part whose Ray worker is lost


def run(
    engine: Literal["local", "ray"], work: Work[Part, Result], parts: Sequence[Part], workers: int, show: Show
) -> Iterator[tuple[Part, Result]]:
    """(part, what the work made of it), as they are done. `show` is given the number of ticks so far, now and then.

    `workers` is the most parts at a time, 0 for this process (local) or as many as the cluster has cores (ray).
    UserError, in one line, where a part fails for good.
    """
    if engine == "ray":
        return _on_ray(work, parts, workers, show)
    return _in_processes(work, parts, workers, show) if workers > 1 else _here(work, parts, show)


@contextmanager
def writing_to(out: Any) -> Iterator[None]:
    """An OSError of the block as a UserError: a full disk is a person's to mend, and no reason for a traceback."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room and run again: what is done is kept" if full else "check the folder"
        raise UserError(f"cannot write to {str(out)!r} ({error.strerror or error}): {remedy}") from None


def _here(work: Work[Part, Result], parts: Sequence[Part], show: Show) -> Iterator[tuple[Part, Result]]:
    done = itertools.count(1)
    for part in parts:
        yield part, work(part, lambda: show(next(done)))


def _in_processes(
    work: Work[Part, Result], parts: Sequence[Part], workers: int, show: Show
) -> Iterator[tuple[Part, Result]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    counter = context.Value("q")
    with ProcessPoolExecutor(workers, context, _begin, (work, counter)) as pool:
        futures = {pool.submit(_work, part): part for part in parts}
        waiting = set(futures)
        try:
            while waiting:
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                show(counter.value)
                yield from ((futures[future], future.result()) for future in ready)
        except BrokenProcessPool:
            raise UserError("a working process died (out of memory?): run again with fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the parts under way are still finished


_process: tuple[Work[Any, Any], Any]


def _begin(work: Work[Any, Any], counter: Any) -> None:
    global _process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process = (work, counter)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody: without this its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(part: Any) -> Any:
    work, counter = _process

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    return work(part, tick)


def _on_ray(work: Work[Part, Result], parts: Sequence[Part], workers: int, show: Show) -> Iterator[tuple[Part, Result]]:
    """Tasks of one core each; Ray starts those of a lost worker or node again."""
    try:
        import ray
    except ImportError:
        raise UserError("engine ray needs Ray: pip install -r requirements-ray.txt") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the cluster that RAY_ADDRESS names, else one on this machine
    shared = ray.put(work)
    task = ray.remote(max_retries=_TRIES - 1, num_cpus=1)(_on_a_node)
    waiting: dict[Any, Part] = {}
    rest, done = iter(parts), 0
    try:
        while True:
            for part in itertools.islice(rest, max(0, workers - len(waiting)) if workers else None):
                waiting[task.remote(shared, part)] = part
            if not waiting:
                return
            for ref in ray.wait(list(waiting), num_returns=1, timeout=0.5)[0]:
                outcome, ticks = ray.get(ref)
                if isinstance(outcome, Exception):
                    raise outcome
                done += ticks
                show(done)
                yield waiting.pop(ref), outcome
    except ray.exceptions.RayError as error:
        raise UserError(f"a part was lost on Ray {_TRIES} times: {str(error).splitlines()[0]}") from None
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)


def _on_a_node(work: Work[Any, Any], part: Any) -> tuple[Any, int]:
    """What the work made and the ticks it took. Errors for a person are handed over: Ray would bury them in its own."""
    counted: list[None] = []
    try:
        return work(part, lambda: counted.append(None)), len(counted)
    except (UserError, OSError) as error:
        return error, 0
