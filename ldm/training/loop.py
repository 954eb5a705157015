"""The training loop, read from top to bottom: one step is one optimiser update, on any number of processes.

Nothing random lives here. Data, noise and every other choice of a sample follow from the seed and its position in the
stream, so what a checkpoint needs besides tensors is one number, the step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm import config as configs
from ldm.data.dataset import Dataset, loader
from ldm.errors import UserError
from ldm.shapes import Image
from ldm.training import checkpoint
from ldm.training.config import LdmRun, OptimConfig, RunConfig, VaeRun
from ldm.training.ema import Ema
from ldm.training.folder import RunFolder, check_same
from ldm.training.guard import Guard
from ldm.training.learner import Learner, Objective
from ldm.training.meter import Clock, Meter
from ldm.training.optim import rate
from ldm.training.progress import Bar
from ldm.training.signals import interrupts
from ldm.training.state import restore, snapshot


@runtime_checkable
class Task(Protocol):
    """What is trained. `validate`, `sample` and `export` are called while the averaged networks hold their average."""

    dataset: Dataset
    networks: Mapping[str, nn.Module]  # trained, and saved in a checkpoint
    averaged: Sequence[str]  # those of them that the average follows

    def to(self, device: torch.device) -> None: ...
    def objectives(self) -> list[Objective]: ...
    def validate(self) -> dict[str, float]: ...
    def sample(self) -> tuple[Image, int]: ...  # pictures, and how many stand in a row
    def export(self, path: Path, provenance: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """Where a run ended: at its last step, or after a signal."""

    step: int
    signal: int = 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0


def train(task: Task, config: VaeRun | LdmRun, path: Path) -> Outcome:
    """Train to the last step, from the newest checkpoint in `path` if there is one.

    UserError where the folder belongs to another run, the disk is full, or a loss is not finite.
    """
    run, optim = config.run, config.optim
    folder = RunFolder(path)
    accelerator = Accelerator(mixed_precision=precision(run), log_with=list(run.trackers) or None, project_dir=path)
    device, main = accelerator.device, accelerator.is_main_process
    _check_shares(run, optim, accelerator.num_processes)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True

    layout = torch.channels_last if run.channels_last else torch.preserve_format
    with accelerator.main_process_first():  # what it may prepare on disk is then there for the others
        task.to(device)
    for network in task.networks.values():
        network.to(memory_format=layout)  # type: ignore[call-overload]
    learners = [Learner(objective, optim, accelerator, main=i == 0) for i, objective in enumerate(task.objectives())]
    optimizers = {learner.objective.name: learner.optimizer for learner in learners}
    ema = Ema([p for name in task.averaged for p in task.networks[name].parameters() if p.requires_grad], run.ema)
    meter, guard = Meter(device), Guard(device)

    def resume(say: Callable[[str], None]) -> int:
        with accelerator.main_process_first():  # damaged ones are put aside once
            found = checkpoint.newest(folder.checkpoints, say)
        if found is None:
            return 0
        saved_in, (tensors, state) = found
        check_same(config, state["config"], path)
        restore(tensors, task.networks, ema, optimizers)
        meter.restore(state["meter"])
        say(f"going on from {saved_in}")
        return int(state["step"])

    @contextmanager
    def evaluating() -> Iterator[None]:
        """With the averaged weights, and not compiled once more for other shapes and without gradients."""
        with ema.applied(), torch.no_grad(), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield

    with Bar(run.steps, shown=main) as bar, interrupts() as interrupted:
        done = resume(bar.say)
        if main:
            folder.write_config(config)
            folder.start_log(done)
        accelerator.init_trackers("tensorboard")

        def due(every: int) -> bool:
            return done == run.steps or (every > 0 and done % every == 0)

        def check() -> None:
            guard.check(task.dataset, run.batch_size, next(iter(checkpoint.complete(folder.checkpoints)[::-1]), None))

        def save() -> None:
            check()
            if main:
                state = {"step": done, "config": configs.to_dict(config), "meter": meter.state()}
                checkpoint.write(folder.checkpoints, done, (snapshot(task.networks, ema, optimizers), state), run.keep)
            accelerator.wait_for_everyone()

        def export() -> None:
            if main:
                provenance = {"config": configs.to_dict(config), "steps": done, "images": done * run.batch_size}
                with evaluating():
                    task.export(folder.model, provenance)
            accelerator.wait_for_everyone()

        batches = loader(
            task.dataset,
            run.batch_size // optim.accumulate,
            start=done * run.batch_size,
            stop=run.steps * run.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=config.data.workers,
        )
        clock = Clock()
        bar.begin(done)
        while done < run.steps:
            active = [learner for learner in learners if done >= learner.objective.start]
            for part in range(1, optim.accumulate + 1):
                with clock.waiting():
                    read = next(batches)
                batch = {"step": done} | {name: _moved(value, device) for name, value in read.items()}
                for learner in active:
                    losses = learner.backward(batch, optim.accumulate, last=part == optim.accumulate)
                    meter.add(losses, 1 / optim.accumulate)
            norms = [learner.clip() for learner in active]
            stopped = guard.see(done, [*norms, *(learner.loss for learner in active)], accelerator)
            lr = rate(optim, done, run.steps)
            for learner in active:
                learner.step(lr, stopped)
            ema.update(done, 1 - stopped)
            meter.add({learner.tag("grad_norm"): norm for learner, norm in zip(active, norms, strict=True)})
            clock.images += run.batch_size
            done += 1
            bar.step()

            if device.type == "cpu" or due(run.log_every):
                check()
            record: dict[str, Any] = {}
            if due(run.log_every):
                record = meter.read(accelerator) | {"lr": lr} | clock.read()
                bar.show(f"loss {record['loss']:.4g}  {record['images_per_s']:.4g} images/s")
            with clock.paused():
                if main and (due(run.validate_every) or due(run.sample_every)):
                    with evaluating():
                        if due(run.validate_every):
                            record |= task.validate()
                        if due(run.sample_every):
                            folder.write_sample(done, *task.sample())
                if main and record:
                    folder.write_log({"step": done, "images": done * run.batch_size} | record)
                    accelerator.log(record, step=done)
                if due(run.checkpoint_every):
                    save()
                    export()
                number = interrupted()
                if accelerator.num_processes > 1:  # all or none; asked for only where they wait for each other anyway
                    number = _agreed(number, accelerator) if due(run.log_every) else 0
                if number and done < run.steps:
                    save()
                    bar.say(f"stopped at step {done}, which is saved: the same command goes on from there")
                    return Outcome(done, number)
        if not folder.model.exists():
            export()
        bar.say(f"{done} steps are done, the model is {folder.model}; raise run.steps to train it further")
    accelerator.end_training()
    return Outcome(done)


def precision(run: RunConfig) -> str:
    """accelerate's name for it: auto is bf16 on a GPU that has it, else fp32."""
    if run.precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return {"fp32": "no", "bf16": "bf16"}[run.precision]


def _check_shares(run: RunConfig, optim: OptimConfig, processes: int) -> None:
    if run.batch_size % (processes * optim.accumulate):
        shares = f"{processes} processes x optim.accumulate {optim.accumulate}"
        raise UserError(f"run.batch_size {run.batch_size} cannot be shared evenly by {shares}")


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _agreed(number: int, accelerator: Accelerator) -> int:
    """The largest signal number that any process got."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
