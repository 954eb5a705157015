"""A training step of the embedded model's UNet, ours beside the same step written the usual way on diffusers' UNet.

python benchmarks/training.py                       # on this CPU: fp32 and bf16, medians of steps taken in turns
python benchmarks/training.py --batch 64 --steps 9

Both have the same shapes, weights of their own, and get the same latents and text states: noise is added, the network
answers, gradients are clipped, AdamW and an average of the weights follow. Theirs is what diffusers' training scripts
do on one device: DDPMScheduler.add_noise, mse_loss, torch's AdamW, EMAModel; ours is `Learner` and `Ema`, as in
ldm/training/loop.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from ldm import config
from ldm.conditioning import Conditioning
from ldm.diffusion.losses import diffusion_loss
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.families.folder import unet_to
from ldm.models.unet import UNet, UNetConfig
from ldm.text.open_clip import open_clip
from ldm.text.tower import TextConfig
from ldm.training import keyed
from ldm.training.config import LdmRun
from ldm.training.ema import Ema
from ldm.training.learner import Learner, Objective
from ldm.training.optim import named

Step = Callable[[int], float]  # number of the step -> seconds of it that optimiser and average took


def shapes() -> tuple[LdmRun, UNetConfig]:
    """The embedded model's run; its UNet without the pooled vector, which diffusers' has only together with SDXL's."""
    run = config.load(LdmRun, ROOT / "configs/embedded/ldm.yaml")
    kept = {name: getattr(run.backbone, name) for name in ("channels", "res_blocks", "depth", "heads", "context_dim")}
    return run, UNetConfig(**kept, mid_depth=run.backbone.mid_depth)


def ours(run: LdmRun, shape: UNetConfig, precision: str, x0: torch.Tensor, tokens: torch.Tensor) -> Step:
    """The step of ldm/training: `precision` as it says it."""
    layout = torch.channels_last if run.run.channels_last else torch.contiguous_format
    network = UNet(shape).to(memory_format=layout)
    prediction, schedule, cond = PREDICTIONS["eps"], make_schedule(ScheduleConfig()), Conditioning(tokens)

    def loss(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
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
        began = time.perf_counter()
        learner.clip()
        learner.step(run.optim.lr, go)
        ema.update(number, 1 - go)
        return time.perf_counter() - began

    return step


def theirs(run: LdmRun, shape: UNetConfig, precision: str, x0: torch.Tensor, tokens: torch.Tensor) -> Step:
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
        began = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        return time.perf_counter() - began

    return step


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batch", type=int, default=16, help="samples a step (16)")
    flags.add_argument("--steps", type=int, default=5, help="steps of each that count, behind one that does not (5)")
    args = flags.parse_args()
    torch.manual_seed(0)
    run, shape = shapes()
    x0, tokens = torch.randn(args.batch, 4, 16, 16), torch.randn(args.batch, 32, shape.context_dim)
    sides = {
        f"{name} {precision}": make(run, shape, precision, x0, tokens)
        for precision in ("fp32", "bf16")
        for name, make in (("ldm", ours), ("diffusers", theirs))
    }
    whole: dict[str, list[float]] = {name: [] for name in sides}
    tail: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.steps + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            behind = step(number)
            if number:
                whole[name].append(time.perf_counter() - began)
                tail[name].append(behind)
    threads = torch.get_num_threads()
    print(f"batch {args.batch}, 16 x 16 x 4 latents, {threads} threads, medians of {args.steps} steps taken in turns")
    print("                  ms a step   samples/s   clip, optimiser and average, share of the step")
    for name in sides:
        seconds, share = statistics.median(whole[name]), statistics.median(tail[name])
        print(f"{name:16}{1000 * seconds:11.0f}{args.batch / seconds:12.1f}{100 * share / seconds:14.1f} %")
    for precision in ("fp32", "bf16"):
        ratio = statistics.median(whole[f"diffusers {precision}"]) / statistics.median(whole[f"ldm {precision}"])
        print(f"{precision}: ldm is {ratio:.2f} times as fast")
    ratio = statistics.median(whole["diffusers fp32"]) / statistics.median(whole["ldm bf16"])
    print(
        f"as configs/embedded/ldm.yaml trains (bf16) against their scripts' default (fp32): {ratio:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
