"""What would go wrong with a run, found before its first step: each finding is a line that says what to do."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm import config
from ldm.checkpoints.native import SamplingDefaults
from ldm.data.dataset import to_image
from ldm.data.folders import with_shards
from ldm.data.shards import Shards
from ldm.data.stream import sources
from ldm.errors import UserError
from ldm.files import sha256
from ldm.training import checkpoint, memory
from ldm.training.config import ControlRun, DistilRun, InversionRun, LdmRun, LoraRun, VaeRun
from ldm.training.folder import check_same
from ldm.training.optim import rate
from ldm.training.processes import faults
from ldm.training.tasks.autoencoder import AutoencoderTask
from ldm.training.tasks.controlnet import ControlTask
from ldm.training.tasks.denoising import DenoisingTask
from ldm.training.tasks.distil import DistilTask
from ldm.training.tasks.inversion import InversionTask
from ldm.training.tasks.lora import LoraTask

LOOKED_AT = 64  # samples
Settings = VaeRun | LdmRun
TASKS: dict[type[Settings], Callable[[Any], Any]] = {
    LdmRun: DenoisingTask, VaeRun: AutoencoderTask, LoraRun: LoraTask, ControlRun: ControlTask,
    InversionRun: InversionTask, DistilRun: DistilTask,
}  # fmt: skip
# Rates above which hardly any run works.
STEEP = {"adamw": 0.02, "adamw8bit": 0.02, "prodigy": 10.0, "adafactor": 0.1, "muon": 0.2}


def read(path: Path, overrides: Sequence[str]) -> Settings:
    """The config of a training script, the one that knows most of its fields. UserError as `config.load`."""
    said = {word.removeprefix("--").partition("=")[0].partition(".")[0] for word in overrides if word[:2] == "--"}
    with suppress(OSError, TypeError, ValueError, yaml.YAMLError):  # told by whoever reads it next
        said |= set(yaml.safe_load(path.read_text()))
    return config.load(max(TASKS, key=lambda kind: len(said & {f.name for f in fields(kind)})), path, overrides)


def examine(config: Settings, run: Path | None = None, processes: int = 1) -> list[str]:
    """The findings about a run in the folder `run` by that many processes; none: all is well."""
    findings = [line for check in CHECKS for line in check(config, processes)]
    try:
        task = TASKS[type(config)](config)
        sample = task.dataset.__getitems__(range(min(LOOKED_AT, len(task.dataset))))
    except UserError as error:  # the networks or the shards; the checks below need both
        return [*findings, str(error)]
    if isinstance(task, DenoisingTask):
        findings += [*captions(sample["caption"]), *latents(task, sample["image"][:16])]
    findings += room(task, config, run, processes)
    try:
        if run and checkpoint.complete(run / "checkpoints"):
            check_same(config, yaml.safe_load((run / "config.yaml").read_text()), run)
    except (UserError, OSError, yaml.YAMLError) as error:
        findings.append(str(error))
    return findings


def shards(config: Settings, processes: int) -> Iterator[str]:
    """All files are there, whole, and enough."""
    held = config.data.validation
    for name, pattern in (("data.shards", config.data.shards), ("data.validation", held))[: 1 + bool(held)]:
        try:
            found = Shards(*with_shards([source.pattern for source in sources(pattern)], config.data))
            for path, entry in zip(found.paths, found.entries, strict=True):
                if entry.sha256 and Path(str(path)).is_file() and sha256(Path(str(path))) != entry.sha256:
                    yield f"{name}: shard {str(path)!r} is damaged (its manifest has another sha256): copy it again"
        except UserError as error:
            yield f"{name}: {error}"
            continue
        count = sum(found.counts)
        if name == "data.shards" and count < config.run.batch_size:
            yield f"data.shards hold {count} samples, less than one run.batch_size {config.run.batch_size}: add shards"
    if held and held == config.data.shards:
        yield "data.validation is data.shards: what is trained on proves nothing, hold others back"


def settings(config: Settings, processes: int) -> Iterator[str]:
    run, optim, gpu = config.run, config.optim, torch.cuda.is_available()
    yield from faults(run, optim, processes)
    if optim.lr <= 0:
        yield f"optim.lr is {optim.lr}: nothing will move, take 1e-4, say"
    if optim.lr > STEEP[optim.kind]:
        yield f"optim.lr is {optim.lr}: {optim.kind} hardly ever stands more than {STEEP[optim.kind]}"
    if optim.warmup >= run.steps:
        top = max(rate(optim, step, run.steps) for step in (0, run.steps - 1))
        yield f"optim.warmup {optim.warmup} is not over in {run.steps} steps (the rate ends at {top:.3g}): shorten it"
    if not run.ema.warmup and (share := run.ema.decay**run.steps) > 0.1:
        yield f"run.ema.decay {run.ema.decay} still holds {share:.0%} of the first weights at the end: lower it"
    if run.checkpoint_every > run.steps or not run.checkpoint_every:
        yield f"run.checkpoint_every {run.checkpoint_every} saves only at step {run.steps}: what is lost is all of it"
    if run.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "run.precision bf16 is only emulated on this GPU, which is slow: take fp16 or fp32"
    if run.precision == "tf32" and not gpu:
        yield "run.precision tf32 is one of GPUs: take fp32 or bf16"


def diffusion(config: Settings, processes: int) -> Iterator[str]:
    if not isinstance(config, LdmRun):
        return
    zero = config.schedule.zero_snr
    if zero and config.prediction in ("", "eps"):
        yield "schedule.zero_snr with prediction eps: pure noise says nothing about the picture, take v or x0"
    if zero and config.defaults.schedule not in ("trailing", SamplingDefaults().schedule):
        how = config.defaults.schedule
        yield f"schedule.zero_snr with defaults.schedule {how}: take trailing, which begins at pure noise"
    guided, dropout = config.defaults.cfg_scale > 1, config.loss.caption_dropout
    if guided and not dropout and not config.weights:
        scale = config.defaults.cfg_scale
        yield f"loss.caption_dropout is 0, so defaults.cfg_scale {scale} has no prediction to guide away from: take 0.1"
    if dropout > 0.5:
        yield f"loss.caption_dropout {dropout} hides most captions: take 0.1"


def captions(texts: list[str]) -> Iterator[str]:
    empty, (most, count) = sum(not text.strip() for text in texts), Counter(texts).most_common(1)[0]
    if empty > len(texts) / 4:
        yield f"{empty} of {len(texts)} captions looked at are empty: prepare the data with captions"
    elif len(texts) >= 8 and count > len(texts) / 2:
        yield f"{count} of {len(texts)} captions looked at are {most!r}: nothing can be learned from them"


@torch.no_grad()
def latents(task: DenoisingTask, images: torch.Tensor) -> Iterator[str]:
    """Those of a few pictures must have a mean near 0 and a deviation near 1, which the noise levels are made for."""
    mean = task.autoencoder.float().encode(to_image(images)).mode.float()
    centre, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    if not mean.isfinite().all():
        yield f"latents of {task.config.autoencoder!r} are not finite: take another file, or fp32"
    elif centre.abs().max() > 1 or spread.max() > 2 or spread.mean() < 0.4:
        yield (
            f"latents of {task.config.autoencoder!r} have means from {centre.min():.2f} to {centre.max():.2f}, "
            f"deviations from {spread.min():.2f} to {spread.max():.2f}, not 0 and 1: its statistics (mean, std) "
            "are not those of this data, measure them with scripts/train_vae.py"
        )


def room(task: Any, config: Settings, run: Path | None, processes: int) -> Iterator[str]:
    gpu = torch.cuda.is_available()
    need, there = memory.predict(task, config, processes), memory.free(torch.device("cuda" if gpu else "cpu"))
    here = need.total * (1 if gpu else processes)
    if here > there:
        remedies = "a smaller run.batch_size, optim.accumulate 2 or more, or run.recompute true help"
        yield f"a step needs {memory.size(here)} of memory, {memory.size(there)} are free: {remedies}"
    every = config.run.keep_every
    kept = config.run.keep + 1 + (config.run.steps // every if every else 0)
    size = need.weights + need.average + need.optimizer
    path = (run or Path()).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    left = shutil.disk_usage(folder).free
    if kept * size > left:
        yield (
            f"{kept} checkpoints of {memory.size(size)} do not fit on the disk of {str(folder)!r}, where "
            f"{memory.size(left)} are free: take a smaller run.keep, a larger run.keep_every, or another --run"
        )


CHECKS: tuple[Callable[[Any, int], Iterator[str]], ...] = (settings, shards, diffusion)
