"""Paint pictures from text.

python scripts/txt2img.py --prompt "a red apple" "a blue sofa" --n 4 --seed 1 --grid
python scripts/txt2img.py --from-image outputs/00000.png
"""

import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads wait asleep: on a busy machine several times faster
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script, whole

FLAGS = Parser(__doc__)
PROMPTS = FLAGS.add_mutually_exclusive_group()
PROMPTS.add_argument("--prompt", nargs="+", action="extend", help="what to paint; several paint several")
PROMPTS.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
FLAGS.add_argument("--from-image", type=Path, help="paint a picture of ours again; other flags change its recipe")
FLAGS.add_argument("--negative", help="what to keep away from")
FLAGS.add_argument("--model", help="a packaged model's name, or a path (embedded)")
FLAGS.add_argument("--vae", default="", help="another autoencoder: a file or folder, TAESD's too (the model's own)")
FLAGS.add_argument("--clip-skip", type=int, help="read the text tower's n-th layer from the end (the model's own)")
FLAGS.add_argument("--sampler", help="such as euler, euler_a, dpmpp_2m; a wrong name lists all (the model's own)")
FLAGS.add_argument("--schedule", help="such as trailing, karras; a wrong name lists all (the model's own)")
FLAGS.add_argument("--steps", type=int, help="network evaluations a picture (the model's own)")
FLAGS.add_argument("--cfg-scale", type=float, help="how strongly to follow the prompt (the model's own)")
FLAGS.add_argument("--seed", type=int, help="seed of the first picture; the next one has the next (random)")
FLAGS.add_argument("--n", type=whole(1), default=1, help="pictures a prompt (1)")
FLAGS.add_argument("--batch-size", type=whole(1), default=4, help="pictures made at once (4)")
FLAGS.add_argument("--width", type=int, help="pixels (the model's own)")
FLAGS.add_argument("--height", type=int, help="pixels (the model's own)")
FLAGS.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures (outputs)")
FLAGS.add_argument("--device", help="auto, cpu, cuda, cuda:1 (auto)")
FLAGS.add_argument("--precision", help="auto, fp32, bf16, fp16 (auto: bf16 on CUDA, else fp32)")
FLAGS.add_argument("--grid", action="store_true", help="write all pictures on one sheet as well")
RECIPE = ("negative", "sampler", "schedule", "steps", "cfg_scale", "seed", "width", "height", "clip_skip")


@script
def main() -> None:
    args = FLAGS.parse_args()
    if not (args.prompt or args.prompts_file or args.from_image):
        raise UserError('nothing to paint: give --prompt "a red apple", --prompts-file or --from-image')

    from rich.console import Console  # after the flags are read: what follows takes seconds
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ldm import images, pipeline, recipe

    old = recipe.read(args.from_image) if args.from_image else recipe.fresh(secrets.randbelow(2**32))
    prompts = args.prompt or (recipe.read_prompts(args.prompts_file) if args.prompts_file else [old.request.prompt])
    model, precision = args.model or pipeline.EMBEDDED, args.precision or old.made.precision
    painter = pipeline.load(model, args.device or old.made.device, precision, args.vae)
    if args.from_image and not args.model:
        painter.check(old.made)
    given = {name: value for name in RECIPE if (value := getattr(args, name)) is not None}
    requests = painter.requests(replace(old.request, **given), prompts, args.n)
    batches = pipeline.batches(requests, args.batch_size, old.made)
    out = images.folder(args.out)
    print(*painter.notes(requests), sep="\n", file=sys.stderr)
    pixels: list[images.Pixels] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(batches) * (requests[0].steps or 0))
        for batch in batches:
            for step in painter.sample(batch.requests):  # noqa: B007 (the last step is the picture)
                bar.advance(task)
            pixels.append(images.to_pixels(painter.decode(step.x[batch.rows])))
            for picture, how in zip(pixels[-1], painter.recipes(batch), strict=True):
                print(images.save_next(images.png(picture, how.text()), out), flush=True)
    if args.grid:
        print(images.save_next(images.png(images.sheet(pixels, args.n if len(prompts) > 1 else 0)), out, "grid-", 4))


if __name__ == "__main__":
    main()
