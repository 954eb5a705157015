"""Build the redistributable part of the corpus from npm and Debian packages: fluent_emoji, twemoji, renders, clipart.

    python scripts/make_corpus.py --out data/parquet

Needs npm for the emoji, apt-get and dpkg-deb for the rest, resvg-py for twemoji. It downloads about 300 MB and draws
for about a quarter of an hour, most of it 3D models. One parquet file a source; those already there are kept. Licences
and authors: DATA_NOTICES.md. Next: python scripts/prepare_data.py data/parquet/*.parquet --out data/corpus
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow
from pyarrow import parquet
from rich.console import Console
from rich.progress import track

from corpus.packages import SOURCES, build, fetch
from ldm.errors import Parser, UserError, nearest, script, whole


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/parquet"), help="folder for the parquet files")
    parser.add_argument("--packages", type=Path, help="folder for the unpacked packages (OUT/packages)")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), metavar="NAME", help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--workers", type=whole(1), default=os.cpu_count(), help="processes (all cores)")
    given = parser.parse_args()
    for name in given.sources:
        if name not in SOURCES:
            raise UserError(f"no source {name!r}{nearest(name, list(SOURCES))}: choose of {', '.join(SOURCES)}")
    packages = given.packages or given.out / "packages"
    for name in given.sources:
        path = given.out / f"{name}.parquet"
        if path.exists():
            print(f"{path} is there: kept")
            continue
        fetch(name, packages)
        rows = build(name, packages, given.workers)
        table = pyarrow.Table.from_pylist(list(track(rows, name, console=Console(stderr=True))))
        parquet.write_table(table, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        print(f"{path}: {table.num_rows} pictures")


if __name__ == "__main__":
    main()
