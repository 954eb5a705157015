"""Pictures and captions from anywhere -> shards for training.

The plan is made first: the ids of all sources, in the order of their hashes (so that every shard mixes the sources) or
as they lie, are split over shards. Then up to three passes, each over parts that are whole or not there: rows that are
slow to read out of order are copied, duplicates are found, shards are written, each with a `_stats.json` of what it
holds and what was dropped. Stopped and run again, by any engine, it makes what is missing, and the same bytes.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data import duplicates, engine
from ldm.data.engine import Tick
from ldm.data.fetch import Downloads
from ldm.data.options import PrepareConfig, check, check_names
from ldm.data.report import count, measure, page
from ldm.data.shards import Entry, write_manifest, write_shard
from ldm.data.sources import Raw, Source, open_sources
from ldm.data.spool import Spool, Spooling
from ldm.data.stages import Dropped, Record, Stage, choosing, decoded, making, run
from ldm.errors import UserError
from ldm.files import replacing, sha256, write_json

_FORMAT = 2  # of the shards: raised where the same plan comes to make other bytes
_WORK = "work"  # folder in `out` of what is needed until all shards are there
Show = Callable[[int, int], None]


class Pick(NamedTuple):
    """A row of a source."""

    source: int
    row: int
    id: str


@dataclass(frozen=True)
class Job:
    """One shard to write, and the rows it is made of, in order. twice: duplicates, and what each is one of."""

    path: Path
    number: int
    rows: list[Pick]
    twice: Mapping[tuple[int, ...], tuple[str, str]] = field(default_factory=dict)


def prepare(paths: Sequence[str], config: PrepareConfig, show: Show) -> dict[str, Any]:
    """Write the shards and return the report. `show(done, total)` is called now and then with numbers of samples read.

    UserError for sources or options that cannot work, for an `out` that holds another preparation or cannot be written.
    """
    check(config)
    per_process = config.per_host // max(_fetchers(config), 1)
    limits = Downloads(config.timeout, config.retries, config.max_bytes, per_process, config.copies, config.copies_gb)
    sources = open_sources(paths, limits)
    names = [source.name for source in sources]
    check_names(config, names)
    ids = [source.ids() for source in sources]
    out = Path(config.out)
    parts = {out: list[Job](), out / "val": list[Job]()}  # for training, and held back
    for (folder, jobs), picks in zip(parts.items(), _picks(names, ids, config), strict=True):
        starts = enumerate(range(0, len(picks), config.shard_size))
        jobs += [Job(folder / f"{n:05d}.tar", n, picks[start : start + config.shard_size]) for n, start in starts]
    with engine.writing_to(out):
        _claim(out, _plan(sources, ids, config))
        jobs = [job for part in parts.values() for job in part]
        done = {job.path: stats for job in jobs if (stats := _finished(job.path))}
        if len(done) < len(jobs):
            _make(jobs, done, sources, config, show)
        for folder, part in parts.items():
            if part:
                write_manifest(folder, [Entry(**done[job.path]["shard"]) for job in part])
        train, held = (count([done[job.path] for job in part], names, config.templates) for part in parts.values())
        offered = {name: len(rows) for name, rows in zip(names, ids, strict=True)}
        report = {"offered": offered, **train, "validation": held}
        write_json(out / "report.json", report)
        with replacing(out / "report.html") as temporary:
            temporary.write_text(page(report, out), "utf-8")
    if not report["samples"]:
        reasons = "; ".join(about["examples"][0] for about in report["refused"].values()) or "there are none"
        raise UserError(f"none of the {sum(map(len, ids))} pictures can be used: {reasons}")
    shutil.rmtree(out / _WORK, ignore_errors=True)
    return report


def _make(
    jobs: Sequence[Job], done: dict[Path, dict[str, Any]], sources: Sequence[Source], config: PrepareConfig, show: Show
) -> None:
    """The three passes over what is missing; the finished shards' stats go to `done`."""
    making = Making([source.name for source in sources], _readers(jobs, sources, config), config)
    spools = [reader for reader in making.readers if isinstance(reader, Spool)]
    copies: dict[Path, Any] = {piece.path: piece for spool in spools for piece in spool.pieces()}
    prints: dict[Path, Any] = {making.prints(job): job for job in (jobs if config.duplicates != "keep" else ())}
    total = sum(len(part.rows) for part in (*copies.values(), *prints.values(), *jobs))
    before = sum(len(part.rows) for path, part in (copies | prints).items() if path.exists())
    before += sum(len(job.rows) for job in jobs if job.path in done)

    def go(task: engine.Work[Any, Any], parts: Sequence[Any], most: int) -> Iterator[tuple[Any, Any]]:
        nonlocal before
        start, before = before, before + sum(len(part.rows) for part in parts)
        return engine.run(config.engine, task, parts, most, lambda new: show(start + new, total))

    show(before, total)
    most = config.workers if config.engine == "local" else 0
    for fetched in (False, True):
        here = [p for path, p in copies.items() if sources[p.source].downloads is fetched and not path.exists()]
        collections.deque(go(Spooling(sources), here, _fetchers(config) if fetched else most), 0)
    if prints:
        collections.deque(go(making.print, [job for path, job in prints.items() if not path.exists()], most), 0)
        jobs = _told_apart(jobs, prints, config)
    for job, stats in go(making, [job for job in jobs if job.path not in done], most):
        done[job.path] = stats


def _fetchers(config: PrepareConfig) -> int:
    """The most parts that download at a time: each has its share of the connections to a host."""
    return config.per_host if config.engine == "ray" else min(config.workers, config.per_host)


def _picks(names: Sequence[str], ids: Sequence[Sequence[str]], config: PrepareConfig) -> tuple[list[Pick], list[Pick]]:
    """What to take for training and for validation; who is held out follows from a hash of source and id."""
    hashed: list[tuple[bytes, Pick]] = []
    for number, (name, rows) in enumerate(zip(names, ids, strict=True)):
        mine = ((hashlib.sha256(f"{name}/{id}".encode()).digest(), Pick(number, n, id)) for n, id in enumerate(rows))
        hashed += sorted(mine)[: config.limit_per_source]
    hashed.sort(key=(lambda pair: pair[1]) if config.order == "source" else None)
    parts: tuple[list[Pick], list[Pick]] = [], []
    for digest, pick in hashed:
        parts[int.from_bytes(digest[-4:], "big") < config.holdout * 2**32].append(pick)
    return parts


def _plan(sources: Sequence[Source], ids: Sequence[Sequence[str]], config: PrepareConfig) -> str:
    """A digest of everything that the shards depend on."""
    origins = [(source.name, source.stamp()) for source in sources]
    return hashlib.sha256(json.dumps([_FORMAT, config.outcome(), origins, ids]).encode()).hexdigest()


def _claim(out: Path, plan: str) -> None:
    """Make the folder ours. UserError where it holds shards of another plan."""
    path = out / "plan.json"
    known = json.loads(path.read_text()).get("plan") if path.is_file() else None
    if known != plan and (known or any(out.glob("*.tar"))):
        raise UserError(f"{str(out)!r} holds shards of other sources or options: give another --out, or remove it")
    for half in out.rglob("*.tmp"):
        half.unlink()
    write_json(path, {"plan": plan})


def _stats_path(shard: Path) -> Path:
    return shard.with_name(shard.stem + "_stats.json")  # the name img2dataset gives it


def _finished(shard: Path) -> dict[str, Any] | None:
    """What a finished shard holds; None where it is missing or not what was written."""
    stats = _stats_path(shard)
    if not (stats.is_file() and shard.is_file()):
        return None
    known: dict[str, Any] = json.loads(stats.read_text())
    index, entry = shard.with_suffix(".idx"), known["shard"]
    sound = index.is_file() and sha256(index) == entry["index"] and sha256(shard) == entry["sha256"]
    return known if sound else None


def _readers(jobs: Sequence[Job], sources: Sequence[Source], config: PrepareConfig) -> list[Source | Spool]:
    """What to read each source from: a copy for downloads, and in a mixed order for what is slow to read out of order,
    all of which each job would read."""
    rows: dict[int, list[int]] = collections.defaultdict(list)
    for pick in itertools.chain.from_iterable(job.rows for job in jobs):
        rows[pick.source].append(pick.row)
    return [
        Spool(number, Path(config.out, _WORK, f"rows-{number}"), np.sort(rows[number]))
        if rows[number] and (source.downloads or (config.order == "mixed" and not source.random))
        else source
        for number, source in enumerate(sources)
    ]


def _told_apart(jobs: Sequence[Job], paths: Iterable[Path], config: PrepareConfig) -> list[Job]:
    """The jobs with the duplicates among their rows, judged over all of them in source order."""
    prints = np.concatenate([np.load(path) for path in paths])
    prints = prints[np.lexsort((prints["row"], prints["source"]))]
    places = [*zip(prints["source"].tolist(), prints["row"].tolist(), strict=True)]
    first, kinds = duplicates.judged(prints, config.near_distance if config.duplicates == "near" else None)
    ids = {pick[:2]: pick.id for job in jobs for pick in job.rows}
    twice = {places[i]: (kinds[i], ids[places[first[i]]]) for i in np.flatnonzero(kinds != "").tolist()}
    return [
        dataclasses.replace(job, twice={pick[:2]: twice[pick[:2]] for pick in job.rows if pick[:2] in twice})
        for job in jobs
    ]


@dataclass(frozen=True)
class Making:
    """The work of writing one shard and what is known of it; it returns the latter."""

    names: Sequence[str]
    readers: Sequence[Source | Spool]
    config: PrepareConfig

    def __call__(self, job: Job, tick: Tick) -> dict[str, Any]:
        def once(record: Record) -> Record:
            if record.place in job.twice:
                kind, other = job.twice[record.place]
                raise Dropped(f"duplicate, {kind}: as {other}")
            return record

        apart: dict[str, Stage] = {"duplicates": once} if self.config.duplicates != "keep" else {}
        stages = {**choosing(self.config, self.names), **apart, **making(self.config)}
        kept: dict[tuple[int, int], Record] = {}
        refused: list[tuple[str, str, str]] = []
        seen: collections.Counter[str] = collections.Counter()
        for record, dropped in self._records(job, stages, seen, tick):
            if dropped:
                refused.append((f"{record.source}: {record.id}", dropped.reason, str(dropped)))
            else:
                kept[record.place] = record._replace(image=None)  # the pixels are encoded
        records = [kept[pick[:2]] for pick in job.rows if pick[:2] in kept]
        rank = {f"{w}x{h}": number for number, (w, h) in enumerate(self.config.buckets())}
        records.sort(key=lambda record: rank.get(record.bucket, 0))
        buckets = dict(collections.Counter(record.bucket for record in records if record.bucket))
        entry = dataclasses.replace(write_shard(job.path, _members(job, records)), buckets=buckets)
        stats = {
            "shard": dataclasses.asdict(entry),
            "kept": collections.Counter(record.source for record in records),
            "seen": seen,
            "refused": sorted(refused),
            "changes": collections.Counter(itertools.chain.from_iterable(record.notes for record in records)),
            "templates": collections.Counter(itertools.chain.from_iterable(record.made_by for record in records)),
            "measures": measure(records),
        }
        write_json(_stats_path(job.path), stats)
        return stats

    def prints(self, job: Job) -> Path:
        """Where the prints of a job lie."""
        return Path(self.config.out, _WORK, job.path.relative_to(self.config.out)).with_suffix(".npy")

    def print(self, job: Job, tick: Tick) -> None:
        """Take the prints of those pictures of a job that are not dropped for another reason."""
        near, side = self.config.duplicates == "near", (duplicates.SIDE, duplicates.SIDE)
        prints, unseen = [], (0, [0] * 12)
        for record, dropped in self._records(job, choosing(self.config, self.names), collections.Counter(), tick):
            with suppress(Dropped):
                if not dropped:
                    look = duplicates.look(decoded(record, self.config, side)) if near else unseen
                    prints.append((*record.place, hashlib.sha256(record.data).digest(), *look))
        with replacing(self.prints(job)) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(prints, duplicates.PRINT))

    def _records(
        self, job: Job, stages: Mapping[str, Stage], seen: collections.Counter[str], tick: Tick
    ) -> Iterator[tuple[Record, Dropped | None]]:
        """The records after the stages, or where they were dropped: by source, in rising order, as is fastest."""
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is our own
        for number, mine in itertools.groupby(sorted(job.rows), key=lambda pick: pick.source):
            chosen, name = list(mine), self.names[number]
            raws: Iterable[Raw | UserError] = self.readers[number].read([pick.row for pick in chosen])
            for pick, raw in zip(chosen, raws, strict=True):
                tick()
                seen["read"] += 1
                if isinstance(raw, UserError):
                    yield Record(name, pick.id, b"", {}, (number, pick.row)), Dropped(str(raw))
                else:
                    yield run(stages, Record(name, pick.id, raw.image, raw.columns, (number, pick.row)), seen)


def _members(job: Job, records: Sequence[Record]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index, record in enumerate(records):
        key = f"{job.number:05d}{index:04d}"
        columns = {name: value for name, value in record.columns.items() if name != "bucket"}  # of an earlier one
        about = {"id": record.id, "source": record.source, **columns, "captions": record.captions, **record.sizes}
        about |= {"bucket": record.bucket, "key": key} if record.bucket else {"key": key}
        text = json.dumps(about, ensure_ascii=False).encode()
        yield key, {record.suffix: record.data, "txt": record.captions[0].encode(), "json": text}
