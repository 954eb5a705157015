"""Settings: frozen dataclasses <-> plain data <-> YAML <-> command line, all through one strict reader.

An unknown field, a missing one or a value of another type is a UserError that names the place and the nearest match.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ldm.errors import UserError, nearest

Config = TypeVar("Config")


def from_dict(cls: type[Config], data: Any, where: str = "") -> Config:
    """Build a dataclass from plain data, strictly. `where` is the dotted place that errors name."""
    if not isinstance(data, dict):
        raise UserError(f"{where or cls.__name__} needs fields, not {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise UserError(f"unknown field {_dot(where, name)!r}{nearest(str(name), list(known))}")
    for name, field in known.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in data and no_default:
            raise UserError(f"field {_dot(where, name)!r} is missing: give it a value")
    values = {name: _read(hints[name], value, _dot(where, name)) for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass that checks its own fields
        raise UserError(f"{where or cls.__name__}: {error}") from None


def to_dict(config: Any) -> Any:
    """Plain data of a config: dicts, lists, numbers, strings. `from_dict` is its inverse."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def dump(config: Any) -> str:
    """YAML text of a config, in the order of its fields."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=110)


def load(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and lay `--section.field VALUE` overrides over it (values are read as YAML)."""
    try:
        data = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read config {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {str(path)!r} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"config {str(path)!r} holds no fields")
    for name, value in _pairs(overrides):
        _set(data, name.split("."), value)
    return from_dict(cls, data)


def _pairs(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b 1 --c=x` as [("a.b", 1), ("c", "x")]; a flag without a value is true."""
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"unexpected argument {flag!r}: fields are given as --section.field VALUE")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            pairs.append((name.replace("-", "_"), yaml.safe_load(text) if text else ""))
        except yaml.YAMLError:
            pairs.append((name.replace("-", "_"), text))
    return pairs


def _set(data: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[path[-1]] = value


def _dot(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        if len(options) != 1:
            raise TypeError(f"{where}: a config field has one type, or one type and None, not {hint}")
        return _read(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(Any, hint), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}: needs a list such as [1, 2]")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise UserError(f"{where} has {len(value)} values, needs {len(kinds)}")
        return tuple(_read(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}: needs fields")
        return {key: _read(arguments[1], v, _dot(where, key)) for key, v in value.items()}
    return value if hint is Any else _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a run named 2024, a shard named 00000
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} is {value!r}: needs {hint.__name__}")
    return value
