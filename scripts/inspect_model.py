"""Say what a model file or folder is, and why it would be refused, without loading it.

python scripts/inspect_model.py v1-5-pruned.safetensors
python scripts/inspect_model.py embedded --values
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script

FLAGS = Parser(__doc__)
FLAGS.add_argument("model", help="a packaged model's name, a file or a folder")
FLAGS.add_argument("--values", action="store_true", help="read every weight too, and look for what is not finite")


@script
def main() -> None:
    args = FLAGS.parse_args()

    from ldm import pipeline  # after the flags are read: what follows takes seconds
    from ldm.families.inspect import describe

    packaged = pipeline.ASSETS / f"{args.model}.safetensors"
    print(*describe(packaged if packaged.is_file() else Path(args.model), values=args.values), sep="\n")


if __name__ == "__main__":
    main()
