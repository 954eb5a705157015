"""Several processes as one run: how they begin, wait for each other, agree, and notice that one of them is gone."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from ldm.errors import UserError
from ldm.training.config import OptimConfig, RunConfig

_PATIENCE = timedelta(days=7)  # for what one process does while the others wait: encoding pictures, validating
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
_LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "socket")  # in the words of those that were left
_CLOSED = ("closed", "reset by peer", "broken pipe")  # in those of one whose other ended while they met


@functools.cache
def meet(seconds: int) -> dist.ProcessGroup | None:
    """Join the others, so that the end of this process is noticed in seconds; a group on the CPU, None if it is alone.

    seconds: that processes wait for each other. UserError where they do not all come.
    """
    patience, cpu = timedelta(seconds=seconds), parse_flag_from_env("ACCELERATE_USE_CPU")
    if launched() > 1 and not cpu and not torch.accelerator.is_available():  # accelerate would let each train alone
        raise UserError(f"{launched()} processes and no GPU: ACCELERATE_USE_CPU=true trains on the CPU")
    try:
        PartialState(cpu, timeout=patience)
        return dist.new_group(backend="gloo", timeout=patience) if launched() > 1 else None
    except RuntimeError as error:
        if any(word in str(error).lower() for word in _CLOSED):
            raise _alone(get_int_from_env(["RANK"], 0), error) from None
        raise UserError(
            f"the {launched()} processes did not find each other within {seconds} s ({_first_line(error)}): see that "
            "every machine was started and reaches the main one, and that each is reached by the name it calls itself, "
            "or put the network's device into GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from None


class Processes:
    """The processes of a run, this one among them. UserError for what `faults` finds."""

    def __init__(self, run: RunConfig, optim: OptimConfig, path: Path) -> None:
        for name in _SHARDED:
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
                raise UserError(
                    f"the launcher asks for {name}: take configs/accelerate/eight_gpus.yaml, and run.shard true to "
                    "split weights among the processes (FSDP)"
                )
        for fault in faults(run, optim, launched()):
            raise UserError(fault)
        self._group = meet(run.timeout)
        self.accelerator = Accelerator(
            mixed_precision=precision(run), log_with=list(run.trackers) or None, project_dir=path
        )
        set_exactness(run)
        self.count, self.main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.rank, self.device = self.accelerator.process_index, self.accelerator.device

    def wait(self) -> None:
        """Until all are here: the main one last, however long that takes it."""
        if self._group is not None:
            options = dist.BarrierOptions()
            if not self.main:
                options.timeout = _PATIENCE
            self._group.barrier(options).wait()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Within it the others find done what the main process prepares on the disk."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def extremes(self, number: int) -> tuple[int, int]:
        """The smallest and the largest that any process has."""
        if self._group is None:
            return number, number
        numbers = [torch.zeros((), dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(numbers, torch.tensor(int(number)), group=self._group)
        return int(min(numbers)), int(max(numbers))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turns the error of those that lost one of them into a line."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(word in _first_line(error).lower() for word in _LOST):
                raise
            raise _alone(self.rank, error) from None


def _alone(rank: int, error: Exception) -> UserError:
    return UserError(
        f"process {rank} of {launched()} stops, since another one is gone or hangs (its own message says why): "
        f"{_first_line(error)}. The same command goes on from the last checkpoint"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def launched() -> int:
    """How many processes a launcher started."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)


def faults(run: RunConfig, optim: OptimConfig, count: int) -> Iterator[str]:
    """What keeps that many processes from a run, a line each."""
    if run.batch_size % (parts := count * optim.accumulate):
        shares = f"{count} processes x optim.accumulate {optim.accumulate}"
        yield f"run.batch_size {run.batch_size} cannot be shared evenly by {shares}: take a multiple of {parts}"
    for name in run.trackers:
        if importlib.util.find_spec(name) is None:  # accelerate would leave it out without a word
            yield f"run.trackers has {name!r}, which is not installed: pip install {name}, or leave it out"
    if run.precision == "fp16" and not torch.cuda.is_available():
        yield "run.precision fp16 needs a GPU: take bf16, which CPUs compute in too"
    if run.shard and (optim.kind != "adamw" or run.channels_last):
        yield "run.shard splits what adamw remembers of contiguous weights: take optim.kind adamw, channels_last false"


def set_exactness(run: RunConfig) -> None:
    """Let a GPU multiply fp32 matrices in tf32, a thousandth less exact and several times as fast, but for `fp32`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.precision != "fp32"


def precision(run: RunConfig) -> str:
    """accelerate's name for it: auto is bf16 on a GPU that has it, else fp32."""
    if run.precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return {"bf16": "bf16", "fp16": "fp16"}.get(run.precision, "no")
