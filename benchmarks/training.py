"""A training step of the embedded model's UNet, ours beside the same step written the usual way on diffusers' UNet.

python benchmarks/training.py                       # on this CPU: fp32 and bf16, medians of steps taken in turns
python benchmarks/training.py --batch 16 --steps 9 --clock cpu

Both have the same shapes, weights of their own, and get the same latents and text states: noise is added, the network
answers, gradients are clipped, AdamW and an average of the weights follow. Theirs is what diffusers' training scripts
do on one device: DDPMScheduler.add_noise, mse_loss, torch's AdamW, EMAModel; ours is `Learner` and `Ema`, as in
ldm/training/loop.py. Each side is a process of its own, for ours keeps its memory, as the scripts do, which acts on
the whole process; `memory kept` is theirs with the same. --clock cpu counts what the threads worked, which on a machine
that others use as well says more than the clock on the wall.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional as F

from ldm import config
from ldm.conditioning import Conditioning
from ldm.diffusion.losses import diffusion_loss
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.families.folder import unet_to
from ldm.models import speed
from ldm.models.unet import UNet, UNetConfig
from ldm.text.open_clip import open_clip
from ldm.text.tower import TextConfig
from ldm.training import keyed
from ldm.training.config import LdmRun
from ldm.training.ema import Ema
from ldm.training.learner import Learner, Objective
from ldm.training.optim import named

Clock = Callable[[], float]
Step = Callable[[int], float]  # number of the step -> seconds of it that optimiser and average took
SIDES = {
    precision: [f"ldm {precision}", f"diffusers {precision}", f"diffusers {precision} memory kept"]
    for precision in ("fp32", "bf16")
}


def shapes() -> tuple[LdmRun, UNetConfig]:
    """The embedded model's run; its UNet without the pooled vector, which diffusers' has only together with SDXL's."""
    run = config.load(LdmRun, ROOT / "configs/embedded/ldm.yaml")
    kept = {name: getattr(run.backbone, name) for name in ("channels", "res_blocks", "depth", "heads", "context_dim")}
    return run, UNetConfig(**kept, mid_depth=run.backbone.mid_depth)


def ours(run: LdmRun, shape: UNetConfig, precision: str, x0: Tensor, tokens: Tensor, clock: Clock) -> Step:
    """The step of ldm/training: `precision` as it says it."""
    layout = torch.channels_last if run.run.channels_last else torch.contiguous_format
    network = UNet(shape).to(memory_format=layout)
    prediction, schedule, cond = PREDICTIONS["eps"], make_schedule(ScheduleConfig()), Conditioning(tokens)

    def loss(batch: dict[str, Any]) -> dict[str, Tensor]:
        position = batch["position"]
        sigma = schedule.quantile(keyed.uniform(0, "sigma", position))
        noise = keyed.normal(0, "noise", position, tuple(x0.shape[1:]))
        return {"loss": diffusion_loss(network, prediction, schedule, x0, sigma, noise, cond).mean()}

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
    learner = Learner(Objective("denoiser", {"backbone": network}, loss), run.optim, accelerator, main=True)
    ema, go = Ema(named({"backbone": network}), run.run.ema), torch.zeros(())

    def step(number: int) -> float:
        position = torch.arange(len(x0)) + number * len(x0)
        learner.backward({"step": number, "position": position}, 1, last=True)
        began = clock()
        learner.clip()
        learner.step(run.optim.lr, go)
        ema.update(number, 1 - go)
        return clock() - began

    return step


def theirs(run: LdmRun, shape: UNetConfig, precision: str, x0: Tensor, tokens: Tensor, clock: Clock) -> Step:
    """The step of diffusers' text-to-image script."""
    open_clip()  # torchvision's operators, which diffusers asks for
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    network = UNet2DConditionModel.from_config(unet_to(shape, x0.shape[-1], TextConfig()))
    network.train()
    scheduler, optim = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), run.optim
    optimizer = torch.optim.AdamW(network.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    ema = EMAModel(network.parameters(), decay=run.run.ema.decay)
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(number: int) -> float:
        noise = torch.randn_like(x0)
        steps = torch.randint(0, 1000, (len(x0),))
        with mixed:
            answer = network(scheduler.add_noise(x0, noise, steps), steps, tokens).sample
            loss = F.mse_loss(answer.float(), noise.float())
        loss.backward()
        began = clock()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        return clock() - began

    return step


def child(side: str, batch: int, clock: Callable[[], float]) -> None:
    """Take a step for each line that comes in; say its seconds, and those of clipping, optimiser and average."""
    name, precision, *kept = side.split()
    if name == "ldm" or kept:
        speed.keep_memory()
    torch.manual_seed(0)
    run, shape = shapes()
    x0, tokens = torch.randn(batch, 4, 16, 16), torch.randn(batch, 32, shape.context_dim)
    step = (ours if name == "ldm" else theirs)(run, shape, precision, x0, tokens, clock)
    for number, _ in enumerate(sys.stdin):
        began = clock()
        behind = step(number)
        print(clock() - began, behind, flush=True)


def measured(sides: Sequence[str], arguments: Sequence[str], steps: int) -> dict[str, tuple[float, float]]:
    """Of each side the median seconds of a step, and of what is behind the gradients; they take turns."""
    command = [sys.executable, __file__, *arguments, "--child"]
    there = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in sides
    }
    seconds: dict[str, list[list[float]]] = {side: [] for side in sides}
    for number in range(steps + 2):
        for side, process in there.items():
            assert process.stdin and process.stdout
            print(file=process.stdin, flush=True)
            found = [float(word) for word in process.stdout.readline().split()]
            seconds[side] += [found] if number > 1 else []  # behind two that find their memory
    for process in there.values():
        process.communicate()
    return {side: tuple(map(statistics.median, zip(*found, strict=True))) for side, found in seconds.items()}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batch", type=int, default=64, help="samples a step (64, as in configs/embedded/ldm.yaml)")
    flags.add_argument("--steps", type=int, default=5, help="steps of each that count, behind two that do not (5)")
    flags.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    flags.add_argument("--child", choices=[side for sides in SIDES.values() for side in sides], help=argparse.SUPPRESS)
    args, threads = flags.parse_args(), torch.get_num_threads()
    if args.child:
        cpu = args.clock == "cpu"
        return child(args.child, args.batch, lambda: time.process_time() / threads if cpu else time.perf_counter())
    print(
        f"batch {args.batch}, 16 x 16 x 4 latents, {threads} threads, {args.clock} time, load {os.getloadavg()[0]:.1f}"
    )
    print(f"medians of {args.steps} steps of each, taken in turns")
    print(f"{'':28}ms a step   samples/s   clip, optimiser and average, share of the step")
    found: dict[str, tuple[float, float]] = {}
    for sides in SIDES.values():
        found |= measured(sides, ["--batch", str(args.batch), "--clock", args.clock], args.steps)
    for side, (whole, tail) in found.items():
        print(f"{side:25}{1000 * whole:12.0f}{args.batch / whole:12.1f}{100 * tail / whole:14.1f} %")
    for precision, (our, *others) in SIDES.items():
        for other in others:
            print(f"{precision}: ldm is {found[other][0] / found[our][0]:.2f} times as fast as {other}")
    ratio = found["diffusers fp32"][0] / found["ldm bf16"][0]
    print(f"as configs/embedded/ldm.yaml trains (bf16) against their scripts' default (fp32): {ratio:.2f} times")


if __name__ == "__main__":
    main()
