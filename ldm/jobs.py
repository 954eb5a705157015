"""The pictures of a run: in batches, as rows of a file, shared by processes, and named so that it can go on."""

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ldm import config, recipe
from ldm.errors import UserError
from ldm.recipe import Made, Recipe
from ldm.request import Request, Run, kinds

NAME = re.compile(r"[\w][\w.-]{0,99}")
ALONE = {"dpm_adaptive"}  # it steps as the hardest picture of its batch asks, so company would change a picture


class Batch(NamedTuple):
    """Pictures made at once, the rows of them that are wanted, and the names of their files.

    names: None where one is there already; empty for the next free numbers.
    """

    requests: list[Request]
    rows: slice
    names: Sequence[str | None] = ()


def settings(request: Request) -> Request:
    """What requests of one batch must share: all but prompt, negative and seeds."""
    return replace(request, prompt="", negative="", seed=0, variation_seed=0)


def batches(requests: Sequence[Request], size: int, made: Made | None = None) -> list[Batch]:
    """Split a run into batches of the same settings, in order. A single request takes the place that `made` tells of.

    There it is among as many others as when it was first made, and so the same to the last bit.
    """
    if made and len(requests) == 1:
        return [Batch([*requests] * made.batch, slice(made.row, made.row + 1))]
    found = []
    for shared, group in groupby(requests, key=settings):
        alike, most = list(group), 1 if shared.sampler in ALONE else size
        parts = [alike[i : i + most] for i in range(0, len(alike), most)]
        found += [Batch(part, slice(len(part))) for part in parts]
    return found


def done(path: Path, how: Recipe) -> bool:
    """Whether a picture that is made so is there. UserError where something else has its name."""
    if not path.exists():
        return False
    found = recipe.read(path)
    ours, theirs = how.made, found.made
    same = (how.request, ours.model_hash, ours.vae) == (found.request, theirs.model_hash, theirs.vae)
    if not same or ours.inputs != theirs.inputs or theirs.unfinished or theirs.program:
        raise UserError(f"{str(path)!r} is there, of other settings or inputs: give another --out, or take it away")
    return True


def share(run: Run, *, seeded: bool) -> tuple[int, int]:
    """This process' number, and how many share the run's pictures, as launchers say in RANK and WORLD_SIZE.

    UserError where several would have to agree on what is not said: seeds, names, a sheet of all.
    """
    said = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(re.fullmatch(r"\d{1,9}", text) for text in said) or not int(said[0]) < int(said[1]):
        raise UserError(f"RANK {said[0]!r} of WORLD_SIZE {said[1]!r} in the environment is no process of several")
    if int(said[1]) > 1 and (run.grid or not (run.jobs or (run.prompts_file and seeded))):
        what = "--jobs, or of --prompts-file with --seed, and make no --grid"
        raise UserError(f"{said[1]} processes (WORLD_SIZE in the environment) share the pictures of {what}")
    return int(said[0]), int(said[1])


def read_jobs(path: Path, base: Request) -> dict[str, Request]:
    """The jobs in a CSV file with a row of headings, or in JSONL: fields of a Request, and `name`, of the picture.

    What a row leaves empty is as in `base`; its seed then is base's and the row's number, counted from 0. UserError
    that names the row.
    """
    jobs: dict[str, Request] = {}
    for number, row in enumerate(_rows(path)):
        try:
            if not isinstance(row, dict):
                raise UserError(f"it is {str(row)[:40]!r}: needs fields such as prompt and seed")
            values = {name: value for name, value in row.items() if value not in (None, "")}
            name = str(values.pop("name", f"{number:05d}"))
            if not NAME.fullmatch(name):
                raise UserError(f"the name {name[:40]!r} is no file's: use letters and digits")
            if name in jobs:
                raise UserError(f"another has the name {name!r} too: give each its own")
            start = config.to_dict(replace(base, seed=base.seed + number))
            jobs[name] = config.from_dict(Request, start | values)
        except UserError as error:
            raise UserError(f"{str(path)!r}, job {number + 1}: {error}") from None
    if not jobs:
        raise UserError(f"{str(path)!r} holds no jobs: write one a line")
    return jobs


def _rows(path: Path) -> Sequence[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            types = kinds(Request)
            rows = csv.DictReader(text.splitlines(keepends=True), strict=True)
            return [{k: _cell(v, types.get(k, str)) for k, v in row.items() if k is not None} for row in rows]
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read jobs from {str(path)!r}: {error.strerror}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{str(path)!r} is neither CSV nor JSONL: {error}") from None


def _cell(text: Any, kind: type) -> Any:
    """A number of a CSV row as a number; what is none stays text, and is refused as such."""
    if not isinstance(text, str) or kind is str or not text.strip():
        return text
    words = {"true": True, "1": True, "false": False, "0": False}
    try:
        return words[text.strip().lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        return text
