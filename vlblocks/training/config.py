"""Configurations as plain data, and the check that a resumed run still has its own."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from vlblocks.errors import UserError

__all__ = ["compare_configs", "config_from_dict", "config_to_dict", "require_same_config"]

_Config = TypeVar("_Config")

_SHOWN = 3
_ABSENT = object()


def config_to_dict(config: Any) -> Any:
    """A dataclass, with all in it, as what JSON gives back: dicts, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: config_to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): config_to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [config_to_dict(item) for item in config]
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, Enum):
        return config.name
    return config


def config_from_dict(kind: type[_Config], data: Mapping[str, Any], *, source: str | os.PathLike[str]) -> _Config:
    """The dataclass `kind` from what `config_to_dict` made of it; a field that is absent takes its default.

    Raises: UserError naming `source` and the field that is unknown, or has no default and is absent.
    """
    return _build(kind, data, str(source), "")


def _build(kind: Any, value: Any, source: str, name: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {name or 'it'} is not an object of settings: use the file that a run wrote")
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if unknown := next((key for key in value if key not in fields), None):
            raise UserError(f"{source}: unknown field {name}{unknown}: use the version of vlblocks that wrote it")
        found = {key: _build(hints[key], item, source, f"{name}{key}.") for key, item in value.items()}
        try:
            return kind(**found)
        except TypeError as error:
            raise UserError(f"{source}: {name or kind.__name__} {error}: use the file that a run wrote") from None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        chosen = next((option for option in arguments if option is not type(None)), kind)
        return None if value is None else _build(chosen, value, source, name)
    if origin is tuple and value is not None:
        return tuple(value)
    return Path(value) if kind is Path else value


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping) and data:
        return {name: value for key, item in data.items() for name, value in _flatten(item, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): data}


def _ignored(name: str, ignore: Collection[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in ignore)


def compare_configs(saved: Any, current: Any, *, ignore: Collection[str] = ()) -> list[str]:
    """The dotted names of the fields that differ, in the order of `current`; `ignore` names fields or sections."""
    old, new = _flatten(config_to_dict(saved)), _flatten(config_to_dict(current))
    names = [*new, *(name for name in old if name not in new)]
    return [n for n in names if old.get(n, _ABSENT) != new.get(n, _ABSENT) and not _ignored(n, ignore)]


def require_same_config(
    saved: Any, current: Any, *, source: str | os.PathLike[str], ignore: Collection[str] = ()
) -> None:
    """Check that a run is resumed with the configuration it was begun with, which `source` holds.

    Raises: UserError naming the first fields that differ with their old and new values, and the remedy.
    """
    names = compare_configs(saved, current, ignore=ignore)
    if not names:
        return
    old, new = _flatten(config_to_dict(saved)), _flatten(config_to_dict(current))
    shown = "; ".join(f"{name} was {_show(old, name)}, now {_show(new, name)}" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UserError(
        f"{source}: this run was begun with another configuration: {shown}{more}: "
        "set it back, choose another --out, or begin anew with --restart"
    )


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], default=str) if name in values else "absent"
