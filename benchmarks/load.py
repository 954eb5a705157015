"""Time and memory until the first step of a Stable Diffusion 1.5-size model in fp16, ours beside diffusers, on the CPU.

python benchmarks/load.py                      # writes 2.1 GB of random weights, measures, removes them
python benchmarks/load.py --folder sd15 --runs 5 --precision bf16

Every measurement is a fresh process that loads the same files, encodes one prompt and takes one step on a latent of 8
x 8: the work of a step is the same for both, so the time to it is that of loading. All files are in the page cache,
and threads wait asleep as in scripts/txt2img.py, for all alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, conditions, keep

OURS = """
import gc
gc.set_threshold(100_000)  # as scripts/txt2img.py does
from ldm import pipeline
from ldm.text.open_clip import part
part("transformer"), part("tokenizer")
imported()
from ldm.recipe import Request
pipe = pipeline.load(PATH, "cpu", "PRECISION")
loaded()
next(iter(pipe.sample([Request("a red apple", sampler="ddim", steps=20, width=64, height=64, cfg_scale=7.5)])))
"""
THEIRS = """
import torch
from ldm.text.open_clip import _torchvision_operators
_torchvision_operators()
from diffusers import StableDiffusionPipeline
imported()
pipe = StableDiffusionPipeline.from_pretrained(PATH, torch_dtype=torch.DTYPE)
pipe.set_progress_bar_config(disable=True)
loaded()
def stop(pipe, *_):
    raise StopIteration
try:
    pipe("a red apple", num_inference_steps=20, width=64, height=64, guidance_scale=7.5, callback_on_step_end=stop)
except StopIteration:
    pass
"""
# Marks are seconds since the process began to run Python; memory is the peak of what is resident, mapped files
# included.
FRAME = """
import json, sys, time
start, marks = time.perf_counter(), {}
def peak():  # of this program alone; getrusage counts its parent's as well
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**10
def mark(name): marks[name] = time.perf_counter() - start
def imported():
    mark("import")
    marks["base"] = peak()
def loaded():
    mark("load")
    marks["held"] = peak()
sys.path.insert(0, ROOT)
CODE
mark("step")
marks["peak"] = peak()
print(json.dumps(marks))
"""


def write_model(folder: Path) -> None:
    """A diffusers folder of Stable Diffusion 1.5's shapes with random fp16 weights."""
    import torch

    from ldm.checkpoints import native
    from ldm.families.export import to_diffusers
    from ldm.models.autoencoder import AutoencoderConfig
    from ldm.models.unet import UNetConfig
    from ldm.text.tower import TextConfig

    spec = native.ModelSpec(AutoencoderConfig(std=(1 / 0.18215,)), 512, UNetConfig(), TextConfig())
    model = native.skeleton(spec)
    rng = torch.Generator().manual_seed(0)
    pool = torch.randn(2**24, generator=rng).mul_(0.02).half()

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return pool.repeat(-(-size // len(pool)))[:size].reshape(shape).clone()

    to_diffusers(folder, model, {name: weights(shape) for name, shape in model.shapes().items()}, {})


def measure(code: str, path: Path, precision: str) -> dict[str, float]:
    """One fresh process."""
    # Where nothing is said diffusers mixes the files' fp16 with fp32 and stops: fp32 is the one that it paints in.
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "auto": "float32"}[precision]
    words = {"CODE": code, "PATH": repr(str(path)), "ROOT": repr(str(ROOT)), "PRECISION": precision, "DTYPE": dtype}
    frame = FRAME
    for word, value in words.items():
        frame = frame.replace(word, value)
    waiting = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", frame], capture_output=True, text=True, check=False, env=waiting
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--folder", type=Path, help="a diffusers folder to load instead of a fresh one")
    flags.add_argument("--json", type=Path, help="write the figures here as well")
    flags.add_argument("--runs", type=int, default=3, help="processes of each (3); the median counts")
    flags.add_argument(
        "--precision",
        nargs="+",
        choices=("fp16", "bf16", "fp32", "auto"),
        default=("fp16", "auto"),
        help="to run in, one after the other (fp16, the files'; auto: what ours chooses, beside fp32)",
    )
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "sd15"
        if args.folder is None:
            write_model(folder)
        print(conditions(args))
        keep(args, {precision: compare(folder, precision, args.runs) for precision in args.precision})


def compare(folder: Path, precision: str, n: int) -> dict[str, dict[str, float]]:
    """Measure both, in turns, and print the medians."""
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 2**20
    codes = {"ldm": OURS, "diffusers": THEIRS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for turn in range(n + 1):
        for name, code in codes.items():
            marks = measure(code, folder, precision)
            if turn:  # the first turn fills the page cache
                runs[name].append(marks)
    own = "bf16 if the processor has it, else fp32, beside diffusers in fp32" if precision == "auto" else precision
    print(f"{size:.0f} MiB of weights in fp16, run in {own}; medians of {n} processes")
    print("            import s   load s   step s   import to step s   MiB: import    load    step   step - import")
    found = {
        name: {key: statistics.median(run[key] for run in taken) for key in taken[0]} for name, taken in runs.items()
    }
    for name, m in found.items():
        load, step, ready = m["load"] - m["import"], m["step"] - m["load"], m["step"] - m["import"]
        seconds = f"{m['import']:9.2f}{load:9.2f}{step:9.2f}{ready:19.2f}"
        share = (m["peak"] - m["base"]) / size
        print(f"{name:11}{seconds}{m['base']:14.0f}{m['held']:8.0f}{m['peak']:8.0f}{share:8.2f}x the files")
    ours, theirs = found["ldm"], found["diffusers"]
    after, whole = (ours["step"] - ours["import"]) / (theirs["step"] - theirs["import"]), ours["step"] / theirs["step"]
    print(f"time to the first step, as a share of theirs: {after:.2f} after the imports, {whole:.2f} with them")
    return found


if __name__ == "__main__":
    main()
