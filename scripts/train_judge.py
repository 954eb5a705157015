"""Train the judge of prompt accuracy on the names and colours of a corpus.

python scripts/train_judge.py configs/judge/embedded.yaml --out weights/judge.safetensors

`make weights` first. It says how often the judge is right on held-back pictures, and the file keeps that. Stopped,
it goes on where it was. Any field of the config is an option too: `--most 20`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="a YAML file")
    parser.add_argument("--out", type=Path, default=Path("weights/judge.safetensors"), help="the judge's file")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/evaluation/work"), help="folder of what was computed"
    )
    args, overrides = parser.parse_known_args()

    from ldm import config
    from ldm.evaluation.judge import JudgeRun, make_judge
    from ldm.evaluation.store import Store

    judge = make_judge(config.load(JudgeRun, args.config, overrides), Store(args.work, chunk=32))
    judge.save(args.out)
    print(args.out)
    told = judge.spec.accuracy
    for what in ("name", "colour"):
        print(f"{what} right in {told[what]:.1%} of {told[what + 's']:.0f} held-back pictures")


if __name__ == "__main__":
    main()
