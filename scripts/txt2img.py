"""Paint pictures from text, and from pictures.

python scripts/txt2img.py --prompt "a red apple" "a blue sofa" --n 4 --seed 1 --grid
python scripts/txt2img.py --prompt "a green apple" --init-image outputs/00000.png --strength 0.6
python scripts/txt2img.py --from-image outputs/00000.png
"""

import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads wait asleep: on a busy machine several times faster
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import request
from ldm.errors import Parser, UserError, script, whole

FLAGS = Parser(__doc__)
PROMPTS = FLAGS.add_mutually_exclusive_group()
PROMPTS.add_argument("--prompt", nargs="+", action="extend", help="what to paint; several paint several")
PROMPTS.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
FLAGS.add_argument("--from-image", type=Path, help="paint a picture of ours again; other flags change its recipe")
FLAGS.add_argument("--init-image", type=Path, help="a picture to start from (PNG, JPEG, WebP)")
FLAGS.add_argument("--mask", help="paint only where this picture is white; `alpha`: where --init-image is transparent")
FLAGS.add_argument("--expand", help="pixels to paint around --init-image: 32, or LEFT,TOP,RIGHT,BOTTOM")
request.add_flags(FLAGS)
FLAGS.add_argument("--model", help="a packaged model's name, or a path (embedded)")
FLAGS.add_argument("--lora", nargs="+", action="extend", default=[], help="adapters, each FILE or FILE:0.8")
FLAGS.add_argument("--embedding", nargs="+", action="extend", default=[], type=Path, help="files that prompts name")
FLAGS.add_argument("--wildcards", type=Path, help="folder whose name.txt holds lines for __name__ in prompts")
FLAGS.add_argument("--vae", default="", help="another autoencoder: a file or folder, TAESD's too (the model's own)")
FLAGS.add_argument("--n", type=whole(1), default=1, help="pictures a prompt (1)")
FLAGS.add_argument("--batch-size", type=whole(1), default=4, help="pictures made at once (4)")
FLAGS.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures (outputs)")
FLAGS.add_argument("--device", help="auto, cpu, cuda, cuda:1 (auto)")
FLAGS.add_argument("--precision", help="auto, fp32, bf16, fp16 (auto: bf16 on CUDA, else fp32)")
FLAGS.add_argument("--grid", action="store_true", help="write all pictures on one sheet as well")


@script
def main() -> None:
    args = FLAGS.parse_args()
    if not (args.prompt or args.prompts_file or args.from_image):
        raise UserError('nothing to paint: give --prompt "a red apple", --prompts-file or --from-image')
    if (args.mask or args.expand) and not args.init_image:
        raise UserError("--mask and --expand change a picture: give it as --init-image")

    from rich.console import Console  # after the flags are read: what follows takes seconds
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ldm import images, pipeline, recipe
    from ldm.canvas import read_canvas

    old = recipe.read(args.from_image) if args.from_image else recipe.fresh(secrets.randbelow(2**32))
    prompts = args.prompt or (recipe.read_prompts(args.prompts_file) if args.prompts_file else [old.request.prompt])
    first = args.init_image, args.mask, args.expand, (args.width, args.height)
    canvas = read_canvas(*first) if args.init_image else None
    model, precision = args.model or pipeline.EMBEDDED, args.precision or old.made.precision
    painter = pipeline.load(model, args.device or old.made.device, precision, args.vae)
    painter.embed(args.embedding)
    painter.reader.wildcards = args.wildcards
    print(*painter.adapt(args.lora), sep="\n", end="\n" * bool(args.lora), file=sys.stderr)
    if args.from_image and not args.model:
        painter.check(old.made)
    requests = painter.requests(replace(old.request, **request.given(args)), prompts, args.n, canvas)
    batches = pipeline.batches(requests, args.batch_size, old.made)
    out = images.folder(args.out)
    print(*painter.notes(requests), sep="\n", file=sys.stderr)
    pixels: list[images.Pixels] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(batches) * painter.steps(requests[0]))
        for batch in batches:
            for step in painter.sample(batch.requests, canvas):  # noqa: B007 (the last step is the picture)
                bar.advance(task)
            pixels.append(images.to_pixels(painter.finish(step.x[batch.rows], canvas)))
            for picture, how in zip(pixels[-1], painter.recipes(batch, canvas), strict=True):
                print(images.save_next(images.png(picture, how.text()), out), flush=True)
    if args.grid:
        print(images.save_next(images.png(images.sheet(pixels, args.n if len(prompts) > 1 else 0)), out, "grid-", 4))


if __name__ == "__main__":
    main()
