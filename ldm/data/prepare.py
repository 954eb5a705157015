"""Pictures and captions from anywhere -> shards for training.

The samples of all sources are put in the order of a hash of their ids, so that every shard mixes the sources and the
outcome does not depend on the number of processes. Each shard is one job: whole or not there, with a `_stats.json`
that says what it holds and what was refused, so that a second run makes only what is missing.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from ldm.data.captions import own_captions, read_templates
from ldm.data.images import FORMATS, decode, has_alpha
from ldm.data.report import count
from ldm.data.shards import Entry, write_manifest, write_shard
from ldm.data.sources import Raw, Source, open_sources
from ldm.errors import UserError, nearest
from ldm.files import sha256, write_json

MAX_ASPECT = 4.0
_SUFFIX = {"WEBP": "webp", "JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True)
class PrepareConfig:
    """What to make of the sources.

    size: pixels of the shorter side; format: of the written images, None keeps a picture's bytes where it has the size
    already and else writes WebP; quality: of WebP and JPEG; shard_size: samples in a shard; holdout: share kept
    for validation in `out/val`; templates: captions made of columns; limits: most pictures of a source, by name, "" for
    all; max_captions: most own captions of a picture, by source; match: a regular expression that one of a picture's
    captions must contain; workers: processes, 0 for this one.
    """

    out: str
    size: int
    format: Literal["webp", "jpg", "png"] | None = None
    quality: int = 90
    shard_size: int = 2000
    holdout: float = 0.0
    templates: tuple[str, ...] = ()
    limit_per_source: int | None = None
    max_captions: dict[str, int] = dataclasses.field(default_factory=dict)
    match: str = ""
    workers: int = 0


class Pick(NamedTuple):
    """A row of a source."""

    source: int
    row: int
    id: str


@dataclass(frozen=True)
class Job:
    """One shard to write, and the rows it is made of, in order."""

    path: Path
    number: int
    picks: list[Pick]


def prepare(paths: Sequence[str], config: PrepareConfig, show: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the shards and return the report. `show(done, total)` is called now and then with numbers of samples.

    UserError for sources or options that cannot work, and for an `out` that holds another preparation.
    """
    sources = open_sources(paths)
    names = [source.name for source in sources]
    _check(config, names)
    ids = [source.ids() for source in sources]
    train, val = _picks(names, ids, config)
    out = Path(config.out)
    jobs = _jobs(out, train, config.shard_size) + _jobs(out / "val", val, config.shard_size)
    _claim(out, {out, *(job.path.parent for job in jobs)}, _plan(sources, ids, config))
    done = {job.path: stats for job in jobs if (stats := _finished(job.path))}
    before = sum(len(job.picks) for job in jobs if job.path in done)
    total = sum(len(job.picks) for job in jobs)
    show(before, total)
    todo = [job for job in jobs if job.path not in done]
    for job, stats in _run(todo, sources, config, lambda new: show(before + new, total)):
        done[job.path] = stats
    for folder in {job.path.parent for job in jobs}:
        write_manifest(folder, [Entry(**done[job.path]["shard"]) for job in jobs if job.path.parent == folder])
    report = {
        "offered": {name: len(rows) for name, rows in zip(names, ids, strict=True)},
        **count([done[job.path] for job in jobs if job.path.parent == out], names, config.templates),
        "validation": count([done[job.path] for job in jobs if job.path.parent != out], names, config.templates),
    }
    write_json(out / "report.json", report)
    if not report["samples"]:
        reasons = "; ".join(about["examples"][0] for about in report["refused"].values()) or "there are none"
        raise UserError(f"none of the {sum(map(len, ids))} pictures can be used: {reasons}")
    return report


def _check(config: PrepareConfig, names: Sequence[str]) -> None:
    if config.size < 8:
        raise UserError(f"size {config.size} is too small: give 8 or more pixels")
    if not 1 <= config.shard_size <= 10_000:
        raise UserError(f"a shard of {config.shard_size} samples cannot be numbered: give 1 to 10000")
    if not 0 <= config.holdout < 1:
        raise UserError(f"holdout {config.holdout} is not a share: give 0 to less than 1, such as 0.02")
    if config.limit_per_source is not None and config.limit_per_source < 1:
        raise UserError(f"limit {config.limit_per_source} leaves no pictures: give 1 or more")
    if not 1 <= config.quality <= 100:
        raise UserError(f"quality {config.quality} is out of range: give 1 to 100")
    for name in config.max_captions:
        if name and name not in names:
            raise UserError(f"no source is called {name!r}{nearest(name, list(names))}")
    try:
        re.compile(config.match)
    except re.error as error:
        raise UserError(f"match {config.match!r} is not a regular expression: {error}") from None
    read_templates(config.templates, names)


def _picks(names: Sequence[str], ids: Sequence[Sequence[str]], config: PrepareConfig) -> tuple[list[Pick], list[Pick]]:
    """What to take for training and for validation, each in the order of a hash of source and id."""
    hashed: list[tuple[bytes, Pick]] = []
    for number, (name, rows) in enumerate(zip(names, ids, strict=True)):
        mine = [
            (hashlib.sha256(f"{name}/{id}".encode()).digest(), Pick(number, row, id)) for row, id in enumerate(rows)
        ]
        hashed += sorted(mine)[: config.limit_per_source]
    hashed.sort()
    held = [int.from_bytes(digest[-4:], "big") < config.holdout * 2**32 for digest, _ in hashed]
    train = [pick for (_, pick), out in zip(hashed, held, strict=True) if not out]
    return train, [pick for (_, pick), out in zip(hashed, held, strict=True) if out]


def _jobs(folder: Path, picks: list[Pick], size: int) -> list[Job]:
    starts = range(0, len(picks), size)
    return [Job(folder / f"{n:05d}.tar", n, picks[start : start + size]) for n, start in enumerate(starts)]


def _plan(sources: Sequence[Source], ids: Sequence[Sequence[str]], config: PrepareConfig) -> str:
    """A digest of everything that the shards depend on."""
    options = {**dataclasses.asdict(config), "out": "", "workers": 0}
    origins = [(source.name, source.stamp()) for source in sources]
    return hashlib.sha256(json.dumps([options, origins, ids]).encode()).hexdigest()


def _claim(out: Path, folders: set[Path], plan: str) -> None:
    """Make the folder ours. UserError where it holds shards of another plan."""
    path = out / "plan.json"
    known = json.loads(path.read_text()).get("plan") if path.is_file() else None
    if known != plan and (known or any(out.glob("*.tar"))):
        raise UserError(f"{str(out)!r} holds shards of other sources or options: give another --out, or remove it")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.glob("*.tmp"):
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
    return known if sha256(shard) == known["shard"]["sha256"] else None


def _run(
    jobs: Sequence[Job], sources: Sequence[Source], config: PrepareConfig, show: Callable[[int], None]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Make the shards, here or in processes of their own. `show` is given the samples done."""
    if config.workers < 2:
        done = itertools.count(1)
        for job in jobs:
            yield job, make_shard(job, sources, config, lambda: show(next(done)))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    counter = context.Value("q")
    with ProcessPoolExecutor(config.workers, context, _begin, (sources, config, counter)) as pool:
        futures = {pool.submit(_work, job): job for job in jobs}
        waiting = set(futures)
        try:
            while waiting:
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                show(counter.value)
                yield from ((futures[future], future.result()) for future in ready)
        except BrokenProcessPool:
            raise UserError(
                "a process that made shards died (out of memory?): run again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the shards under way are still finished


def _begin(sources: Sequence[Source], config: PrepareConfig, counter: Any) -> None:
    global _work_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work_state = (sources, config, counter)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody: without this its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


_work_state: tuple[Sequence[Source], PrepareConfig, Any]


def _work(job: Job) -> dict[str, Any]:
    sources, config, counter = _work_state

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    return make_shard(job, sources, config, tick)


def make_shard(job: Job, sources: Sequence[Source], config: PrepareConfig, tick: Callable[[], None]) -> dict[str, Any]:
    """Write one shard and what is known of it; returns the latter. `tick` is called for each sample read."""
    templates = read_templates(config.templates, [source.name for source in sources])
    kept: dict[Pick, tuple[str, bytes, dict[str, Any]]] = {}
    refused: list[tuple[str, str]] = []
    used: collections.Counter[str] = collections.Counter()
    for pick, raw in _read(job.picks, sources):
        tick()
        name = sources[pick.source].name
        try:
            if isinstance(raw, UserError):
                raise raw
            own = own_captions(raw.columns, config.max_captions.get(name, config.max_captions.get("")))
            made = {t: t.fill(raw.columns) for t in templates if t.source in ("", name)}
            texts = list(dict.fromkeys([*own, *filter(None, made.values())]))
            if not texts:
                raise UserError("no caption")
            if not any(re.search(config.match, text) for text in texts):
                raise UserError("no caption that matches")
            suffix, data, size = fit(raw.image, config)
            used.update(t.given for t, text in made.items() if text)
            columns = {"id": pick.id, "source": name, **raw.columns, "captions": texts}
            kept[pick] = (suffix, data, {**columns, "width": size[0], "height": size[1]})
        except ValueError as error:
            refused.append((f"{name}: {pick.id}", str(error)))
    entry = write_shard(job.path, _members(job, kept))
    counts = collections.Counter(sources[pick.source].name for pick in kept)
    stats = {"shard": dataclasses.asdict(entry), "kept": counts, "refused": sorted(refused), "templates": used}
    write_json(_stats_path(job.path), stats)
    return stats


def _read(picks: Sequence[Pick], sources: Sequence[Source]) -> Iterator[tuple[Pick, Raw | UserError]]:
    """Rows by source and in rising order, which is how a source is read fastest."""
    for number, mine in itertools.groupby(sorted(picks), key=lambda pick: pick.source):
        chosen = list(mine)
        yield from zip(chosen, sources[number].read([pick.row for pick in chosen]), strict=True)


def _members(
    job: Job, kept: Mapping[Pick, tuple[str, bytes, dict[str, Any]]]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index, pick in enumerate(pick for pick in job.picks if pick in kept):
        suffix, data, columns = kept[pick]
        key = f"{job.number:05d}{index:04d}"
        about = json.dumps({**columns, "key": key}, ensure_ascii=False).encode()
        yield key, {suffix: data, "txt": columns["captions"][0].encode(), "json": about}


def fit(data: bytes, config: PrepareConfig) -> tuple[str, bytes, tuple[int, int]]:
    """(extension, bytes, (width, height)) of a picture whose shorter side has `config.size` pixels.

    The bytes are passed through where they are that already and no format is asked for. ValueError, in words, for
    bytes that are no picture, and for one longer than MAX_ASPECT.
    """
    picture = decode(data)
    short = min(picture.size)
    if max(picture.size) > MAX_ASPECT * short:
        raise ValueError(f"longer than {MAX_ASPECT:g}:1")
    header = Image.open(io.BytesIO(data), formats=FORMATS)
    plain = not has_alpha(header) and "exif" not in header.info and header.format is not None
    if config.format is None and plain and short == config.size:
        return _SUFFIX[str(header.format)], data, picture.size
    if short != config.size:
        scale = config.size / short
        size = (max(config.size, round(picture.width * scale)), max(config.size, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    target, suffix = io.BytesIO(), config.format or "webp"
    kind = next(name for name, s in _SUFFIX.items() if s == suffix)
    picture.save(target, kind, quality=config.quality)
    return suffix, target.getvalue(), picture.size


def per_source(texts: Sequence[str]) -> dict[str, int]:
    """`["3", "renders:2"]` as {"": 3, "renders": 2}. UserError for what is not a whole number from 0."""
    numbers = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        if not number.isdecimal():
            raise UserError(f"{text!r} is not a number: give N or SOURCE:N, such as 3")
        numbers[name] = int(number)
    return numbers
