"""The training loop, read from top to bottom: one step is one optimiser update, on any number of processes.

Nothing random lives here: all that is drawn follows from the seed and a sample's position in the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm import config as configs
from ldm.data.dataset import Dataset, loader
from ldm.errors import UserError
from ldm.shapes import Image
from ldm.training import checkpoint
from ldm.training.checkpoint import Writer
from ldm.training.config import LdmRun, VaeRun
from ldm.training.ema import Ema
from ldm.training.folder import RunFolder, check_same
from ldm.training.guard import Guard
from ldm.training.learner import Learner, Losses, Objective
from ldm.training.meter import Clock, Meter, memory
from ldm.training.optim import rate
from ldm.training.processes import Processes
from ldm.training.progress import Bar, facts
from ldm.training.sharding import copied, holding
from ldm.training.signals import interrupts


@runtime_checkable
class Task(Protocol):
    """What is trained. `validate`, `sample` and `export` are called while the averaged networks hold their average."""

    dataset: Dataset
    networks: Mapping[str, nn.Module]  # trained, and saved in a checkpoint
    averaged: Sequence[str]  # those of them that the average follows

    def to(self, device: torch.device) -> None: ...
    def objectives(self) -> list[Objective]: ...
    def validate(self) -> dict[str, float]: ...
    def remarks(self, record: Mapping[str, Any]) -> list[str]: ...  # on a line of the log, for the person
    def sample(self) -> tuple[Image, int]: ...  # pictures, and how many stand in a row
    def export(self, path: Path, provenance: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    step: int
    signal: int = 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0


def train(task: Task, config: VaeRun | LdmRun, path: Path) -> Outcome:
    """Train to the last step, from the newest checkpoint in `path` if there is one.

    UserError where the folder is another run's, the disk full, too many steps not finite, or a process gone.
    """
    run, optim = config.run, config.optim
    folder = RunFolder(path)
    processes = Processes(run, optim, path)
    accelerator, device, main = processes.accelerator, processes.device, processes.main
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True

    with processes.together(), Bar(run.steps, shown=main) as bar, interrupts() as interrupted, Writer() as writer:
        with processes.main_first():
            claim = folder.claim() if main else folder.claimed()
        if len(set(processes.extremes(claim))) > 1:
            raise UserError(f"the machines see different folders {str(path)!r}: --run is to be on a disk all share")
        with processes.main_first():  # what it may prepare on disk is then there for the others
            task.to(device)
        for network in task.networks.values():
            layout = torch.channels_last if run.channels_last else torch.preserve_format
            network.to(memory_format=layout)  # type: ignore[call-overload]
        split = run.shard and processes.count > 1
        learners = [
            Learner(objective, optim, accelerator, main=not i, split=split and not i)
            for i, objective in enumerate(task.objectives())
        ]
        by_name = {learner.objective.name: learner for learner in learners}
        averaged = nn.ModuleDict({name: task.networks[name] for name in task.averaged})
        ema = Ema({name: p for name, p in averaged.named_parameters() if p.requires_grad}, run.ema)
        meter, guard, clock = Meter(device), Guard(device, run.max_skipped), Clock()

        def resume() -> int:
            with processes.main_first():  # damaged ones are put aside once
                found = checkpoint.newest(folder.checkpoints, bar.say)
            step = found[1][1]["step"] if found else 0
            if processes.extremes(step) != (step, step):
                raise UserError(f"the processes see other checkpoints in {str(path)!r}: all machines need one folder")
            if found:
                saved_in, (tensors, state) = found
                check_same(config, state["config"], path)
                checkpoint.restore(tensors, task.networks, ema, by_name)
                if "guard" in state:  # older ones keep their means in another form: these begin anew
                    meter.restore(state["meter"], processes.rank, processes.count)
                    guard.restore(state["guard"])
                bar.say(f"going on from {saved_in}")
            return int(step)

        def due(every: int) -> bool:
            return done == run.steps or (every > 0 and done % every == 0)

        def check() -> None:
            writer.check()
            guard.check(task.dataset, run.batch_size, bar.say, folder.checkpoints)

        def save() -> None:
            """Copy the state; the writing goes on beside the training."""
            check()
            state = {"step": done, "config": configs.to_dict(config)}
            state |= {"meter": meter.state(accelerator), "guard": guard.state()}
            with clock.on("save"):
                writer.wait()
                processes.wait()  # for the main one's disk, however slow it is
                if not main and not split:
                    return
                saved = copied(checkpoint.snapshot(task.networks, ema, by_name), keep=main), state
            if main:
                writer.start(partial(folder.write_checkpoint, done, saved, run.keep, run.keep_every))

        def evaluate(*, lost: bool = False) -> dict[str, float]:
            """With the averaged weights, not compiled once more for other shapes. lost: only write the model again."""
            report: dict[str, float] = {}
            averages = holding(averaged, dict(zip(ema.names, ema.shadows[0], strict=True)))
            with torch.no_grad(), averages, accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                if main and not lost and due(run.validate_every):
                    report = task.validate()
                if main and not lost and due(run.sample_every):
                    folder.write_sample(done, *task.sample())
                if main and (lost or due(run.export_every)):
                    provenance = {"config": configs.to_dict(config), "steps": done, "images": done * run.batch_size}
                    task.export(folder.model, provenance)
            processes.wait()
            return report

        done = resume()
        if main:
            folder.write_config(config)
            folder.start_log(done)
        accelerator.init_trackers("tensorboard")
        size = run.batch_size
        batches = loader(
            task.dataset, size // optim.accumulate, start=done * size, stop=run.steps * size,
            rank=processes.rank, world=processes.count, workers=config.data.workers,
        )  # fmt: skip
        if done >= run.steps and processes.extremes(folder.exported() != done)[1]:
            evaluate(lost=True)
        if about := getattr(task.dataset, "about", None):
            bar.say(about())
        number = 0
        bar.begin(done)
        while done < run.steps:
            active = [learner for learner in learners if done >= learner.objective.start]
            losses: list[Losses] = []
            for part in range(1, optim.accumulate + 1):
                with clock.on("data"):
                    read = next(batches)
                batch = {"step": done} | {name: _moved(value, device) for name, value in read.items()}
                guard.look(batch)
                last = part == optim.accumulate
                losses += [learner.backward(batch, optim.accumulate, last=last) for learner in active]
            norms = [learner.clip() for learner in active]
            skip = guard.see(done, [learner.loss for learner in active], norms)
            lr = rate(optim, done, run.steps)
            for learner in active:
                learner.step(lr, skip)
            ema.update(done, 1 - torch.maximum(skip, learners[0].overflow))
            for values in losses:
                meter.add(values, 1 / optim.accumulate, skip)
            meter.add(
                {f"{learner.prefix}grad_norm": norm for learner, norm in zip(active, norms, strict=True)}, 1, skip
            )
            clock.images += run.batch_size
            done += 1
            bar.step()
            if (main or split) and run.ema.widths and due(run.ema.snapshot_every):
                ema.write(path / "ema", done, keep=main)

            if device.type == "cpu" or due(run.log_every):
                check()
            record: dict[str, Any] = {}
            if due(run.log_every):
                record = meter.read() | guard.read() | {"lr": lr} | clock.read() | memory(device)
                record |= {"damaged": read["damaged"]} if "damaged" in read else {}
                bar.show(facts(record))
                for remark in task.remarks(record):
                    bar.say(remark)
            with clock.on("pause"):
                if due(run.validate_every) or due(run.sample_every) or due(run.export_every):
                    record |= evaluate()
                if main and record:
                    folder.write_log({"step": done, "images": done * run.batch_size} | record)
                    accelerator.log({n: v for n, v in record.items() if isinstance(v, int | float)}, step=done)
                if due(run.checkpoint_every):
                    save()
            number = processes.extremes(interrupted() if done < run.steps else 0)[1]  # all stop, or none
            if number:
                save()
                break
        writer.wait()
        processes.wait()  # launchers end all when the first has ended
        if number:
            bar.say(f"stopped at step {done}, which is saved: the same command goes on from there")
        else:
            bar.say(f"{done} steps are done, the model is {folder.model}; raise run.steps to train it further")
    accelerator.end_training()
    return Outcome(done, number)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
