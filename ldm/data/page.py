"""The report of a preparation as one HTML file that needs no other: tables, histograms, and pictures to look at."""

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import html
from ldm.data.images import decode
from ldm.data.report import leftovers
from ldm.data.shards import Shards

_SHEET = 60  # pictures on the contact sheet
_SIDE = 112  # pixels of them


def page(report: Mapping[str, Any], out: Path) -> str:
    """The page of the shards in `out`."""
    held = report["validation"]
    both, measures = (report, held), report["measures"]
    sources = [(n, o, report["kept"][n], held["kept"][n]) for n, o in report["offered"].items()]
    steps = [
        (name, *(sum(part["stages"].get(name, {}).get(what, 0) for part in both) for what in ("seen", "dropped")))
        for name in {name: None for part in both for name in part["stages"]}
    ]
    reasons = [(r, a["count"], "; ".join(a["examples"][:3])) for part in both for r, a in part["refused"].items()]
    left = leftovers(measures["bucket"]) if "bucket" in measures else {}
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = [
        ("Sources", ("source", "offered", "training", "held back"), sources),
        ("Stages", ("stage", "given", "dropped"), steps),
        ("Dropped", ("reason", "pictures", "such as"), reasons),
        ("Changed", ("", "training"), list(report["changes"].items())),
        ("Captions by template", ("", "training"), list(report["templates"].items())),
        ("Samples of an epoch that fill no whole batch of one bucket", ("batch size", "left over"), list(left.items())),
    ]
    title = f"{report['samples']} + {held['samples']} samples"
    shards = f"{report['shards']} shards for training and {held['shards']} held back for validation."
    parts = [html.heading(title, 1), html.paragraph(shards)]
    parts += [html.heading(name) + html.table(head, rows) for name, head, rows in tables if rows]
    parts.append("<h2>Training samples</h2><p>Bars bear their lower edge; those without pictures are left out.</p>")
    parts.append(f"<div class=plots>{''.join(_histogram(name, bins) for name, bins in measures.items())}</div>")
    return html.page(title, [*parts, html.heading("A look"), html.grid(_sheet(out, report["samples"]))])


def _histogram(title: str, bins: Mapping[str, int]) -> str:
    """Bars as an inline SVG, the label of a bin (its lower edge) under every bar that has the room."""
    bar, height, most = max(6, min(28, 420 // len(bins))), 110, max(bins.values())
    every = -(-(9 * max(map(len, bins))) // bar)
    shapes = []
    for n, (edge, number) in enumerate(bins.items()):
        tall = height * number / most
        shapes.append(
            f'<rect x="{n * bar}" y="{height - tall:.1f}" width="{bar - 2}" height="{tall:.1f}" fill="#4878a8">'
            f"<title>{edge}: {number}</title></rect>"
        )
        if n % every == 0:
            shapes.append(f'<text x="{n * bar}" y="{height + 14}" font-size="11">{edge}</text>')
    width = len(bins) * bar + 40
    svg = f'<svg width="{width}" height="{height + 20}" xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
    return f"<figure>{svg}<figcaption>{title} (most: {most})</figcaption></figure>"


def _sheet(out: Path, samples: int) -> Iterable[str]:
    """Pictures evenly spaced over the shards, with their first caption."""
    if not samples:
        return
    shards = Shards(str(out))
    number, ends = min(_SHEET, samples), list(itertools.accumulate(shards.counts))
    for row in (n * samples // number for n in range(number)):
        shard = bisect.bisect_right(ends, row)
        index = row - ends[shard] + shards.counts[shard]
        image, about = decode(shards.image(shard, index)), shards.describe(shard, index)
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        size = f"{about['original_width']} x {about['original_height']}"
        title = f"{about['source']}: {about['id']}, {size} as found"
        yield html.figure(image, about["captions"][0][:120], title=title)
