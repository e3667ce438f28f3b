"""Configurations are frozen, keyword-only dataclasses; this file checks them and reads and writes them as plain data.

A field's range stands in its type: `lr: Annotated[float, Gt(0)]`. Bounds given as an `Interval` are told as one, single
ones each by itself; a text beside them is told as their reason. Reading is strict: an unknown key is refused with the
nearest valid one, a wrong type with the path of the field.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Interval, Le
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from deepdelta.errors import UserError, nearest

Plain = dict[str, Any]
T = TypeVar("T")

LARGEST = 1 << 62
"""What counts are at most: sums of two still fit into 64 bits."""
MOST_THREADS = 1024

Count = Annotated[int, Ge(1), Le(LARGEST)]
Threads = Annotated[int, Ge(1), Le(MOST_THREADS)]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) != len(values):
        raise PydanticCustomError("distinct", "be different values, at least one")
    return values


def _seeds(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or len(set(values)) != len(values) or min(values) < 0:
        raise PydanticCustomError("distinct", "be different numbers from 0 on, at least one")
    return values


Distinct = AfterValidator(_distinct)
Seeds = Annotated[tuple[int, ...], AfterValidator(_seeds)]

# One per class: making it takes longer than all that it is used for.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


class Settings:
    """The base of configurations: whatever makes one, its fields are of their types and in their ranges."""

    __pydantic_config__ = ConfigDict(strict=True)

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: what the first such field must be, and what it is.
        """
        try:
            _checker(type(self)).validate_python(vars(self), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise UserError(_demand(name, _hints(type(self))[name], first, vars(self)[name])) from None


def _fields_of(cls: Any) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if name in own}


def _checker_of(cls: Any) -> Any:
    """What checks the fields of an object that exists."""
    kind = TypedDict(cls.__name__, _hints(cls))
    setattr(kind, "__pydantic_config__", cls.__pydantic_config__)  # noqa: B010  # a plain assignment is no valid type
    return TypeAdapter(kind)


_hints: Callable[[Any], dict[str, Any]] = cache(_fields_of)
_checker: Callable[[Any], TypeAdapter[Any]] = cache(_checker_of)


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
        raise UserError(f"{where + ': ' if where else ''}{_told(cls, error.errors()[0])}") from None


RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "distinct")
"""Kinds of pydantic's errors that are told as what the field must be."""


def _told(cls: Any, error: ErrorDetails) -> str:
    """What is wrong with plain data, under the path of the field."""
    path = [str(part) for part in error["loc"]]
    message, came = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] in RANGES:
        hint, last = cls, 0
        for number, part in enumerate(error["loc"]):
            if isinstance(part, str):
                hint, last = _within(hint, part), number
        message, path = _demand(path[last], hint, error, came), path[:last]
    elif not isinstance(came, dict):
        message += f", got {_short(came)}"
        if error["type"] == "literal_error":  # the message names them all
            hint = nearest(str(came), re.findall("'([^']*)'", error["ctx"]["expected"]))
            message += f"; {hint}" if hint.startswith("did") else ""
    return ": ".join(filter(None, (".".join(path), message)))


def _demand(name: str, hint: Any, error: ErrorDetails, came: Any) -> str:
    """'gate_init must lie in [0, 2], got 3.0.'"""
    kind, context, told = error["type"], error.get("ctx", {}), [*_inner(hint)]
    whole = next((one for one in told if isinstance(one, Interval) and kind in RANGES[:4]), None)
    # Too large is its own reason.
    large = kind == "less_than_equal" and whole is None
    reason = "" if large else "".join(f" ({text})" for text in told if isinstance(text, str))
    if kind == "literal_error":
        choices = [str(choice) for choice in told if isinstance(choice, str | int)]
        return f"{name} must be one of {', '.join(choices)}, got {came!r}; {nearest(str(came), choices)}"
    if whole is not None:
        low = f"({whole.gt:g}" if whole.ge is None else f"[{whole.ge:g}"
        high = f"{whole.lt:g})" if whole.le is None else f"{whole.le:g}]"
        message = f"{'be None or ' if type(None) in told else ''}lie in {low}, {high}"
    elif kind in RANGES[:4]:
        words = {"gt": "be greater than", "ge": "be at least", "lt": "be less than", "le": "be at most"}
        message = next(
            f"{words[key]} {int(bound) if bound == int(bound) else bound:,}" for key, bound in context.items()
        )
    elif kind in RANGES:
        message = {"finite_number": "be finite"}.get(kind, error["msg"])
    else:
        return f"{name}: {error['msg']}, got {_short(came)}"
    shown = f"{came:,}" if large else _short(came)
    return f"{name} must {message}{reason}, got {list(came) if kind == 'distinct' else shown}."


def _inner(hint: Any) -> Iterator[Any]:
    """What stands anywhere in a type: of Annotated[int, Ge(1)] | None the bound, of a Literal its choices."""
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        yield inner
        yield from _inner(inner)


def _within(hint: Any, key: str) -> Any:
    """The type of what stands under a key in something of type `hint`."""
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    return _hints(next(one for one in (hint, *_inner(hint)) if dataclasses.is_dataclass(one)))[key]


def _short(value: Any) -> str:
    """The value for a message; of a long one its beginning."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


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
