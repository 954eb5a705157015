"""One step of a UNet, and its autoencoder's ways in and out, on latents of some sides: ours beside diffusers.

    python benchmarks/steps.py --apart                           # Stable Diffusion 1.5, one process at a time
    python benchmarks/steps.py --network sdxl --unet 128         # SDXL, likewise
    python benchmarks/steps.py --network embedded --repeats 15
    python benchmarks/steps.py --width 160 --unet 32 --vae 0 --repeats 3 --clock cpu

Each variant is a process of its own with the same random weights, for what keeps memory acts on a whole process; they
take turns. `ldm` is what txt2img does here, `diffusers` what theirs does unasked, `diffusers tuned` theirs in bf16,
channels-last and with memory kept; `openvino`, where it is installed (requirements-bench.txt), is what that makes of
diffusers' networks, in bf16 where the processor has it. The ceiling is the time that the work would take at the speed
of the best kernel there is, a 3 x 3 convolution, measured in its process and precision. --clock cpu counts what the
threads worked, which on a machine that others use as well says more than the clock on the wall.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

from common import add_variants, answer, conditions, convolution, flags, flops, keep, seconds, timed, turns

VARIANTS = ["diffusers", "diffusers tuned", "ldm fp32", "ldm", "openvino"]
SIDES = {"sd1": ([32, 64], 64), "sdxl": ([64], 0), "embedded": ([16], 16)}  # of latents: UNet's, autoencoder's


def first(given: Any) -> Any:
    """The tensor in diffusers' answer: the latents' distribution has two, its noise is drawn outside."""
    given = getattr(given, "latent_dist", given)
    return given.parameters if hasattr(given, "parameters") else given[0]


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


def child(args: argparse.Namespace) -> None:
    """Say how much work each thing is, then for each name run that once and say its seconds."""
    import torch
    from networks import Networks, spec_of

    torch.set_num_threads(args.threads)
    with torch.no_grad():  # as both pipelines do
        networks = Networks(args.child, spec_of(args.network, args.width, args.blocks), vae=bool(args.vae))
        calls = {f"UNet {n}x{n}, batch 2": networks.step(2, n) for n in args.unet}
        if n := args.vae:
            calls[f"VAE decode {n}x{n}"] = networks.decode(n)
            calls[f"VAE encode {n * networks.vae_config.factor} px"] = networks.encode(n)
        dtype, runs = networks.dtype, {what: partial(call, *given) for what, (call, given) in calls.items()}
        if args.child == "openvino":
            from ldm.models.speed import native_bf16

            dtype = torch.bfloat16 if native_bf16(torch.device("cpu")) else dtype
            runs = {what: converted(call, given, args.threads) for what, (call, given) in calls.items()}
        work = {what: flops(run) for what, run in runs.items()}  # which warms up too; of OpenVINO's none are seen
        runs["peak"] = convolution(dtype)
        answer(work | {"peak": flops(runs["peak"])}, lambda what: timed(runs[what], seconds(args)))


def main() -> None:
    parser = flags(__doc__, 5)
    parser.add_argument("--network", choices=SIDES, default="sd1")
    parser.add_argument("--width", type=int, default=320, help="of the first level of Stable Diffusion's UNets (320)")
    parser.add_argument("--blocks", type=int, default=2, help="ResBlocks a level of them (2)")
    parser.add_argument("--unet", type=int, nargs="*", help="sides of the latents (32 64; sdxl: 64; embedded: 16)")
    parser.add_argument("--vae", type=int, help="side of the autoencoder's latent, 0: none (64; sdxl: 0; embedded: 16)")
    parser.add_argument("--apart", action="store_true", help="one process at a time: less memory, more time (sdxl: so)")
    add_variants(parser, VARIANTS)
    args = parser.parse_args()
    unet, vae = SIDES[args.network]
    args.unet, args.vae = unet if args.unet is None else args.unet, vae if args.vae is None else args.vae
    if args.child:
        return child(args)
    if "openvino" in args.variants and not find_spec("openvino"):
        args.variants = [name for name in args.variants if name != "openvino"]
        print("openvino is not installed (requirements-bench.txt) and left out")
    work: dict[str, float] = {}
    times: dict[str, dict[str, list[float]]] = {}
    for process in turns(args.variants, args.repeats, args.apart or args.network == "sdxl"):
        for what, count in process.has.items():
            work[what] = max(work.get(what, 0), count)  # some do it with less
            times.setdefault(what, {}).setdefault(process.name, []).append(process.ask(what))
    peak = {name: work["peak"] / min(taken) for name, taken in times.pop("peak").items()}
    width = "" if args.network == "embedded" else f" of width {args.width}"
    print(f"{conditions(args)}\n{args.network}'s shapes{width}, median of {args.repeats}")
    figures: dict[str, dict[str, float]] = {"GFLOP/s of a convolution": {n: p / 1e9 for n, p in peak.items()}}
    print(f"{'':21s}" + "".join(f"{name:>26s}" for name in peak))
    for what, taken in times.items():
        middle = {name: median(found) for name, found in taken.items()}
        figures[what] = {name: 1e3 * value for name, value in middle.items()}
        base = next(iter(middle.values()))
        cells = [f"{1e3 * t:9.1f} ms {base / t:5.2f}x {work[what] / peak[n] / t:6.0%}" for n, t in middle.items()]
        print(f"{what:21s}" + "".join(f"{cell:>26s}" for cell in cells))
    speeds = ", ".join(f"{name} {p / 1e9:.0f} GFLOP/s" for name, p in peak.items())
    print(f"times faster than the first, and share of the ceiling: {speeds}")
    keep(args, figures)


if __name__ == "__main__":
    main()
