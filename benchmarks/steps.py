"""One step of a Stable Diffusion 1.5-shaped UNet, and its autoencoder's ways in and out: ours beside diffusers.

    python benchmarks/steps.py                                   # real widths: 9 GB of memory, minutes
    python benchmarks/steps.py --width 160 --unet 32 --vae 0 --repeats 3 --clock cpu

Each variant is a process of its own with the same random weights, for what keeps memory acts on a whole process; they
take turns. `default` is what txt2img does here, `diffusers` what theirs does unasked, `diffusers tuned` theirs in bf16,
channels-last and with memory kept; `openvino`, where it is installed (requirements-bench.txt), is what that makes of
diffusers' networks, in bf16 where the processor has it. The ceiling is the time that the work would take at the speed
of the best kernel there is, a 3 x 3 convolution, measured in its process and precision. --clock cpu counts what the
threads worked, which on a machine that others use as well says more than the clock on the wall.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VARIANTS = ["diffusers", "diffusers tuned", "fp32", "default"]  # of these the last two are ours
VARIANTS += ["openvino"] * bool(find_spec("openvino"))
WIDTHS = (1, 2, 4, 4)


def flops(run: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def first(answer: Any) -> Any:
    """The tensor in diffusers' answer: the latents' distribution has two, its noise is drawn outside."""
    answer = getattr(answer, "latent_dist", answer)
    return answer.parameters if hasattr(answer, "parameters") else answer[0]


def converted(run: Callable[..., Any], given: tuple[Any, ...], threads: int) -> Callable[[], Any]:
    """A function of tensors as a program of OpenVINO's; the numbers of one call are its own."""
    import openvino
    import torch

    from ldm.models.speed import native_bf16

    module = torch.nn.Module()
    module.forward = lambda *given: first(run(*given))  # type: ignore[method-assign]
    precision = "bf16" if native_bf16(torch.device("cpu")) else "f32"
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    program = openvino.compile_model(openvino.convert_model(module, example_input=given), "CPU", options)
    arrays = [tensor.numpy() for tensor in given]
    return lambda: program(arrays)


def networks(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured: name -> one run of it."""
    import torch

    from ldm.conditioning import Conditioning
    from ldm.models import speed
    from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
    from ldm.models.unet import UNet, UNetConfig

    theirs, dtype = args.child not in ("fp32", "default"), torch.float32
    if args.child in ("diffusers tuned", "default") and speed.native_bf16(torch.device("cpu")):
        dtype = torch.bfloat16
    if args.child not in ("diffusers", "openvino"):
        speed.keep_memory()
    heads = max(1, args.width // 40)
    channels = tuple(args.width * w for w in WIDTHS)
    config = UNetConfig(channels=channels, heads=(heads,) * 4, res_blocks=args.blocks)
    vae = AutoencoderConfig(std=(1 / 0.18215,))
    torch.set_default_dtype(dtype)  # so that no fp32 copy is made on the way
    if theirs:
        from ldm.text.open_clip import open_clip

        open_clip()  # torchvision's operators
        from diffusers import AutoencoderKL, UNet2DConditionModel

        unet = UNet2DConditionModel(
            cross_attention_dim=768, block_out_channels=channels, layers_per_block=args.blocks, attention_head_dim=heads
        )
        parts = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        auto = AutoencoderKL(
            down_block_types=parts[0], up_block_types=parts[1], block_out_channels=vae.channels, layers_per_block=2
        ) if args.vae else torch.nn.Identity()  # fmt: skip
    else:
        unet, auto = UNet(config), Autoencoder(vae) if args.vae else torch.nn.Identity()
    torch.set_default_dtype(torch.float32)
    rng = torch.Generator().manual_seed(0)
    for network in (unet, auto):
        network.eval().requires_grad_(False)
        for p in network.parameters():
            p.normal_(0, max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 0.1, generator=rng)
        if args.child == "diffusers tuned":
            network.to(memory_format=torch.channels_last)
        elif not theirs:
            speed.prepare(network)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    label, tokens = torch.tensor([500.0, 500.0]), drawn(2, 77, 768)
    step = unet if theirs else lambda z, label, tokens: unet(z, label, Conditioning(tokens))
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        f"UNet {n}x{n}, batch 2": (step, (drawn(2, 4, n, n), label, tokens)) for n in args.unet
    }
    if args.vae:
        n = args.vae
        calls[f"VAE decode {n}x{n}"] = auto.decode, (drawn(1, 4, n, n),)
        calls[f"VAE encode {8 * n} px"] = auto.encode, (drawn(1, 3, 8 * n, 8 * n),)
    runs = {
        what: converted(call, given, args.threads) if args.child == "openvino" else partial(call, *given)
        for what, (call, given) in calls.items()
    }
    halves = args.child == "openvino" and speed.native_bf16(torch.device("cpu"))
    weight, x = (
        drawn(*shape).to(torch.bfloat16 if halves else dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((256, 256, 3, 3), (1, 256, 64, 64))
    )
    runs["peak"] = lambda: torch.conv2d(x, weight, padding=1)
    return runs


def child(args: argparse.Namespace) -> None:
    """For each line with a name on the standard input: run that once, answer with its seconds."""
    import torch

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    with torch.no_grad():  # as both pipelines do
        runs = networks(args)
        work = {name: flops(run) for name, run in runs.items()}  # which warms up too
        print(json.dumps(work), flush=True)
        for line in sys.stdin:
            start = clock()
            runs[line.strip()]()
            print((clock() - start) / (args.threads if args.clock == "cpu" else 1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="of the UNet's first level (320)")
    parser.add_argument("--blocks", type=int, default=2, help="ResBlocks a level of the UNet (2)")
    parser.add_argument("--unet", type=int, nargs="*", default=[32, 64], help="sides of the latents (32 64)")
    parser.add_argument("--vae", type=int, default=64, help="side of the autoencoder's latent, 0: leave it out (64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    children: dict[str, subprocess.Popen[str]] = {}
    work: dict[str, float] = {}
    for name in args.variants:
        command = [sys.executable, __file__, "--child", name, *sys.argv[1:]]
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert children[name].stdout is not None
        counted = json.loads(children[name].stdout.readline() or "null") or sys.exit(f"{name} failed")
        work = {what: max(work.get(what, 0), count) for what, count in counted.items()}  # some do it with less
    times: dict[str, dict[str, list[float]]] = {what: {name: [] for name in children} for what in work}
    for _ in range(args.repeats):
        for what, found in times.items():
            for name, process in children.items():
                assert process.stdin is not None and process.stdout is not None
                print(what, file=process.stdin, flush=True)
                found[name].append(float(process.stdout.readline()))
    for process in children.values():
        process.communicate()
    peak = {name: work["peak"] / min(times["peak"][name]) for name in children}
    threads, load = args.threads, os.getloadavg()[0]
    print(
        f"{threads} threads, {args.clock} time, load {load:.1f}, median of {args.repeats}, UNet of width {args.width}"
    )
    figures: dict[str, dict[str, float]] = {"GFLOP/s of a convolution": {n: p / 1e9 for n, p in peak.items()}}
    print(f"{'':24s}" + "".join(f"{name:>26s}" for name in children))
    for what in (name for name in work if name != "peak"):
        middle = {name: median(taken) for name, taken in times[what].items()}
        figures[what] = {name: 1e3 * value for name, value in middle.items()}
        base = next(iter(middle.values()))
        cells = [f"{1e3 * t:9.0f} ms {base / t:5.2f}x {work[what] / peak[n] / t:6.0%}" for n, t in middle.items()]
        print(f"{what:24s}" + "".join(f"{cell:>26s}" for cell in cells))
    print(
        "times faster than the first, and share of the ceiling:",
        ", ".join(f"{n} {p / 1e9:.0f} GFLOP/s" for n, p in peak.items()),
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
