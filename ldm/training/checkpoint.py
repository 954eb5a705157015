"""Checkpoints that are whole or absent: a folder `checkpoints/00001000` made complete by one rename.

It holds state.safetensors, state.json, and manifest.json with the sha256 of both, all on the disk before it has its
name. Nothing is pickled. A damaged one is put aside, loudly, and the one before it serves.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.files import Beside, flush, sha256
from ldm.training.ema import Ema
from ldm.training.learner import Learner
from ldm.training.sharding import split_as

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
Saved = tuple[dict[str, Tensor], dict[str, Any]]
Networks = Mapping[str, nn.Module]


class Writer:
    """Does one piece of work at a time beside a `with` block; what goes wrong in it is raised by the next calls.

    After Ctrl-C it is left as it is: half a checkpoint is none.
    """

    def __init__(self) -> None:
        self._work: Beside[Any] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._work:
            self._work.join()

    def start(self, work: Callable[[], Any]) -> None:
        """Wait for the work before, then begin this one."""
        self.wait()
        self._work = Beside(work)

    def wait(self) -> None:
        """Until nothing is left to do."""
        if self._work:
            self._work.result()

    def check(self) -> None:
        if self._work and not self._work.is_alive():
            self.wait()


def write(folder: Path, step: int, saved: Saved, keep: int, keep_every: int = 0) -> Path:
    """Write the checkpoint of a step; only when it stands do others go: not the last `keep`, nor every n-th step's.

    UserError where the disk is full or the folder cannot be written: older checkpoints are then all there.
    """
    target, partial = folder / f"{step:08d}", folder / f".{step:08d}.partial"
    if target.exists():  # the state of a step is what it is
        return target
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors, state = saved
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state, indent=1))
        digests = {name: sha256(partial / name) for name in (TENSORS, STATE)}
        (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
        for path in (*partial.iterdir(), partial):
            flush(path)
        partial.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {str(target)!r}: {error}") from None
    for old in complete(folder)[: -max(keep, 1)]:
        if not keep_every or int(old.name) % keep_every:
            shutil.rmtree(old.rename(folder / f".{old.name}.partial"))
    return target


def complete(folder: Path) -> list[Path]:
    """The checkpoints that have their name, oldest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, Saved] | None:
    """The newest checkpoint whose files are what its manifest says; None where there is none.

    Damaged ones are renamed to `damaged-*` and `warn` is told. UserError where all that were ever there are damaged.
    """
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial)
    for path in complete(folder)[::-1]:
        try:
            digests = json.loads((path / MANIFEST).read_text())
            wrong = [name for name in (TENSORS, STATE) if sha256(path / name) != digests[name]]
            fault = f"{wrong[0]} is not what was written" if wrong else ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
        if not fault:
            return path, (load_file(path / TENSORS), json.loads((path / STATE).read_text()))
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warn(f"checkpoint {str(path)!r} is damaged ({fault}): it is now {aside.name!r}, the one before it is taken")
    if any(folder.glob("damaged-*")):
        raise UserError(f"every checkpoint in {str(folder)!r} is damaged: start again in another --run folder")
    return None


def snapshot(networks: Networks, ema: Ema, learners: Mapping[str, Learner]) -> dict[str, Tensor]:
    """Name -> tensor; the tensors are the live ones, not copies."""
    tensors = {f"networks.{name}.{key}": v for name, net in networks.items() for key, v in net.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.tensors().items()}
    return tensors | {f"learners.{n}.{key}": value for n, one in learners.items() for key, value in one.state().items()}


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], networks: Networks, ema: Ema, learners: Mapping[str, Learner]) -> None:
    """Undo `snapshot`: fill the live tensors, strictly. UserError naming what is missing or left over."""
    for name, learner in learners.items():
        prefix = f"learners.{name}."
        learner.fill({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
    live = snapshot(networks, ema, learners)
    if differing := ", ".join(sorted(live.keys() ^ tensors.keys())[:4]):
        raise UserError(
            f"the checkpoint does not fit the networks of this program: {differing}. Take another --run folder"
        )
    for name, value in tensors.items():
        live[name].copy_(split_as(live[name], value))
