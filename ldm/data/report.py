"""What a preparation kept and refused, as data and as lines to print."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_EXAMPLES = 5  # ids named for each reason


def count(shards: Sequence[Mapping[str, Any]], sources: Sequence[str], templates: Sequence[str]) -> dict[str, Any]:
    """Sum up what is known of each shard: samples kept by source, refused by reason, captions made by template."""
    kept: collections.Counter[str] = collections.Counter()
    used: collections.Counter[str] = collections.Counter()
    refused: dict[str, dict[str, Any]] = {}
    for stats in shards:
        kept.update(stats["kept"])
        used.update(stats["templates"])
        for id, text in stats["refused"]:
            reason = refused.setdefault(text.partition(":")[0], {"count": 0, "examples": []})
            reason["count"] += 1
            if len(reason["examples"]) < _EXAMPLES:
                reason["examples"].append(f"{id}: {text}")
    return {
        "samples": sum(kept.values()),
        "shards": len(shards),
        "kept": {name: kept[name] for name in sources},
        "refused": refused,
        "templates": {text: used[text] for text in templates},
    }


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report of `prepare` for a person: a table of the sources, what was refused, templates that did nothing."""
    held = report["validation"]
    width = max(map(len, ("source", *report["offered"])))
    yield f"{'source':{width}} {'offered':>9} {'training':>9} {'held back':>9}"
    for name, offered in report["offered"].items():
        yield f"{name:{width}} {offered:9} {report['kept'][name]:9} {held['kept'][name]:9}"
    for part in (report, held):
        for reason, about in part["refused"].items():
            yield f"refused {about['count']}: {reason}, such as {about['examples'][0]}"
    for text, used in report["templates"].items():
        if not used + held["templates"][text]:
            yield f"template {text!r} made no caption: are its columns there?"
    yield f"{report['samples']} + {held['samples']} samples in {report['shards']} + {held['shards']} shards"
