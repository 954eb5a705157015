"""Time a step takes outside the network: our whole loop against what diffusers does, on the CPU, in one run.

    python benchmarks/samplers.py [--steps 30] [--repeats 7] [--size 64] [--json FILE]

Twice: without guidance (ours: label, scalings, guard against NaN, sampler; theirs: scale_model_input, step), and with
it (ours: classifier-free guidance besides; theirs: the loop of StableDiffusionPipeline, less progress bar, callbacks).
From the list of levels to the last step. The network is a stand-in that answers with a tensor made beforehand, and so
is the noise, whose drawing costs both the same: of 4 x 64 x 64 numbers 40 microseconds. Ours and theirs take turns;
medians of several runs on end, per evaluation of the network, in CPU time of the one thread: what else the machine does
counts only through its caches.
"""

import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import conditions, flags, keep
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import bind, cfg
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import ScheduleConfig, make_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("ddim", "DDIM", {"clip_sample": False}),
    ("ddpm", "DDPM", {"clip_sample": False}),
    ("euler", "EulerDiscrete", {}),
    ("euler_a", "EulerAncestralDiscrete", {}),
    ("heun", "HeunDiscrete", {}),
    ("dpm2", "KDPM2Discrete", {}),
    ("lms", "LMSDiscrete", {}),
    ("plms", "PNDM", {"skip_prk_steps": True}),
    ("deis", "DEISMultistep", {"solver_order": 3}),
    ("dpmpp_2m", "DPMSolverMultistep", {}),
    ("dpmpp_3m", "DPMSolverMultistep", {"solver_order": 3}),
    ("dpmpp_2m_sde", "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("unipc", "UniPCMultistep", {"solver_order": 3}),
    ("sa_solver", "SASolver", {}),
    ("lcm", "LCM", {"clip_sample": False, "original_inference_steps": 200}),
    ("tcd", "TCD", {"clip_sample": False, "original_inference_steps": 200}),
]
RUNS, SCALE = 10, 7.5  # runs on end in one timing


class Network(nn.Module):
    """Costs nothing, and counts how often it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = {len(rows): rows for rows in (answer, torch.cat([answer, -answer]))}
        self.count = [0]  # a list, for to set a module's attribute costs a microsecond

    def forward(self, z: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        self.count[0] += 1
        return self.answers[len(z)]


def their_scheduler(kind: str, settings: dict[str, Any], drawn: Tensor) -> Any:
    import diffusers

    cls = getattr(diffusers, kind + "Scheduler")
    module = sys.modules[cls.__module__]
    if hasattr(module, "randn_tensor"):
        module.randn_tensor = lambda *_, **__: drawn
    known = cls.__init__.__code__.co_varnames
    return cls(**{key: value for key, value in {**SD, **settings}.items() if key in known})


def timed(run: Callable[[], None], network: Network) -> float:
    """Microseconds per evaluation."""
    network.count[0], start = 0, time.thread_time()
    for _ in range(RUNS):
        run()
    return (time.thread_time() - start) / network.count[0] * 1e6


def main() -> None:
    parser = flags(__doc__, 7)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=64, help="latent of 4 x size x size")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    start, drawn = (torch.randn((1, 4, args.size, args.size), generator=rng) for _ in range(2))
    network, schedule = Network(drawn), make_schedule(ScheduleConfig())
    denoiser = Denoiser(network, PREDICTIONS["eps"], schedule)
    cond, uncond = (Conditioning(torch.full((1, 77, 768), value)) for value in (1.0, 0.0))
    ways = {"alone": bind(denoiser, cond), "guided": cfg(denoiser, cond, uncond, SCALE)}

    def ours(name: str, way: str) -> None:
        for _ in SAMPLERS[name](ways[way], start * 14.6, schedule.steps(args.steps), lambda x: drawn):
            pass

    def theirs(scheduler: Any, way: str) -> None:
        scheduler.set_timesteps(args.steps)
        x = start * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            z = torch.cat([x] * 2) if way == "guided" else x
            out = network(scheduler.scale_model_input(z, t), t)
            if way == "guided":
                free, bound = out.chunk(2)
                out = free + SCALE * (bound - free)
            x = scheduler.step(out, t, x, return_dict=False)[0]

    print(f"{conditions(args)}, latent 4 x {args.size} x {args.size}, fp32,")
    print(
        f"1 thread, {args.steps} steps; microseconds per evaluation, medians of {args.repeats} timings of {RUNS} runs"
    )
    print(f"{'':14s}{'without guidance':>26s}{'with guidance':>30s}")
    print(f"{'sampler':14s}" + "    ".join([f"{'ours':>8s} {'diffusers':>10s} {'share':>7s}"] * 2))
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, kind, settings in PAIRS:
            scheduler, figures = their_scheduler(kind, settings, drawn), {}
            for way in ways:
                runs = (lambda n=name, w=way: ours(n, w)), (lambda s=scheduler, w=way: theirs(s, w))
                timings = [[timed(run, network) for run in runs] for _ in range(args.repeats + 1)][1:]
                mine, other = (median(column) for column in zip(*timings, strict=True))
                figures |= {f"{way} ours": mine, f"{way} diffusers": other}
            found[name] = figures
            pairs = [(figures[f"{way} ours"], figures[f"{way} diffusers"]) for way in ways]
            print(f"{name:14s}" + "    ".join(f"{a:8.1f} {b:10.1f} {a / b:7.1%}" for a, b in pairs), flush=True)
    keep(args, found)


if __name__ == "__main__":
    main()
