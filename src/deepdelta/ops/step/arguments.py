"""Named arguments of the fused step: the schemas of its operators and the arguments of its kernels are made of these.

A tensor's kind, `stored` as the state is or `wide` as sums are made, and its axes: N tokens, V value channels, D width,
G gates, R numbers of a gating, U one number, * one per thread or program that sums. What is None leaves its part of a
kernel out.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from torch import Tensor


class Given(NamedTuple):
    """What a step takes; with a gating, whose first `gates` numbers are the gate's, write and erase are made of it and
    of its factor (`reference.Gating`)."""

    state: Annotated[Tensor, "stored N V D"]
    h: Annotated[Tensor, "stored N D"]
    gating: Annotated[Tensor | None, "wide N R"]
    gates: int
    erases: bool
    share: float | None
    factor: Annotated[Tensor | None, "wide U"]
    write: Annotated[Tensor | None, "wide N V"]
    erase: Annotated[Tensor | None, "wide N G"]
    offset: float | None
    power: int
    compression: Annotated[Tensor | None, "wide V D"]
    norm_weight: Annotated[Tensor | None, "wide D"]
    norm_eps: float
    opens: bool


class Made(NamedTuple):
    """What a step fills: X', c', s, h^T X, 1 / rms, and beta, w and a of X' = X + h a^T."""

    new: Annotated[Tensor, "stored N V D"]
    c: Annotated[Tensor | None, "stored N D"]
    scale: Annotated[Tensor, "wide N"]
    read: Annotated[Tensor | None, "wide N V"]
    inverse: Annotated[Tensor, "wide N"]
    beta: Annotated[Tensor | None, "wide N G"]
    made_write: Annotated[Tensor | None, "wide N V"]
    coefficient: Annotated[Tensor, "wide N V"]


class Known(NamedTuple):
    """What the backward pass takes from the forward pass, besides what was given."""

    scale: Annotated[Tensor, "wide N"]
    read: Annotated[Tensor | None, "wide N V"]
    inverse: Annotated[Tensor, "wide N"]
    beta: Annotated[Tensor | None, "wide N G"]
    coefficient: Annotated[Tensor, "wide N V"]


class Incoming(NamedTuple):
    d_new: Annotated[Tensor, "stored N V D"]
    d_c: Annotated[Tensor | None, "stored N D"]


class Gradients(NamedTuple):
    """What the backward pass fills."""

    d_state: Annotated[Tensor, "stored N V D"]
    d_h: Annotated[Tensor, "stored N D"]
    d_gating: Annotated[Tensor | None, "wide N R"]
    d_factor: Annotated[Tensor | None, "wide * U"]
    d_write: Annotated[Tensor, "wide N V"]
    d_erase: Annotated[Tensor | None, "wide N G"]
    d_compression: Annotated[Tensor | None, "wide * V D"]
    d_norm_weight: Annotated[Tensor | None, "wide * D"]


Record = TypeVar("Record", Given, Made, Incoming, Gradients)


def by_token(record: Record) -> Record:
    """With the tokens as one axis, as kernels take them: views that autograd does not hear of."""
    if record[0].ndim == 3:
        return record
    values: list[Any] = list(record)
    # Written out: every microsecond here is one per residual.
    for place, axes in _BY_TOKEN[type(record)]:
        if (value := values[place]) is not None and value.ndim != axes:
            values[place] = value.view(-1, *value.shape[1 - axes :])
    return type(record)(*values)


def _by_token(record: type) -> list[tuple[int, int]]:
    """Where the tensors are whose first axis is that of the tokens, and how many axes they have."""
    hints = get_type_hints(record, include_extras=True).values()
    axes = [getattr(hint, "__metadata__", ("",))[0].split()[1:] for hint in hints]
    return [(place, len(own)) for place, own in enumerate(axes) if own[:1] == ["N"]]


_BY_TOKEN: dict[type, list[tuple[int, int]]] = {
    record: _by_token(record) for record in (Given, Made, Incoming, Gradients)
}

SUMMED = ("d_factor", "d_compression", "d_norm_weight")
"""Gradients of parameters, which are summed over tokens."""


def summed(
    given: Given, gradients: Gradients, make: Callable[[Tensor], Tensor], run: Callable[[Gradients], None]
) -> Gradients:
    """`gradients` as `run` fills them, those of parameters added up.

    Args:
        make: of a parameter, room for the sum of each thread or program, along a first axis.
    """
    given_for = {name: getattr(given, name.removeprefix("d_")) for name in SUMMED}
    sums: dict[str, Any] = {name: None if p is None else make(p) for name, p in given_for.items()}
    run(gradients._replace(**sums))
    totals: dict[str, Any] = {name: None if each is None else _total(each) for name, each in sums.items()}
    return gradients._replace(**totals)


def _total(sums: Tensor) -> Tensor:
    return sums[0] if len(sums) == 1 else sums.sum(0)


class Replayed(NamedTuple):
    state: Annotated[Tensor, "stored N V D"]
    h: Annotated[Tensor, "stored N D"]
    coefficient: Annotated[Tensor, "wide N V"]
    new: Annotated[Tensor, "stored N V D"]


_SCHEMA = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool"},
    **{float: "float", float | None: "float?"},
}


def schema(returns: str, *records: type) -> str:
    """The schema of an operator whose arguments are the fields of records, one after another."""
    fields: dict[str, Any] = {name: kind for record in records for name, kind in get_type_hints(record).items()}
    return f"({', '.join(f'{_SCHEMA[kind]} {name}' for name, kind in fields.items())}) -> {returns}"
