"""Batches from a dataset, by processes that read ahead: the same ones on any number of ranks and workers."""

import itertools
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.errors import UserError

_JUDGED = 10_000  # samples of which the share of damaged ones is taken before so many are read


class Batch(TypedDict, total=False):
    """What a dataset yields.

    `image`, or `mean` and `std` of its latent; `tokens` where a tokenizer was given, `states` and `vector` where text
    states are kept. size_ids: SDXL's original height and width, crop top and left, target height and width. problems:
    damaged samples for which others stand; a loader counts them: `damaged`, since it began.
    """

    image: UInt8[Tensor, "b 3 h w"]
    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]
    tokens: Int[Tensor, "b l"]
    states: Float[Tensor, "b l d"]
    vector: Float[Tensor, "b v"]
    size_ids: Int[Tensor, "b 6"]
    caption: list[str]
    key: list[str]
    position: Int[Tensor, " b"]
    problems: list[str]
    damaged: int


@runtime_checkable
class Dataset(Protocol):
    """Samples at positions of a stream; `len` is one epoch. `limits`, where it has them, are what a loader keeps to."""

    def __len__(self) -> int: ...
    def __getitems__(self, positions: Sequence[int]) -> Batch: ...


@dataclass(frozen=True)
class Limits:
    """patience: seconds to wait for a batch; damaged: the most, as a share; end: of the stream, None for none; batch:
    that many positions in a row have one size of picture, 0 where all have."""

    patience: float = 300.0
    damaged: float = 0.0
    end: int | None = None
    batch: int = 0


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of `batch_size` over all ranks, from position `start` (the samples consumed so far) to before `stop`.

    A rank gets its own `batch_size / world` positions of each batch; the last may be short, and is left out on a rank
    that would get none of it. Without a stop the end is the dataset's. ValueError for a batch that ranks cannot share
    evenly; UserError for a stop behind the end, batches of several sizes, too much damage and data that does not come.
    """
    limits: Limits = getattr(dataset, "limits", Limits())
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world} processes")
    if limits.batch % batch_size:
        raise UserError(f"batches of {batch_size} would mix sizes of pictures, which come {limits.batch} at a time")
    if limits.end is not None and (stop or 0) > limits.end:
        raise UserError(
            f"{stop} samples are asked for, data.epochs gives {limits.end}: take fewer steps or more epochs"
        )
    end, share = limits.end if stop is None else stop, batch_size // world

    def positions() -> Iterator[list[int]]:
        for first in itertools.count(start, batch_size) if end is None else range(start, end, batch_size):
            last = first + (rank + 1) * share
            if mine := list(range(last - share, last if end is None else min(last, end))):
                yield mine

    return _batches(dataset, positions, limits, workers)


def _batches(
    dataset: Dataset, positions: Callable[[], Iterator[list[int]]], limits: Limits, workers: int
) -> Iterator[Batch]:
    batches: DataLoader[Any] = DataLoader(
        _Quiet(dataset),  # type: ignore[arg-type]
        batch_sampler=positions(),
        collate_fn=_same,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        timeout=limits.patience if workers else 0,
        worker_init_fn=_outlive,
    )
    damaged = read = 0
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until each worker can outlive it
    try:
        coming = iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
    for wanted in positions():
        try:
            batch = next(coming)
        except RuntimeError as error:
            raise _explained(error, dataset, wanted, limits, workers) from error
        if isinstance(batch, UserError):
            raise batch
        problems = batch.pop("problems", [])
        read += len(wanted)
        for problem in problems:
            damaged += 1
            if damaged > limits.damaged * max(read, min(len(dataset), _JUDGED)):
                share = f"{damaged} of {read} samples read were damaged, more than data.max_damaged {limits.damaged:g}"
                raise UserError(f"{problem}; {share}")
            if damaged.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...
                warnings.warn(f"{problem}; another sample stands in for it, as for {damaged} so far", stacklevel=2)
        if damaged:
            batch["damaged"] = damaged
        yield batch


def _outlive(worker: int) -> None:
    """A SIGTERM to all processes, as clusters send it, is for the one that trains: its step still needs data."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _explained(error: RuntimeError, dataset: Dataset, wanted: list[int], limits: Limits, workers: int) -> Exception:
    """What torch says of workers that hang or die, for a person; any other error as it is."""
    where = f"the samples at positions {wanted[0]} to {wanted[-1]}"
    shards: list[str] = getattr(dataset, "where", lambda _: [])(wanted)
    if shards:
        where += f" ({', '.join(shards[:3])}{', ...' if len(shards) > 3 else ''})"
    text = str(error)
    if "timed out after" in text:
        return UserError(
            f"waited {limits.patience:g} s for {where}, which none of {workers} data processes sent: look at the disk "
            "or the network, or raise data.patience"
        )
    if "DataLoader worker" in text:
        why = text.rpartition("DataLoader worker")[2].strip().splitlines()[0]
        return UserError(f"a data process {why} while it read on to {where}: was it killed for want of memory?")
    return error


@dataclass(frozen=True)
class _Quiet:
    """Hands a UserError back as the batch: a worker process would bury its one line in a traceback."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Sequence[int]) -> Batch | UserError:
        try:
            return self.dataset.__getitems__(positions)
        except UserError as error:
            return error


def _same(batch: Any) -> Any:
    return batch
