"""Draw the curves of one or several training runs to a PNG.

python scripts/plot_run.py runs/vae
python scripts/plot_run.py runs/ldm-a runs/ldm-b --out compared.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script

FLAGS = Parser(__doc__)
FLAGS.add_argument("runs", nargs="+", type=Path, help="folders of runs")
FLAGS.add_argument("--out", type=Path, help="the PNG (curves.png in the first run's folder)")


@script
def main() -> None:
    args = FLAGS.parse_args()
    from ldm.evaluation.curves import curves, read
    from ldm.files import replacing

    runs = {str(run): read(run) for run in args.runs}
    out = args.out or args.runs[0] / "curves.png"
    try:
        with replacing(out) as temporary:
            curves(runs).savefig(temporary, format="png")
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error.strerror}") from None
    print(out)


if __name__ == "__main__":
    main()
