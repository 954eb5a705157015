"""Show how pictures were made: of ours, of AUTOMATIC1111's web UI, of ComfyUI (PNG, JPEG, WebP).

python scripts/png_info.py outputs/00000.png
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script

FLAGS = Parser(__doc__)
FLAGS.add_argument("files", nargs="+", type=Path, help="pictures")
FLAGS.add_argument("--json", action="store_true", help="a line of JSON for each, everything in it")


@script
def main() -> None:
    args = FLAGS.parse_args()

    from ldm import recipe  # after the flags are read: what follows takes seconds

    for path in args.files:
        found = recipe.read(path)
        if args.json:
            print(json.dumps({"file": str(path)} | asdict(found), ensure_ascii=False))
            continue
        said = {name: value for name, value in (asdict(found.request) | asdict(found.made)).items() if value}
        print(f"{path}: by {found.made.program or 'ldm'}", *(f"  {k}: {v}" for k, v in said.items()), sep="\n")


if __name__ == "__main__":
    main()
