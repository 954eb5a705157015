"""Look over a training run before its first step, and say in a line each what will go wrong.

python scripts/doctor.py configs/tiny/ldm.yaml --data.shards 'data/{00000..00003}.tar' --run runs/ldm --processes 2

It takes the arguments of the training script; whose config it is it sees from the fields. Exit code 1: there is
something to mend.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script, whole

FLAGS = Parser(__doc__)
FLAGS.add_argument("config", type=Path, help="a YAML file")
FLAGS.add_argument("--run", type=Path, help="the folder that the run will have")
FLAGS.add_argument("--processes", type=whole(1), default=1, help="that will train together (1)")


@script
def main() -> None:
    args, overrides = FLAGS.parse_known_args()
    from ldm.training.doctor import examine, read

    findings = examine(read(args.config, overrides), args.run, args.processes)
    for line in findings:
        print("- " + " ".join(line.split()))
    print(f"{len(findings)} found" if findings else "all is well")
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
