"""Pictures to be made as rows of a file, each with settings of its own and a name, so that a run can go on."""

import csv
import json
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ldm import config, recipe
from ldm.errors import UserError
from ldm.recipe import Recipe
from ldm.request import Request, Run

NAME = re.compile(r"[\w][\w.-]{0,99}")


@dataclass(frozen=True)
class Job:
    """A request and the name of its picture, without the suffix."""

    name: str
    request: Request

    def done(self, out: Path, how: Recipe) -> bool:
        """Whether its picture, which is made so, is in the folder. UserError where something else has its name."""
        path = out / f"{self.name}.png"
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


def read_jobs(path: Path, base: Request) -> list[Job]:
    """The jobs in a CSV file with a row of headings, or in JSONL: fields of a Request, and `name`.

    What a row leaves empty is as in `base`; its seed then is base's and the row's number, counted from 0. UserError
    that names the row.
    """
    rows = _rows(path)
    if not rows:
        raise UserError(f"{str(path)!r} holds no jobs: write one a line")
    jobs = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{str(path)!r}, job {number + 1} is {str(row)[:40]!r}: needs fields such as prompt and seed"
            )
        values = {name: value for name, value in row.items() if value not in (None, "")}
        name = str(values.pop("name", f"{number:05d}"))
        if not NAME.fullmatch(name):
            raise UserError(
                f"{str(path)!r}, job {number + 1}: the name {name[:40]!r} is no file's: use letters and digits"
            )
        start = config.to_dict(replace(base, seed=base.seed + number))
        try:
            jobs.append(Job(name, config.from_dict(Request, start | values)))
        except UserError as error:
            raise UserError(f"{str(path)!r}, job {number + 1}: {error}") from None
    names = [job.name for job in jobs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{str(path)!r} has two jobs of the name {twice!r}: give each its own")
    return jobs


def _rows(path: Path) -> Sequence[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return [_typed(row) for row in csv.DictReader(text.splitlines(keepends=True), strict=True)]
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read jobs from {str(path)!r}: {error.strerror}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{str(path)!r} is neither CSV nor JSONL: {error}") from None


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """A CSV row with its numbers as numbers; what is no number stays text, and is refused as such."""
    hints = typing.get_type_hints(Request)
    kinds = {
        f.name: [k for k in typing.get_args(hints[f.name]) or [hints[f.name]] if k is not NoneType]
        for f in fields(Request)
    }
    return {name: _cell(value, (kinds.get(name) or [str])[0]) for name, value in row.items() if name is not None}


def _cell(value: Any, kind: type) -> Any:
    if not isinstance(value, str) or kind is str or not value.strip():
        return value
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    try:
        return kind(value)
    except ValueError:
        return value
