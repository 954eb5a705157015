"""The command line of the training scripts: CONFIG --run DIR, and any field of the config as --section.field VALUE."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import Parser


def split(arguments: Sequence[str], usage: str, config: type) -> tuple[Path, Path, list[str]]:
    """(config file, run folder, overrides). `--help` lists every field of `config` with its default."""
    parser = Parser(usage)
    fields = "\n".join(f"  --{name} {default}" for name, default in _fields(config))
    parser.epilog = f"fields of the config, with their defaults:\n{fields}"
    parser.add_argument("config", type=Path, help="a YAML file")
    parser.add_argument("--run", type=Path, required=True, help="the folder of the run, made if it is not there")
    known, overrides = parser.parse_known_args(arguments)
    return known.config, known.run, overrides


def _fields(config: type, default: Any = None, where: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        value = field.default if default is None else getattr(default, field.name)
        missing = value is dataclasses.MISSING
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(
                typing.cast(type, hints[field.name]), None if missing else value, f"{where}{field.name}."
            )
        else:
            yield where + field.name, "(needed)" if missing else value
