"""The command line of the training scripts: CONFIG --run DIR, and any field of the config as --section.field VALUE."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
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


def load_any(path: Path, overrides: Sequence[str]) -> VaeRun | LdmRun:
    """The config of a training script, of whichever its fields are. UserError of the one that it is nearer to."""
    errors: list[UserError] = []
    kinds: tuple[type[LdmRun] | type[VaeRun], ...] = (LdmRun, VaeRun)
    for kind in kinds:
        try:
            return config.load(kind, path, overrides)
        except UserError as error:
            errors.append(error)
    names = {field.name for field in dataclasses.fields(VaeRun)} - {field.name for field in dataclasses.fields(LdmRun)}
    of_vae = path.is_file() and any(line.split(":")[0] in names for line in path.read_text().splitlines())
    raise errors[of_vae]


def _fields(kind: type, default: Any = None, where: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = field.default if default is None else getattr(default, field.name)
        missing = value is dataclasses.MISSING
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(
                typing.cast(type, hints[field.name]), None if missing else value, f"{where}{field.name}."
            )
        else:
            yield where + field.name, "(needed)" if missing else value
