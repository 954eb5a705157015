"""Draw what diffusion does: schedules, the forward process, samplers on closed forms and on a model.

python scripts/visualize.py --out docs/images
python scripts/visualize.py --only pictures painting --model embedded --prompt "a red apple"
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script, unknown, whole

ROOT = Path(__file__).resolve().parents[1]
PLANE = ("schedules", "forward", "trajectory", "side_by_side", "convergence")
PAINTED = ("pictures", "painting")  # these need a model
FLAGS = Parser(__doc__)
FLAGS.add_argument("--only", nargs="+", default=list(PLANE), help=f"which of {', '.join((*PLANE, *PAINTED))}")
FLAGS.add_argument("--image", type=Path, default=ROOT / "docs/images/taxi.png", help="picture for the forward process")
FLAGS.add_argument("--model", default="embedded", help="a packaged model's name, or a path (embedded)")
FLAGS.add_argument("--prompt", default="a red apple", help="what the model paints (a red apple)")
FLAGS.add_argument("--seed", type=whole(0), default=0, help="seed of the painted picture (0)")
FLAGS.add_argument("--out", type=Path, default=Path("outputs/figures"), help="folder for the PNGs (outputs/figures)")


@script
def main() -> None:
    args, known = FLAGS.parse_args(), [*PLANE, *PAINTED]
    for name in args.only:
        if name not in known:
            raise unknown("figure", name, known)

    import torch
    from PIL import Image

    from ldm import images, pipeline, recipe
    from ldm.diffusion.schedules import ScheduleConfig, make_schedule
    from ldm.evaluation import plots

    draw = {name: getattr(plots, name) for name in known}
    if "forward" in args.only:
        try:
            with Image.open(args.image) as file:
                (width, height), raw = file.size, file.convert("RGB").tobytes()
        except OSError as error:
            raise UserError(f"cannot read the picture {str(args.image)!r}: {error}") from None
        pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(1, height, width, 3)
        picture = pixels.permute(0, 3, 1, 2) / 127.5 - 1
        draw["forward"] = partial(plots.forward, picture, make_schedule(ScheduleConfig()))
    if set(args.only) & set(PAINTED):
        painter = pipeline.load(args.model)
        request = recipe.Request(args.prompt, seed=args.seed)

        def paint(sampler: str, steps: int) -> torch.Tensor:
            return painter.txt2img(replace(request, sampler=sampler, steps=steps))

        def painting() -> object:
            steps = list(painter.sample([replace(request, sampler="dpmpp_2m", steps=9)]))
            pair = [(step.x / math.hypot(1, step.sigma), step.x0, step.sigma) for step in steps]
            return plots.painting([(painter.decode(x), painter.decode(x0), sigma) for x, x0, sigma in pair])

        draw |= {"pictures": partial(plots.pictures, paint), "painting": painting}
    out = images.folder(args.out)
    for name in args.only:
        draw[name]().savefig(out / f"{name}.png")
        print(out / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
