"""Time a step takes outside the network: our sampler and denoiser against diffusers' scheduler, on the CPU, in one run.

    python benchmarks/samplers.py [--steps 30] [--repeats 15] [--size 64]

The network is a stand-in that returns a tensor made beforehand. Ours: label, scalings, guard against NaN, sampler, from
schedule to last step. Theirs: set_timesteps, scale_model_input, step. The two take turns; medians of whole runs, per
evaluation of the network, in CPU time of the one thread, so that other work on the machine counts little. Of a
stochastic sampler's step the drawing of noise is the greater part, the same for both.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import bind
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


def timed(run: Callable[[], int]) -> float:
    """Microseconds per evaluation."""
    start = time.thread_time()
    evaluations = run()
    return (time.thread_time() - start) / evaluations * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--size", type=int, default=64, help="latent of 4 x size x size")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import diffusers

    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    out = torch.randn((1, 4, args.size, args.size), generator=rng)
    schedule, count = make_schedule(ScheduleConfig()), [0]

    def network(z: torch.Tensor, label: torch.Tensor, cond: None) -> torch.Tensor:
        count[0] += 1
        return out

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=rng)

    denoise = bind(Denoiser(network, PREDICTIONS["eps"], schedule), None)

    @torch.no_grad()
    def ours(name: str) -> int:
        count[0] = 0
        sigmas = schedule.steps(args.steps)
        for _ in SAMPLERS[name](denoise, out * 14.6, sigmas, noise):
            pass
        return count[0]

    @torch.no_grad()
    def theirs(scheduler: Any) -> int:
        scheduler.set_timesteps(args.steps)
        x = out * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return len(scheduler.timesteps)

    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, latent 4 x {args.size} x {args.size}, fp32,")
    print(f"1 thread, {args.steps} steps, median of {args.repeats} runs each; microseconds per evaluation")
    print(f"{'sampler':14s} {'ours':>8s} {'diffusers':>10s} {'share':>7s}")
    for name, kind, settings in PAIRS:
        given = {**SD, **settings}
        cls = getattr(diffusers, kind + "Scheduler")
        known = cls.__init__.__code__.co_varnames
        scheduler = cls(**{key: value for key, value in given.items() if key in known})
        ours(name), theirs(scheduler)
        pairs = [(timed(lambda n=name: ours(n)), timed(lambda s=scheduler: theirs(s))) for _ in range(args.repeats)]
        mine, other = (median(column) for column in zip(*pairs, strict=True))
        print(f"{name:14s} {mine:8.1f} {other:10.1f} {mine / other:7.1%}", flush=True)


if __name__ == "__main__":
    main()
