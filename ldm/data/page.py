"""The report of a preparation as one HTML file that needs no other: tables, histograms, and pictures to look at."""

import base64
import bisect
import html
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.images import decode
from ldm.data.report import leftovers
from ldm.data.shards import Shards

_SHEET = 60  # pictures on the contact sheet
_SIDE = 112  # pixels of them
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,td.text{text-align:left}
.plots{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}figcaption{font-size:.85em;color:#555}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,1fr));gap:.7em}
.sheet figcaption{font-size:.72em;line-height:1.25;overflow-wrap:anywhere}
.sheet img{max-width:100%;border:1px solid #eee}"""


def page(report: Mapping[str, Any], out: Path) -> str:
    """The page of the shards in `out`."""
    held = report["validation"]
    parts = [f"<h1>{report['samples']} + {held['samples']} samples</h1>"]
    parts.append(f"<p>{report['shards']} shards for training and {held['shards']} held back for validation.</p>")
    sources = [(n, o, report["kept"][n], held["kept"][n]) for n, o in report["offered"].items()]
    parts += ["<h2>Sources</h2>", _table(("source", "offered", "training", "held back"), sources)]
    both = (report, held)
    stages = {name: None for part in both for name in part["stages"]}
    steps = [
        (name, *(sum(part["stages"].get(name, {}).get(what, 0) for part in both) for what in ("seen", "dropped")))
        for name in stages
    ]
    parts += ["<h2>Stages</h2>", _table(("stage", "given", "dropped"), steps)]
    reasons = [(r, a["count"], "; ".join(a["examples"][:3])) for part in both for r, a in part["refused"].items()]
    if reasons:
        parts += ["<h2>Dropped</h2>", _table(("reason", "pictures", "such as"), reasons)]
    for title, name in (("Changed", "changes"), ("Captions by template", "templates")):
        rows = [(what, n) for what, n in report[name].items()]
        if rows:
            parts += [f"<h2>{title}</h2>", _table(("", "training"), rows)]
    measures = report["measures"]
    if "bucket" in measures:
        left = leftovers(measures["bucket"])
        parts.append("<h2>Buckets</h2><p>Samples of an epoch that fill no whole batch of one bucket.</p>")
        parts.append(_table(("batch size", "left over"), list(left.items())))
    parts.append("<h2>Training samples</h2><p>Bars bear their lower edge; those without pictures are left out.</p>")
    parts.append("<div class=plots>")
    parts += [_histogram(name, bins) for name, bins in measures.items()]
    parts += ["</div>", "<h2>A look</h2><div class=sheet>", *_sheet(out, report["samples"]), "</div>"]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Prepared pictures</title><style>{_STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return f"<td{'' if isinstance(value, int) else ' class=text'}>{html.escape(str(value))}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _histogram(title: str, bins: Mapping[str, int]) -> str:
    """Bars as an inline SVG, the label of a bin (its lower edge) under every bar that has the room."""
    bar, height, most = max(6, min(28, 420 // len(bins))), 110, max(bins.values())
    every = -(-(9 * max(map(len, bins))) // bar)
    shapes = []
    for n, (edge, number) in enumerate(bins.items()):
        tall = height * number / most
        shapes.append(
            f'<rect x="{n * bar}" y="{height - tall:.1f}" width="{bar - 2}" height="{tall:.1f}" fill="#4878a8">'
            f"<title>{html.escape(edge)}: {number}</title></rect>"
        )
        if n % every == 0:
            shapes.append(f'<text x="{n * bar}" y="{height + 14}" font-size="11">{html.escape(edge)}</text>')
    width = len(bins) * bar + 40
    svg = f'<svg width="{width}" height="{height + 20}" xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
    return f"<figure>{svg}<figcaption>{html.escape(title)} (most: {most})</figcaption></figure>"


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
        data = io.BytesIO()
        image.save(data, "WEBP", quality=80)
        source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        text = html.escape(about["captions"][0][:120])
        size = f"{about['original_width']} x {about['original_height']}"
        title = html.escape(f"{about['source']}: {about['id']}, {size} as found", quote=True)
        yield f'<figure><img src="{source}" title="{title}" alt=""><figcaption>{text}</figcaption></figure>'
