"""Pictures to be made as rows of a file, each with settings of its own and a name, so that a run can go on."""

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm import config, recipe
from ldm.errors import UserError
from ldm.recipe import Recipe
from ldm.request import Request, Run, kinds

NAME = re.compile(r"[\w][\w.-]{0,99}")


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
    try:
        return (
            {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()] if kind is bool else kind(text)
        )
    except (KeyError, ValueError):
        return text
