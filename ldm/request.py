"""One picture to be made, as plain data, and its fields as the flags of a command. Imports no torch."""

import argparse
import typing
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any


def _told(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Request:
    """One picture to be made. What is None is the model's own default (`Pipeline.complete` fills it in).

    seed: of all the noise of this picture. strength: of a picture to start from, the share of the steps that is done;
    None: it starts from noise alone. width and height are then those of that picture, not of a multiple.
    """

    prompt: str
    negative: str = _told("what to keep away from", "")
    seed: int = _told("seed of the first picture; the next one has the next (random)", 0)
    sampler: str | None = _told("such as euler, euler_a, dpmpp_2m; a wrong name lists all (the model's own)")
    schedule: str | None = _told("such as trailing, karras; a wrong name lists all (the model's own)")
    steps: int | None = _told("network evaluations a picture (the model's own)")
    cfg_scale: float | None = _told("how strongly to follow the prompt (the model's own)")
    width: int | None = _told("pixels (the model's own, or the first picture's)")
    height: int | None = _told("pixels (the model's own, or the first picture's)")
    clip_skip: int | None = _told("read the text tower's n-th layer from the end (the model's own)")
    plain_prompt: bool = _told("take prompts as they stand, without (weights:1.2), [from:to:0.5], AND, BREAK", False)
    strength: float | None = _told("how much of --init-image to change, above 0 to 1 (0.75; 1 under a mask)")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of a Request but the prompt; a flag that is not given is None."""
    hints = typing.get_type_hints(Request)
    for f in fields(Request)[1:]:
        kind = next(k for k in typing.get_args(hints[f.name]) or (hints[f.name],) if k is not NoneType)
        how: dict[str, Any] = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **how)


def given(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields that a command line gives a value."""
    values = {f.name: getattr(flags, f.name) for f in fields(Request)[1:]}
    return {name: value for name, value in values.items() if value is not None}
