"""Time and memory as batch, resolution and steps grow, and what tiles save in decoding: ours beside diffusers.

    python benchmarks/scaling.py --figure docs/images/scaling.png    # Stable Diffusion 1.5's widths: 20 minutes
    python benchmarks/scaling.py --width 160 --repeats 1

batch: a step of the UNet on latents of the smallest of `--sides`; side: one at batch 2; steps: a whole picture of the
embedded model, by pipelines that are loaded; decode: the autoencoder on one latent, as a whole and in tiles
(diffusers: enable_tiling, 512 px each, blended; ours: ldm.models.stripes, which is exact). `ldm` is what txt2img does
here, `diffusers` what theirs does unasked, in fp32. Every axis of a variant is a process of its own. Memory is the most
it held in the first run of a point, before which freed memory goes back and the mark is set anew; seconds are medians
of the runs behind it.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import add_variants, answer, conditions, flags, keep, peak, seconds, timed, turns
from txt2img import PROMPT, exported, their_pipeline

VARIANTS = ["diffusers", "diffusers tuned", "ldm fp32", "ldm"]
Points = dict[int, tuple[float, float]]  # place on an axis -> seconds, MiB


def decoder_width(args: argparse.Namespace) -> int:
    """Of its first level: 2/5 of the UNet's, as Stable Diffusion's, in whole groups of norms."""
    return max(1, args.width // 80) * 32


def runs(axis: str, variant: str, args: argparse.Namespace) -> Callable[[int], Callable[[], Any]]:
    """One run at a place on an axis."""
    if axis == "steps":
        return pictures(variant, args)
    from networks import Networks, spec_of

    decodes, spec = axis.startswith("decode"), spec_of("sd1", args.width, vae=decoder_width(args))
    networks, factor = Networks(variant, spec, not decodes, decodes), spec.autoencoder.factor

    def at(place: int) -> Callable[[], Any]:
        if decodes:
            call, given = networks.decode(place // factor, tiled=axis == "decode tiled")
        elif axis == "batch":
            call, given = networks.step(place, min(args.sides) // factor)
        else:
            call, given = networks.step(2, place // factor)
        return partial(call, *given)

    return at


def pictures(variant: str, args: argparse.Namespace) -> Callable[[int], Callable[[], Any]]:
    """A picture of the embedded model in so many steps."""
    import torch

    from ldm import pipeline
    from ldm.models import speed
    from ldm.recipe import Request

    if variant.startswith("ldm"):
        speed.keep_memory()
        ours = pipeline.load(precision="fp32" if variant == "ldm fp32" else "auto")
        return lambda steps: lambda: ours.txt2img(Request(PROMPT, steps=steps))
    theirs = their_pipeline(args.folder, variant == "diffusers tuned")
    rng = torch.Generator().manual_seed(0)
    settings = {"height": 128, "width": 128, "guidance_scale": 5.0, "generator": rng}
    return lambda steps: lambda: theirs(PROMPT, num_inference_steps=steps, **settings)


def child(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    axis, variant = args.child.split("/")
    with torch.no_grad():
        at, clock = runs(axis, variant, args), seconds(args)

        def measured(question: tuple[int, bool]) -> tuple[float, float]:
            run = at(question[0])
            held = peak(run) if question[1] else 0.0
            return timed(run, clock), held

        answer(None, measured)


def measure(axis: str, places: Sequence[int], args: argparse.Namespace) -> dict[str, Points]:
    """The points of an axis by each variant, which take turns."""
    taken: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for number, process in enumerate(turns([f"{axis}/{name}" for name in args.variants], args.repeats)):
        points = taken.setdefault(process.name.split("/")[1], {})
        for place in sorted(places):  # from the lightest, for a heap grows
            points.setdefault(place, []).append(process.ask((place, number < len(args.variants))))
    return {
        name: {place: (statistics.median(time for time, _ in found), found[0][1]) for place, found in points.items()}
        for name, points in taken.items()
    }


def slope(points: Points) -> float:
    """The exponent that fits seconds best."""
    x, y = ([math.log(value) for value in values] for values in (points, [time for time, _ in points.values()]))
    return statistics.linear_regression(x, y).slope


def grows(axis: str, name: str, points: Points) -> str:
    """How the seconds of a variant grow, for a legend."""
    if axis != "steps":
        return f"{name}: {axis}$^{{{slope(points):.2f}}}$"
    line = statistics.linear_regression(list(points), [time for time, _ in points.values()])
    return f"{name}: {line.intercept:.2f} s + {1e3 * line.slope:.0f} ms a step"


def draw(found: dict[str, dict[str, Points]], path: Path, titles: dict[str, str]) -> None:
    """Four panels: seconds over batch, side and steps, and memory of decoding."""
    from matplotlib.ticker import LogLocator

    from ldm.evaluation.plots import colour, panels

    with panels(2, 2, 8.4, 6) as (figure, axes):
        for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
            for index, (variant, points) in enumerate(found[name].items()):
                style = {"color": colour(index), "marker": "o", "markersize": 4}
                if name != "decode":
                    values = [time for time, _ in points.values()]
                    axis.plot(list(points), values, label=grows(name, variant, points), **style)
                    continue
                for how, tiles in (("whole", points), ("tiled", found["decode tiled"][variant])):
                    values = [held / 1024 for _, held in tiles.values()]
                    style |= {"linestyle": "--", "markerfacecolor": "white"} if how == "tiled" else {}
                    axis.plot(list(tiles), values, label=f"{variant}, {how}", **style)
            axis.set(title=title, xlabel="pixels a side" if name in ("side", "decode") else name)
            axis.set_ylabel("peak memory, GiB" if name == "decode" else "seconds")
            if name in ("batch", "side"):
                axis.set(xscale="log", yscale="log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.minorticks_off()
            else:
                axis.set_ylim(0, 1.35 * axis.dataLim.ymax)  # room for the legend
            axis.set_xticks(list(points), [str(place) for place in points])
            axis.legend(fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = flags(__doc__, 3)
    parser.add_argument("--width", type=int, default=320, help="of the UNet's first level, a multiple of 32 (320)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 768, 1024], help="pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 50])
    parser.add_argument("--figure", type=Path, help="the PNG to draw")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_variants(parser, VARIANTS)
    parser.set_defaults(variants=["diffusers", "ldm"])
    args = parser.parse_args()
    if args.child:
        return child(args)
    axes = {"batch": args.batches, "side": args.sides, "steps": args.steps, "decode": args.sides}
    axes["decode tiled"] = args.sides
    with tempfile.TemporaryDirectory() as temporary:
        sys.argv += ["--folder", str(exported(Path(temporary)))]
        found = {axis: measure(axis, places, args) for axis, places in axes.items()}
    print(f"{conditions(args)}\nUNet of width {args.width}, median of {args.repeats}")
    print(f"{'':18}" + "".join(f"{name:>32}" for name in args.variants))
    for axis, by in found.items():
        base = by[args.variants[0]]
        for place in sorted(axes[axis]):
            cells = [
                f"{time:9.3f} s {base[place][0] / time:5.2f}x{held:7.0f} MiB {held / base[place][1]:5.2f}x"
                for time, held in (points[place] for points in by.values())
            ]
            print(f"{axis:12}{place:6}" + "".join(f"{cell:>32}" for cell in cells))
    print("times faster than the first, and its share of memory;", end=" ")
    print(
        "seconds grow with the power of "
        + "; ".join(
            f"{axis}: " + ", ".join(f"{name} {slope(points):.2f}" for name, points in by.items())
            for axis, by in found.items()
            if len(axes[axis]) > 1
        )
    )
    keep(args, found)
    if args.figure:
        unet = f"a step of a UNet of width {args.width}"
        titles = {"batch": f"{unet}, {min(args.sides)} px", "side": f"{unet}, batch 2"}
        titles |= {"steps": "a picture of the embedded model", "decode": f"decoding, width {decoder_width(args)}"}
        draw(found, args.figure, titles)


if __name__ == "__main__":
    main()
