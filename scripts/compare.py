"""Paint the same prompts at the same seeds in several ways, a row each, on one sheet.

python scripts/compare.py --prompts "a heart" "a dog" --row "" --row "lora=runs/flat/model.safetensors" --out sheet.png
python scripts/compare.py --prompts "a car" --row "" --row "steps=4" --row "model=runs/student/model.safetensors"
"""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script, whole

OWN = ("model", "lora", "embedding")
FLAGS = Parser(__doc__)
FLAGS.add_argument("--prompts", nargs="+", required=True, help="what to paint, a column each")
FLAGS.add_argument("--pictures", nargs="*", default=[], help="files for a row above, such as what was learnt from")
FLAGS.add_argument(
    "--row", action="append", required=True, help=f"words NAME=VALUE, of {', '.join(OWN)} and of how to paint (steps=4)"
)
FLAGS.add_argument("--seed", type=whole(0), default=0, help="seed of the first column; the next one has the next (0)")
FLAGS.add_argument("--out", type=Path, default=Path("outputs/compared.png"), help="the sheet (outputs/compared.png)")


@script
def main() -> None:
    args = FLAGS.parse_args()

    import torch

    from ldm import images, pipeline
    from ldm.evaluation.suite import settings
    from ldm.files import replacing
    from ldm.recipe import Request

    def paint(row: str) -> torch.Tensor:
        words = [word.partition("=") for word in shlex.split(row)]
        own = {name: value for name, _, value in words if name in OWN}
        how: dict[str, Any] = settings([f"{name}={value}" for name, _, value in words if name not in OWN])
        painter = pipeline.load(own.get("model", "embedded"))
        if "embedding" in own:
            painter.embed([Path(own["embedding"])])
        if "lora" in own:
            painter.adapt([own["lora"]])
        base = replace(Request("", seed=args.seed), **{name: value for name, (value, *_) in how.items()})
        return images.to_pixels(painter.txt2img(*painter.requests(base, args.prompts)))

    rows = [paint(row) for row in args.row]
    side = rows[0].shape[2]
    above = [images.to_image(images.read_picture(p).convert("RGB").resize((side, side))) for p in args.pictures]
    blank = torch.ones(1, 3, side, side)
    above += [blank] * (-len(above) % len(args.prompts))
    first = [images.to_pixels(torch.cat([image.reshape(1, 3, side, side) for image in above]))] if above else []
    with replacing(args.out) as temporary:
        temporary.write_bytes(images.png(images.grid(torch.cat([*first, *rows]), len(args.prompts))[0]))
    print(args.out)


if __name__ == "__main__":
    main()
