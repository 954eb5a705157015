"""From the command to the picture: scripts/txt2img.py beside diffusers' pipeline, with the embedded model.

    python benchmarks/txt2img.py [--repeats 5] [--steps 25] [--guidance 5] [--size 128]

Each picture is a process of its own, from its start to its end: imports, weights, sampling, the PNG. Theirs runs the
same weights as scripts/convert.py writes them for diffusers, with the scheduler that is nearest (DPM-Solver++ on flow's
levels), as it comes, in fp32, and tuned: in bf16, channels-last, with memory kept. They take turns, with all files in
the page cache. Memory is the most that a process held, mapped files included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, conditions, flags, keep

VARIANTS = ["diffusers", "diffusers tuned", "ldm fp32", "ldm"]
PROMPT = "a red apple"


def exported(folder: Path) -> Path:
    """The embedded model as diffusers' folder."""
    command = [sys.executable, ROOT / "scripts/convert.py", "embedded", folder / "embedded", "--to", "diffusers"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "embedded"


def their_pipeline(folder: Path, tuned: bool) -> Any:
    """Their pipeline of a folder; where nothing is said of its dtype it paints in fp32 alone."""
    import torch

    from ldm.text.open_clip import _torchvision_operators

    _torchvision_operators()  # which diffusers asks for
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    if tuned:
        from ldm.models.speed import keep_memory

        keep_memory()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if tuned else torch.float32)
    if tuned:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(args: argparse.Namespace) -> None:
    import torch

    pipe = their_pipeline(args.folder, args.child == "diffusers tuned")
    rng, settings = torch.Generator().manual_seed(1), {"height": args.size, "width": args.size}
    settings |= {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pipe(PROMPT, generator=rng, **settings).images[0].save(args.out / "00000.png")


def process(command: list[str]) -> tuple[float, float, float]:
    """Seconds on the wall, of the processors, and MiB of a process. It starts as a copy of this one, which is small."""
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        running = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(running.pid, 0)
        ended = time.perf_counter()
        if status:
            said.seek(0)
            sys.exit(f"{said.read()}failed: {' '.join(command)}")
    return ended - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10


def main() -> None:
    parser = flags(__doc__, 5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--size", type=int, default=128, help="pixels a side (128)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="which, the base first (all)")
    for name in ("--child", "--folder", "--out"):
        parser.add_argument(name, type=str if name == "--child" else Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return theirs(args)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in args.variants}
    with tempfile.TemporaryDirectory() as temporary:
        folder = exported(Path(temporary))
        for turn in range(args.repeats + 1):  # the first warms up
            for name, taken in found.items():
                out = Path(temporary) / f"{name}{turn}"
                out.mkdir()
                words = ["--steps", str(args.steps), "--out", str(out)]
                if name.startswith("ldm"):
                    script, guidance = "scripts/txt2img.py", "--cfg-scale"
                    words += ["--prompt", PROMPT, "--width", str(args.size), "--height", str(args.size), "--seed", "1"]
                    words += ["--precision", "fp32"] if name == "ldm fp32" else []
                else:
                    script, guidance = "benchmarks/txt2img.py", "--guidance"
                    words += ["--child", name, "--folder", str(folder), "--size", str(args.size)]
                one = process([sys.executable, str(ROOT / script), *words, guidance, str(args.guidance)])
                if not (out / "00000.png").is_file():
                    sys.exit(f"{name} wrote no picture")
                taken += [one] if turn else []
    cores = len(os.sched_getaffinity(0))
    print(f"{conditions(args)}, {cores} cores")
    print(f"embedded, {args.size} px, {args.steps} steps, median of {args.repeats} processes")
    print(f"{'':20}seconds   times faster   of processors   peak MiB   of theirs")
    figures: dict[str, dict[str, float]] = {}
    for name, taken in found.items():
        wall, worked, held = map(median, zip(*taken, strict=True))
        figures[name] = {"seconds": wall, "of processors": worked, "peak MiB": held}
        base = figures[args.variants[0]]
        ratios = base["seconds"] / wall, held / base["peak MiB"]
        print(f"{name:20}{wall:7.2f}{ratios[0]:14.2f}x{worked:16.2f}{held:11.0f}{ratios[1]:11.2f}x")
    keep(args, figures)


if __name__ == "__main__":
    main()
