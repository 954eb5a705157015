"""Pictures and captions from anywhere -> shards for training.

The plan is made first: the ids of all sources, in the order of their hashes (so that every shard mixes the sources) or
as they lie, are split over shards. Then up to three passes, each over parts that are whole or not there: rows that are
slow to read out of order are copied, duplicates are found, shards are written with a `_stats.json` that says what each
holds and what was dropped. Stopped at any moment and run again, by any engine, it makes only what is missing, and the
same bytes.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ldm.data.stages import Dropped, Record, Stage, choosing, making, run, small, unreadable
from ldm.errors import UserError
from ldm.files import replacing, sha256, write_json

_FORMAT = 2  # of the shards: raised where the same plan comes to make other bytes
_WORK = "work"  # folder in `out` of what is needed until all shards are there


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
    picks: list[Pick]
    twice: Mapping[tuple[int, ...], tuple[str, str]] = field(default_factory=dict)


def prepare(paths: Sequence[str], config: PrepareConfig, show: Callable[[int, int], None]) -> dict[str, Any]:
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
    train, val = _picks(names, ids, config)
    jobs = _jobs(out, train, config.shard_size) + _jobs(out / "val", val, config.shard_size)
    with engine.writing_to(out):
        _claim(out, {out, *(job.path.parent for job in jobs)}, _plan(sources, ids, config))
        done = {job.path: stats for job in jobs if (stats := _finished(job.path))}
        if len(done) < len(jobs):
            _make(jobs, done, sources, config, show)
        for folder in {job.path.parent for job in jobs}:
            write_manifest(folder, [Entry(**done[job.path]["shard"]) for job in jobs if job.path.parent == folder])
        report = {
            "offered": {name: len(rows) for name, rows in zip(names, ids, strict=True)},
            **count([done[job.path] for job in jobs if job.path.parent == out], names, config.templates),
            "validation": count([done[job.path] for job in jobs if job.path.parent != out], names, config.templates),
        }
        write_json(out / "report.json", report)
        with replacing(out / "report.html") as temporary:
            temporary.write_text(page(report, out), "utf-8")
    if not report["samples"]:
        reasons = "; ".join(about["examples"][0] for about in report["refused"].values()) or "there are none"
        raise UserError(f"none of the {sum(map(len, ids))} pictures can be used: {reasons}")
    shutil.rmtree(out / _WORK, ignore_errors=True)
    return report


def _make(
    jobs: Sequence[Job],
    done: dict[Path, dict[str, Any]],
    sources: Sequence[Source],
    config: PrepareConfig,
    show: Callable[[int, int], None],
) -> None:
    """The three passes over what is missing; the finished shards' stats go to `done`."""
    work = Path(config.out) / _WORK
    readers = _readers(jobs, sources, config, work)
    pieces = [p for n, spool in enumerate(readers) if isinstance(spool, Spool) for p in spool.pieces(n)]
    picked = sum(len(job.picks) for job in jobs)
    prints = [work / f"prints-{n:06d}.npz" for n in range(len(jobs) if config.duplicates != "keep" else 0)]
    total = picked + sum(len(piece.rows) for piece in pieces) + picked * bool(prints)
    sizes = {piece.path: len(piece.rows) for piece in pieces}
    sizes |= {path: len(job.picks) for path, job in zip(prints, jobs, strict=False)}
    before = sum(size for path, size in sizes.items() if path.exists())
    before += sum(len(job.picks) for job in jobs if job.path in done)

    def go(task: Any, parts: Sequence[Any], most: int) -> Iterator[tuple[Any, Any]]:
        nonlocal before
        start, ticks = before, 0

        def tell(new: int) -> None:
            nonlocal ticks
            ticks = new
            show(start + new, total)

        yield from engine.run(config.engine, task, parts, most, tell)
        before = start + ticks

    show(before, total)
    most = config.workers if config.engine == "local" else 0
    for fetched in (False, True):
        missing = [p for p in pieces if sources[p.source].downloads is fetched and not p.path.exists()]
        collections.deque(go(Spooling(sources), missing, _fetchers(config) if fetched else most), 0)
    if prints:
        todo = [(path, job) for path, job in zip(prints, jobs, strict=True) if not path.exists()]
        collections.deque(go(Printing([s.name for s in sources], readers, config), todo, most), 0)
        jobs = _told_apart(jobs, prints, config)
    shards = Making([source.name for source in sources], readers, config)
    for job, stats in go(shards, [job for job in jobs if job.path not in done], most):
        done[job.path] = stats


def _fetchers(config: PrepareConfig) -> int:
    """The most parts that download at a time: each has its share of the connections to a host."""
    return config.per_host if config.engine == "ray" else min(config.workers, config.per_host)


def _picks(names: Sequence[str], ids: Sequence[Sequence[str]], config: PrepareConfig) -> tuple[list[Pick], list[Pick]]:
    """What to take for training and for validation; who is held out follows from a hash of source and id."""
    hashed: list[tuple[bytes, Pick]] = []
    for number, (name, rows) in enumerate(zip(names, ids, strict=True)):
        mine = [
            (hashlib.sha256(f"{name}/{id}".encode()).digest(), Pick(number, row, id)) for row, id in enumerate(rows)
        ]
        hashed += sorted(mine)[: config.limit_per_source]
    hashed.sort(key=(lambda pair: pair[1]) if config.order == "source" else None)
    held = [int.from_bytes(digest[-4:], "big") < config.holdout * 2**32 for digest, _ in hashed]
    train = [pick for (_, pick), out in zip(hashed, held, strict=True) if not out]
    return train, [pick for (_, pick), out in zip(hashed, held, strict=True) if out]


def _jobs(folder: Path, picks: list[Pick], size: int) -> list[Job]:
    starts = range(0, len(picks), size)
    return [Job(folder / f"{n:05d}.tar", n, picks[start : start + size]) for n, start in enumerate(starts)]


def _plan(sources: Sequence[Source], ids: Sequence[Sequence[str]], config: PrepareConfig) -> str:
    """A digest of everything that the shards depend on."""
    origins = [(source.name, source.stamp()) for source in sources]
    return hashlib.sha256(json.dumps([_FORMAT, config.outcome(), origins, ids]).encode()).hexdigest()


def _claim(out: Path, folders: set[Path], plan: str) -> None:
    """Make the folder ours. UserError where it holds shards of another plan."""
    path = out / "plan.json"
    known = json.loads(path.read_text()).get("plan") if path.is_file() else None
    if known != plan and (known or any(out.glob("*.tar"))):
        raise UserError(f"{str(out)!r} holds shards of other sources or options: give another --out, or remove it")
    for folder in (*folders, out / _WORK):
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.rglob("*.tmp"):
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


def _readers(jobs: Sequence[Job], sources: Sequence[Source], config: PrepareConfig, work: Path) -> list[Source | Spool]:
    """What to read each source from: a copy for downloads, and in a mixed order for what is slow to read out of order,
    all of which each job would read."""
    rows: dict[int, list[int]] = collections.defaultdict(list)
    for pick in itertools.chain.from_iterable(job.picks for job in jobs):
        rows[pick.source].append(pick.row)
    return [
        Spool(work / f"rows-{number}", np.sort(rows[number]))
        if rows[number] and (source.downloads or (config.order == "mixed" and not source.random))
        else source
        for number, source in enumerate(sources)
    ]


def _told_apart(jobs: Sequence[Job], prints: Sequence[Path], config: PrepareConfig) -> list[Job]:
    """The jobs with the duplicates among their picks, judged over all of them in source order."""
    loaded = []
    for path in prints:
        with np.load(path) as file:
            loaded.append({name: file[name] for name in file.files})
    places, digests, hashes, colours = (
        np.concatenate([part[name] for part in loaded]) for name in ("places", "digests", "hashes", "colours")
    )
    order = np.lexsort((places[:, 1], places[:, 0]))
    places, first = places[order], duplicates.same_bytes(digests[order])
    kinds = np.where(first == np.arange(len(first)), "", "same bytes").astype(object)
    if config.duplicates == "near":
        kept = np.flatnonzero(kinds == "")
        similar = kept[duplicates.alike(hashes[order][kept], colours[order][kept], config.near_distance)]
        first[kept] = similar
        kinds[kept[similar != kept]] = "looks alike"
    known = {pick[:2]: pick.id for job in jobs for pick in job.picks}
    twice = {
        tuple(places[i].tolist()): (kinds[i], known[tuple(places[first[i]].tolist())])
        for i in np.flatnonzero(kinds != "").tolist()
    }
    return [
        dataclasses.replace(job, twice={pick[:2]: twice[pick[:2]] for pick in job.picks if pick[:2] in twice})
        for job in jobs
    ]


@dataclass(frozen=True)
class Printing:
    """The work of taking the prints of those pictures of a job that are not dropped for another reason."""

    names: Sequence[str]
    readers: Sequence[Source | Spool]
    config: PrepareConfig

    def __call__(self, part: tuple[Path, Job], tick: Tick) -> None:
        path, job = part
        stages = choosing(self.config, self.names)
        places, digests, looks = [], [], []
        for record, dropped in _records(job, self.names, self.readers, stages, collections.Counter(), tick):
            if dropped:
                continue
            try:
                near = self.config.duplicates == "near"
                looks.append(duplicates.look(small(record, self.config, duplicates.SIDE)) if near else (0, bytes(12)))
            except Dropped:
                continue
            places.append(record.place)
            digests.append(duplicates.digest(record.data))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                places=np.array(places, np.int64).reshape(-1, 2),
                digests=np.array(digests, "S32"),
                hashes=np.array([hash for hash, _ in looks], np.uint64),
                colours=np.frombuffer(b"".join(colours for _, colours in looks), np.uint8).reshape(-1, 12),
            )


@dataclass(frozen=True)
class Making:
    """The work of writing one shard and what is known of it; it returns the latter."""

    names: Sequence[str]
    readers: Sequence[Source | Spool]
    config: PrepareConfig

    def __call__(self, job: Job, tick: Tick) -> dict[str, Any]:
        once = {"duplicates": _once(job)} if self.config.duplicates != "keep" else {}
        stages = {**choosing(self.config, self.names), **once, **making(self.config)}
        kept: dict[tuple[int, int], Record] = {}
        refused: list[tuple[str, str, str]] = []
        seen: collections.Counter[str] = collections.Counter()
        for record, dropped in _records(job, self.names, self.readers, stages, seen, tick):
            if dropped:
                refused.append((f"{record.source}: {record.id}", dropped.reason, str(dropped)))
            else:
                kept[record.place] = record._replace(image=None)  # the pixels are encoded
        records = [kept[pick[:2]] for pick in job.picks if pick[:2] in kept]
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


def _once(job: Job) -> Stage:
    def once(record: Record) -> Record:
        if record.place in job.twice:
            kind, other = job.twice[record.place]
            raise Dropped(f"duplicate, {kind}", f"as {other}")
        return record

    return once


def _records(
    job: Job,
    names: Sequence[str],
    readers: Sequence[Source | Spool],
    stages: Mapping[str, Stage],
    seen: collections.Counter[str],
    tick: Tick,
) -> Iterator[tuple[Record, Dropped | None]]:
    """The records of a job after the stages, or where they were dropped: by source, in rising order, as is fastest."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is our own
    for number, mine in itertools.groupby(sorted(job.picks), key=lambda pick: pick.source):
        chosen = list(mine)
        raws: Iterable[Raw | UserError] = readers[number].read([pick.row for pick in chosen])
        for pick, raw in zip(chosen, raws, strict=True):
            tick()
            seen["read"] += 1
            place = (pick.source, pick.row)
            if isinstance(raw, UserError):
                yield Record(names[number], pick.id, b"", {}, place), unreadable(raw)
            else:
                yield run(stages, Record(names[number], pick.id, raw.image, raw.columns, place), seen)


def _members(job: Job, records: Sequence[Record]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index, record in enumerate(records):
        key = f"{job.number:05d}{index:04d}"
        columns = {name: value for name, value in record.columns.items() if name != "bucket"}  # of an earlier one
        about = {"id": record.id, "source": record.source, **columns, "captions": record.captions, **record.sizes}
        about |= {"bucket": record.bucket, "key": key} if record.bucket else {"key": key}
        text = json.dumps(about, ensure_ascii=False).encode()
        yield key, {record.suffix: record.data, "txt": record.captions[0].encode(), "json": text}
