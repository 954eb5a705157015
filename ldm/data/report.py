"""What a preparation kept and dropped, as data, as lines to print, and as one HTML file that needs no other."""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm import html
from ldm.data.images import decode
from ldm.data.order import locate
from ldm.data.shards import Shards
from ldm.data.stages import Record

_EXAMPLES = 5  # ids named for each reason
_BATCHES = (16, 64, 256)  # batch sizes for which leftovers are told
_SHEET = 60  # pictures on the contact sheet
_SIDE = 112  # pixels of them


def measure(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Histograms of what is kept: name -> lower edge of a bin -> count."""
    bins: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record in records:
        width, height = record.sizes["original_width"], record.sizes["original_height"]
        bins["shorter side as found, pixels"][f"{_power(min(width, height))}"] += 1
        bins["width / height as found"][f"{math.floor(4 * width / height) / 4:g}"] += 1
        bins["kilobytes as written"][f"{_power(len(record.data)) / 1024:.2g}"] += 1
        bins["captions of a picture"][f"{len(record.captions)}"] += 1
        for text in record.captions:
            bins["characters of a caption"][f"{len(text) // 10 * 10}"] += 1
        if record.bucket:
            bins["bucket"][record.bucket] += 1
    return {name: dict(found) for name, found in bins.items()}


def _power(value: int) -> int:
    """The nearest half power of two that is not above a value."""
    return round(2 ** (math.floor(2 * math.log2(value) + 1e-9) / 2))


def count(shards: Sequence[Mapping[str, Any]], sources: Sequence[str], templates: Sequence[str]) -> dict[str, Any]:
    """Sum up what is known of each shard: samples by source, stages, drops by reason, changes, templates, measures."""
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    refused: dict[str, dict[str, Any]] = {}
    measures: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for stats in shards:
        for name in ("kept", "seen", "changes", "templates"):
            sums[name].update(stats[name])
        for name, bins in stats["measures"].items():
            measures[name].update(bins)
        for id, reason, text in stats["refused"]:
            known = refused.setdefault(reason, {"count": 0, "examples": []})
            known["count"] += 1
            if len(known["examples"]) < _EXAMPLES:
                known["examples"].append(f"{id}: {text}")
    total, seen = sums["kept"].total(), sums["seen"]
    passed = zip(seen, seen.values(), [*seen.values(), total][1:], strict=True)
    return {
        "samples": total,
        "shards": len(shards),
        "kept": {name: sums["kept"][name] for name in sources},
        "stages": {name: {"seen": given, "dropped": given - left} for name, given, left in passed},
        "refused": dict(sorted(refused.items(), key=lambda item: (-item[1]["count"], item[0]))),
        "changes": dict(sorted(sums["changes"].items())),
        "templates": {text: sums["templates"][text] for text in templates},
        "measures": {name: dict(sorted(found.items(), key=_edge)) for name, found in measures.items()},
    }


def _edge(bin: tuple[str, int]) -> float:
    width, cross, height = bin[0].partition("x")
    return float(width) / float(height) if cross else float(width)


def leftovers(buckets: Mapping[str, int]) -> dict[int, int]:
    """Batch size -> samples of an epoch that fill no whole batch of their bucket."""
    return {size: sum(number % size for number in buckets.values()) for size in _BATCHES}


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report of `prepare` for a person: a table of the sources, what was dropped, templates that did nothing."""
    held = report["validation"]
    width = max(map(len, ("source", *report["offered"])))
    yield f"{'source':{width}} {'offered':>9} {'training':>9} {'held back':>9}"
    for name, offered in report["offered"].items():
        yield f"{name:{width}} {offered:9} {report['kept'][name]:9} {held['kept'][name]:9}"
    for part in (report, held):
        for reason, about in part["refused"].items():
            yield f"dropped {about['count']}: {reason}, such as {about['examples'][0]}"
    for text, used in report["templates"].items():
        if not used + held["templates"][text]:
            yield f"template {text!r} made no caption: are its columns there?"
    if buckets := report["measures"].get("bucket"):
        left = ", ".join(f"{number} at a batch of {size}" for size, number in leftovers(buckets).items())
        yield f"{len(buckets)} buckets; samples of an epoch that fill no whole batch of one bucket: {left}"
    yield f"{report['samples']} + {held['samples']} samples in {report['shards']} + {held['shards']} shards"


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
    shards, number = Shards(str(out)), min(_SHEET, samples)
    for shard, index in zip(*locate(shards.ends, np.arange(number) * samples // number), strict=True):
        sample = shards.sample(int(shard), int(index))
        image, about = decode(sample.image), sample.about()
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        size = f"{about['original_width']} x {about['original_height']}"
        title = f"{about['source']}: {about['id']}, {size} as found"
        yield html.figure(image, about["captions"][0][:120], title=title)
