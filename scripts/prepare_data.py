"""Turn pictures with captions into shards for training.

A source is a folder of images (captions in `metadata.jsonl` or `metadata.csv`, or in a .txt beside each), a .parquet
file or a folder of them, a .jsonl or .csv list of paths or URLs, or shards; also under s3://, gs:// or hf://. Run the
same command again to go on after a stop. docs/data.md tells every stage; OUT/report.html shows what came of it.

    python scripts/prepare_data.py photos/ more.parquet --out data/mine --size 128 --holdout 0.02
    python scripts/prepare_data.py laion.parquet --out data/laion --size 512 --resize buckets --duplicates near

configs/embedded/make.sh shows more: captions from templates, pictures chosen by caption, limits for each source.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from ldm.data.options import add_flags, from_flags
from ldm.data.prepare import prepare
from ldm.data.report import lines
from ldm.errors import Parser, script


class Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f}/s")


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder, parquet, list of paths or URLs, shards")
    add_flags(parser)
    given = vars(parser.parse_args())
    sources, config = given.pop("sources"), from_flags({"workers": os.cpu_count(), **given})
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
    print(*lines(report), f"report: {Path(config.out) / 'report.html'}", sep="\n")


if __name__ == "__main__":
    main()
