"""What stands for the rest of the library in the flat file of an export: no fused code, no settings from files.

Nothing imports this: `flat.py` writes it in front of the modules that make up the network.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from html import escape
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn


class UserError(ValueError):
    """What must hold does not: the message says what must hold, what came and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    return f"known are: {', '.join(sorted(known))}."


class Settings:
    """The base of configurations; ranges are checked by the library alone."""

    def __post_init__(self) -> None: ...


def to_plain(config: Any) -> dict[str, Any]:
    return asdict(config)


def from_plain(cls: Any, data: Mapping[str, Any], *, where: str = "") -> Any:
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(data) - known):
        raise UserError(f"{where}: unknown key '{unknown[0]}'; {nearest(unknown[0], known)}")
    residual = data.get("residual")
    nested = {"residual": from_plain(globals()["ResidualConfig"], residual)} if isinstance(residual, Mapping) else {}
    return cls(**{**data, **nested})


def settled(residual: Mapping[str, Any]) -> dict[str, Any]:
    return dict(residual)


PRESETS: dict[str, Any] = {}


class notebook:
    """Pictures are the library's; a table of its own lines stands here."""

    @staticmethod
    def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
        lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
        return f"<table><caption>{escape(title)}</caption>{lines}</table>"


class _Shaped:
    """Shapes in signatures, which the library's tests check."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Tensor


Float = Int = _Shaped


def Interval(**limits: Any) -> None: ...


def Ge(limit: Any) -> None: ...


def Le(limit: Any) -> None: ...


def Gt(limit: Any) -> None: ...


FiniteFloat = float
Backend = Literal["auto", "reference", "fused"]
SavedState = Any


class Work:
    def __init__(self, *sizes: Any, **more: Any) -> None: ...

    @classmethod
    def rewrite(cls, *sizes: Any) -> "Work":
        return cls()


def described(*what: Any) -> str:
    return "reference"


def runs_fused(*what: Any) -> bool:
    return False


class MemoryPlan(NamedTuple):
    """Every state is saved."""

    on: bool = False

    def saved(self, state: Tensor, known: Any) -> None: ...


def standing_in(saved: Any, state: Tensor) -> AbstractContextManager[None]:
    return nullcontext()


def attach(state: Tensor, saved: Any) -> Tensor:
    return state


def attached(state: Tensor) -> None: ...


def detached(value: Any) -> Any:
    return value


def refuse_adding(branch: nn.Module) -> None: ...


def unwrapped(module: nn.Module) -> nn.Module:
    return module


def watch(stream: nn.Module, residual: nn.Module) -> None: ...


def warn_of_decayed_gates(model: nn.Module) -> None: ...


class _Names:
    """The settings' names as a module of their own."""

    def __getattr__(self, name: str) -> Any:
        return globals()[name]


config = _Names()
