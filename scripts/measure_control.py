"""How well a ControlNet is followed: edges of held-back pictures are its hints, and are looked for in what is painted.

python scripts/measure_control.py runs/edges/controlnet --data data/drawn/val/00000.tar --n 32

It prints the F1 of the edges, found within 2 pixels, with the ControlNet and without it, of the same captions and
seeds, and draws pictures, their hints, and what was painted with and without.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script, whole

FLAGS = Parser(__doc__)
FLAGS.add_argument("control", help="a ControlNet, FILE or FILE:0.8 or FILE:0.8:0-0.5")
FLAGS.add_argument("--data", required=True, help="shards, or a folder, of pictures that it has not seen")
FLAGS.add_argument("--model", default="embedded", help="a packaged model's name, or a path (embedded)")
FLAGS.add_argument("--n", type=whole(1), default=32, help="pictures (32)")
FLAGS.add_argument("--shown", type=whole(1), default=6, help="of which are drawn (6)")
FLAGS.add_argument("--seed", type=whole(0), default=0, help="seed of the first picture; the next one has the next (0)")
FLAGS.add_argument("--out", type=Path, default=Path("outputs/control.png"), help="the sheet (outputs/control.png)")


@script
def main() -> None:
    args = FLAGS.parse_args()

    import tempfile

    import torch

    from ldm import images, pipeline
    from ldm.adapters.hints import agreement, draw
    from ldm.data.dataset import DataConfig
    from ldm.files import replacing
    from ldm.recipe import Request
    from ldm.training.heldback import HeldBack

    painter = pipeline.load(args.model)
    held = HeldBack(DataConfig(args.data, size=painter.model.spec.image_size, workers=0), args.n)
    shown = held.images(0, len(held))
    hints = draw("canny", shown)

    def painted(i: int, *, steered: bool) -> torch.Tensor:
        painter.controls.clear()
        with tempfile.TemporaryDirectory() as folder:
            if steered:
                hint = Path(folder) / "hint.png"
                hint.write_bytes(images.png(images.to_pixels(hints[i : i + 1] * 2 - 1)[0]))
                painter.control([args.control], [hint])
            return painter.txt2img(Request(held.batch["caption"][i], seed=args.seed + i))

    rows = [shown, hints * 2 - 1]
    for steered in (True, False):
        rows.append(torch.cat([painted(i, steered=steered) for i in range(len(held))]).cpu())
        found = draw("canny", rows[-1])[:, 0] > 0.5
        f1 = [agreement(a > 0.5, b) for a, b in zip(hints[:, 0], found, strict=True)]
        print(f"F1 of edges {'with' if steered else 'without'} it: {sum(f1) / len(f1):.3f} over {len(f1)} pictures")
    sheet = torch.cat([images.to_pixels(row[: args.shown]) for row in rows])
    with replacing(args.out) as temporary:
        temporary.write_bytes(images.png(images.grid(sheet, min(args.shown, len(held)))[0]))
    print(args.out)


if __name__ == "__main__":
    main()
