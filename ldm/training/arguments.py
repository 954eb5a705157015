"""The command line of the training scripts: CONFIG --run DIR, and any field of the config as --section.field VALUE."""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ldm import config
from ldm.errors import Parser, UserError
from ldm.models import speed
from ldm.training.config import LdmRun, RunConfig, VaeRun
from ldm.training.loop import Task, train
from ldm.training.memory import announce
from ldm.training.processes import meet

Run = TypeVar("Run", bound=VaeRun | LdmRun)


def train_by(kind: type[Run], make: Callable[[Run], Task], usage: str) -> int:
    """What a training script does, and its exit code. `--help` lists every field of `kind` with its default."""
    speed.keep_memory()
    parser = Parser(usage)
    fields = "\n".join(f"  --{name} {default}" for name, default in _fields(kind))
    parser.epilog = f"fields of the config, with their defaults:\n{fields}"
    parser.add_argument("config", type=Path, help="a YAML file")
    parser.add_argument("--run", type=Path, required=True, help="the folder of the run, made if it is not there")
    try:
        known, overrides = parser.parse_known_args()
        settings = config.load(kind, known.config, overrides)
    except UserError:
        with suppress(UserError):  # its own mistake is what it says, though others have ended already
            meet(RunConfig.timeout)  # those whose command or file is right see this one end
        raise
    meet(settings.run.timeout)
    torch.manual_seed(settings.run.seed)  # of the fresh weights: all else is keyed
    task = make(settings)
    announce(task, settings)
    return train(task, settings, known.run).exit_code


def _fields(kind: type, default: Any = None, where: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = field.default if default is None else getattr(default, field.name)
        missing = value is dataclasses.MISSING
        if isinstance(inner := hints[field.name], type) and dataclasses.is_dataclass(inner):
            yield from _fields(inner, None if missing else value, f"{where}{field.name}.")
        else:
            yield where + field.name, "(needed)" if missing else value
