"""Configurations are frozen, keyword-only dataclasses; this file reads them from and writes them to plain data.

Reading is strict: an unknown key is refused with the nearest valid one, a wrong type with the path of the field.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from deepdelta.errors import UserError, nearest

Plain = dict[str, Any]
T = TypeVar("T")

# One per class: making it takes longer than all that it is used for.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def to_plain(config: Any) -> Plain:
    """The configuration as JSON's own types; NaN and infinity stay what they are, for `write_json` to refuse."""
    return _adapter(type(config)).dump_python(config, mode="json")  # type: ignore[no-any-return]


def from_plain(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """The configuration of type `cls` that `data` describes.

    Args:
        cls: a dataclass, its fields possibly dataclasses themselves.
        data: plain data as JSON or TOML gives it; missing keys take the field's default.
        where: how messages name the place that `data` came from.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or one that the configuration refuses.
    """
    _refuse_unknown(cls, data, where)
    try:
        # `default`: a date in a TOML file becomes text, which is then refused with the path of its field.
        return _adapter(cls).validate_json(json.dumps(data, default=str), strict=True)  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        came = "" if isinstance(first["input"], dict) else f", got {_short(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where + ': ' if where else ''}{path + ': ' if path else ''}{message}{came}") from None


def _short(value: Any) -> str:
    """The value for a message; of a long one its beginning."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def refuse_not_finite(data: Mapping[str, Any], path: str = "") -> None:
    """Raise a UserError for a number that JSON cannot hold, named by its dotted key."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            refuse_not_finite(value, f"{path}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}{key} must be finite, got {value}.")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Plain:
    """`base` with `changes` laid over it, dictionaries key by key."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    """The dotted keys at which two plain configurations differ, each with both values."""
    found: list[str] = []
    for key in sorted(set(one) | set(other)):
        a, b = one.get(key), other.get(key)
        name = f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} there, {b!r} here")
    return found


def _refuse_unknown(cls: Any, data: Any, where: str) -> None:
    inner = get_args(cls)
    if get_origin(cls) is dict and isinstance(data, Mapping):
        for key, value in data.items():
            _refuse_unknown(inner[1], value, f"{where}.{key}" if where else key)
    elif get_origin(cls) is tuple and isinstance(data, list):
        for number, value in enumerate(data):
            _refuse_unknown(inner[0], value, f"{where}.{number}" if where else str(number))
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and isinstance(data, Mapping)):
        return
    hints = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in data.items():
        if key not in known:
            raise UserError(f"{where or cls.__name__}: unknown key '{key}'; {nearest(key, known)}")
        _refuse_unknown(hints[key], value, f"{where}.{key}" if where else key)
