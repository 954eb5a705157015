"""Turn pictures with captions into shards for training.

A source is a folder of images (captions in `metadata.jsonl` or `metadata.csv`, or in a .txt beside each), a .parquet
file with an image column and caption columns, or shards. Run the same command again to go on after a stop.

    python scripts/prepare_data.py photos/ more.parquet --out data/mine --size 128 --holdout 0.02

configs/embedded/make.sh shows more: captions from templates, pictures chosen by caption, limits for each source.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from ldm.data.prepare import PrepareConfig, per_source, prepare
from ldm.data.report import lines
from ldm.errors import Parser, script


class Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f}/s")


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, .parquet file or shards")
    parser.add_argument("--out", required=True, help="folder for the shards, manifest.json and report.json")
    parser.add_argument("--size", type=int, default=128, help="pixels of the shorter side (128)")
    parser.add_argument("--format", choices=("webp", "jpg", "png"), help="write this (keep bytes that fit, else webp)")
    parser.add_argument("--quality", type=int, default=90, help="of webp and jpg (90)")
    parser.add_argument("--shard-size", type=int, default=2000, help="samples in a shard (2000)")
    parser.add_argument("--holdout", type=float, default=0.0, help="share kept for validation in OUT/val (0)")
    parser.add_argument("--caption-template", action="append", default=[], metavar="[SOURCE:]TEXT",
                        help='a caption made of columns, such as "a {colour} {name}"; may be repeated')  # fmt: skip
    parser.add_argument("--max-captions", action="append", default=[], metavar="[SOURCE:]N",
                        help="keep the first N captions of a picture, beside those from templates")  # fmt: skip
    parser.add_argument("--match", default="", help="keep pictures with a caption that has this regular expression")
    parser.add_argument("--limit-per-source", type=int, metavar="N", help="at most N pictures of each source")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    given = vars(parser.parse_args())
    sources, templates, most = given.pop("sources"), given.pop("caption_template"), given.pop("max_captions")
    config = PrepareConfig(**given, templates=tuple(templates), max_captions=per_source(most))
    bar = Progress(BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), console=Console(stderr=True))

    def show(done: int, total: int) -> None:  # the first call says what an earlier run has done
        if not bar.tasks:
            bar.add_task("", total=total, completed=done)
            bar.start()
        bar.update(bar.tasks[0].id, completed=done)

    try:
        report = prepare(sources, config, show)
    finally:
        if bar.tasks:
            bar.stop()
    print(*lines(report), f"report: {Path(config.out) / 'report.json'}", sep="\n")


if __name__ == "__main__":
    main()
