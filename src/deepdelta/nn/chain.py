"""Residuals one after another, each of which opens the next in its own rewrite."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from deepdelta.errors import UserError
from deepdelta.nn.adding import unwrapped
from deepdelta.nn.input_map import InputMap, StreamState
from deepdelta.nn.plain import plain
from deepdelta.nn.residual import DeltaResidual


class Link(NamedTuple):
    """A module that a state goes through, and what it is called with beside the state."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    """A residual's `input_map` among them stands for its own, as in cached decoding."""

    def input_map(self, residual: DeltaResidual) -> InputMap:
        return (self.kwargs or {}).get("input_map") or residual.input_map()


def advance(state: Tensor, links: Sequence[Link], head: InputMap | None = None) -> StreamState:
    """The state after the modules in their order, read by `head` if one is given; equal to calling them one by one.

    A residual that is plainly ours opens the next one, so that the fused step can do both in one pass over the state.
    What is not (a module of another kind, a wrapper, a residual with hooks or sharded) is called with the state.

    Raises:
        UserError: a module returns no tensor.
    """
    given = StreamState(state)
    for number, link in enumerate(links):
        next_link = links[number + 1] if number + 1 < len(links) else None
        residual, kwargs = link.module, link.kwargs or {}
        if not plain(residual, DeltaResidual):
            given = StreamState(_tensor(residual, residual(given.state, *link.args, **kwargs)))
            continue
        if given.c is None:
            given = residual.opened(given.state, link.input_map(residual))
        branch, extras = residual.wrapped(), {name: value for name, value in kwargs.items() if name != "input_map"}
        h = _tensor(branch, branch(residual.branch_input(given), *link.args, **extras))
        following = head if next_link is None else _following(residual, next_link, given.state)
        given = residual.rewrite(given, h, following)
        if following is None:
            given = StreamState(residual.closed(given))
    return given if head is None or given.c is not None else head(given)


def _following(residual: DeltaResidual, link: Link, state_VD: Tensor) -> InputMap | None:
    """The input map of the residual after this one, where it is plainly ours and of a stream like this one's."""
    after = link.module
    if not plain(after, DeltaResidual) or after.shape() != residual.shape():
        return None
    after.check(state_VD)
    return link.input_map(after)


def _tensor(module: nn.Module, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise UserError(
            f"a chain hands on one tensor, and {type(module).__name__} returned {type(output).__name__}; call the "
            "modules one by one, which gives you all that they return."
        )
    return output


class Chain(nn.Sequential):
    """Residuals of one stream (and other modules between them) as one module; made by `DeltaStream.chain`.

    `chain(state, *args, **kwargs)` is `state = residual(state, *args, **kwargs)` for one after the other, and each
    rewrite opens the next residual in its own pass where the fused step can (`use_backend`), from one chain within it
    to the next too. A module that is no residual ends that: it is called with the state alone. So do hooks on a
    residual, recorders, interventions and sharding, with the same numbers. It is an nn.Sequential: members keep their
    keys under their index or name.

    Raises:
        UserError: a branch (or module between) that returns anything but one tensor.
    """

    def forward(self, state: Float[Tensor, "..."], *args: Any, **kwargs: Any) -> Float[Tensor, "..."]:  # type: ignore[override]
        return advance(state, self.links(*args, **kwargs)).state

    def links(self, *args: Any, **kwargs: Any) -> list[Link]:
        """Every member with what it is called with; of a chain within that is plainly one, its members."""
        links: list[Link] = []
        for member in self:
            if plain(member, Chain):
                links += member.links(*args, **kwargs)
            elif isinstance(unwrapped(member), DeltaResidual | Chain):
                links.append(Link(member, args, kwargs))
            else:
                links.append(Link(member))
        return links
