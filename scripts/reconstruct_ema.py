"""A run's model with an average of its weights of another width, put together after training.

python scripts/reconstruct_ema.py runs/ldm --width 0.15 --out runs/ldm/width-0.15.safetensors

The run keeps what it takes with --run.ema.widths '[0.05, 0.1]' --run.ema.snapshot_every 1000.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.checkpoints import native
from ldm.errors import Parser, script
from ldm.training.ema import reconstruct


@script
def main() -> None:
    flags = Parser(str(__doc__))
    flags.add_argument("run", type=Path, help="the folder of a run")
    flags.add_argument("--width", type=float, required=True, help="share of the training to average over, such as 0.1")
    flags.add_argument("--step", type=int, default=0, help="as of this step (the last)")
    flags.add_argument("--out", type=Path, required=True, help="the model to write")
    args = flags.parse_args()
    average, step = reconstruct(args.run / "ema", args.width, args.step)
    model = native.load(args.run / "model.safetensors")
    tensors = {f"{prefix}.{n}": v for prefix, m in model.modules.items() for n, v in m.state_dict().items()}
    provenance = model.spec.provenance | {"steps": step, "ema_width": args.width}
    native.write(args.out, replace(model.spec, provenance=provenance), tensors | average)
    print(f"{args.out}: the average of width {args.width} after {step} steps")


if __name__ == "__main__":
    main()
