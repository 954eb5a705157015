"""A training step of the embedded model's UNet, ours beside the same step written the usual way on diffusers' UNet.

python benchmarks/training.py                       # on this CPU: fp32 and bf16, medians of steps taken in turns
python benchmarks/training.py --batch 16 --repeats 9 --clock cpu

Both have the same shapes, weights of their own, and get the same latents and text states: noise is added, the network
answers, gradients are clipped, AdamW and an average of the weights follow. Theirs is what diffusers' training scripts
do on one device: DDPMScheduler.add_noise, mse_loss, torch's AdamW, EMAModel; ours is `Learner` and `Ema`, as in
ldm/training/loop.py. Each side is a process of its own, for ours keeps its memory, as the scripts do, which acts on
the whole process; `memory kept` is theirs with the same. The ceiling is the time that the work would take at the speed
of a 3 x 3 convolution. --clock cpu counts what the threads worked, which on a machine that others use as well says
more than the clock on the wall.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import ROOT, add_variants, answer, conditions, convolution, flags, flops, keep, seconds, timed, turns
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
VARIANTS = [
    f"{who} {precision}{kept}"
    for precision in ("fp32", "bf16")
    for who, kept in (("ldm", ""), ("diffusers", ""), ("diffusers", " memory kept"))
]


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


def child(args: argparse.Namespace) -> None:
    """Say how much work a step is; take one for each number that comes in and say its seconds, and those behind."""
    torch.set_num_threads(args.threads)
    name, precision, *kept = args.child.split()
    if name == "ldm" or kept:
        speed.keep_memory()
    torch.manual_seed(0)
    run, shape = shapes()
    x0, tokens = torch.randn(args.batch, 4, 16, 16), torch.randn(args.batch, 32, shape.context_dim)
    clock, peak = seconds(args), convolution(torch.bfloat16 if precision == "bf16" else torch.float32)
    step = (ours if name == "ldm" else theirs)(run, shape, precision, x0, tokens, clock)

    def taken(number: int) -> tuple[float, float, float]:
        began = clock()
        behind = step(number)
        return clock() - began, behind, timed(peak, clock)

    answer({"step": flops(lambda: step(0)), "peak": flops(peak)}, taken)


def main() -> None:
    parser = flags(__doc__, 5)
    parser.add_argument("--batch", type=int, default=64, help="samples a step (64, as in configs/embedded/ldm.yaml)")
    add_variants(parser, VARIANTS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    found: dict[str, list[list[float]]] = {name: [] for name in args.variants}
    for number, process in enumerate(turns(args.variants, args.repeats + 1), start=len(args.variants)):
        taken = process.ask(number // len(args.variants))
        found[process.name] += [taken] if number >= 2 * len(args.variants) else []  # behind two that find their memory
        work = process.has
    print(f"{conditions(args)}\nbatch {args.batch}, 16 x 16 x 4 latents, median of {args.repeats} steps")
    print(f"{'':27}ms a step   samples/s   of the ceiling   clip, optimiser and average")
    figures: dict[str, dict[str, float]] = {}
    for name, rows in found.items():
        whole, tail, _ = map(median, zip(*rows, strict=True))
        share = work["step"] / whole / (work["peak"] / min(peak for *_, peak in rows))
        print(f"{name:26}{1e3 * whole:10.0f}{args.batch / whole:12.1f}{share:15.0%}{tail / whole:20.1%} of the step")
        figures[name] = {"ms": 1e3 * whole, "of the ceiling": share, "behind the gradients": tail / whole}
    for our in (name for name in figures if name.startswith("ldm")):
        for other in (name for name in figures if not name.startswith("ldm")):
            if other.split()[1] == our.split()[1] or (our, other) == ("ldm bf16", "diffusers fp32"):
                print(f"{our} is {figures[other]['ms'] / figures[our]['ms']:.2f} times as fast as {other}")
    keep(args, figures)


if __name__ == "__main__":
    main()
