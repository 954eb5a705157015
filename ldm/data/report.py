"""What a preparation kept and dropped, as data and as lines to print."""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ldm.data.stages import Record

_EXAMPLES = 5  # ids named for each reason
_BATCHES = (16, 64, 256)  # batch sizes for which leftovers are told


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
    given = [*sums["seen"].values(), sums["kept"].total()]
    return {
        "samples": sums["kept"].total(),
        "shards": len(shards),
        "kept": {name: sums["kept"][name] for name in sources},
        "stages": {
            name: {"seen": seen, "dropped": seen - passed}
            for (name, seen), passed in zip(sums["seen"].items(), given[1:], strict=True)
        },
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
