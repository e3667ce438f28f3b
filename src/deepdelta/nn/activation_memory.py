"""Activation memory: the states between residuals are not saved for the backward pass but made again in it.

A rewrite X' = X + h a^T is cheap to repeat from h, which is saved anyway, and the V numbers a per token. Where a state
would be saved, its `SavedState` is, which makes the state again when the backward pass asks. It goes from residual to
residual beside the state (`StreamState.saved`). Between residuals that are called one by one there is only a tensor:
there the graph node that made the tensor carries it (`attach`), in the node's own metadata, until its backward has run.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from deepdelta.errors import UserError
from deepdelta.ops.derivatives import transformed

Plan = Literal["save", "replay", "recover"]
Remake = Callable[[Tensor], Tensor]


class SavedState:
    """A state somewhere between two residuals.

    Under `replay`, every `every`-th state is kept and the others are made again from the kept one before them, with the
    forward's own operation: bit for bit. Under `recover`, only the last state is kept and each is made from the one
    after it, X = X' - h a^T: exact but for rounding, which adds up over the layers.
    """

    def __init__(self, state: Tensor, keep: bool = True, depth: int = 0) -> None:
        self.kept, self.version, self.depth = state.detach() if keep else None, state._version, depth
        self.made: Tensor | None = None
        self.source: SavedState | None = None
        """What it is made again of, by `remake`."""
        self.remake: Remake | None = None
        self.after: Callable[[], SavedState | None] = lambda: None

    def value(self) -> Tensor:
        """The state itself."""
        missing, saved = list[SavedState](), self
        while (state := saved.there()) is None:
            assert saved.source is not None
            missing.append(saved)
            saved = saved.source
        for one in reversed(missing):
            assert one.remake is not None
            state = one.made = one.remake(state)
        # The backward pass goes from the last layer to the first: what lies after has been used.
        later = self.after()
        while later is not None and later.made is not None:
            later.made, later = None, later.after()
        return state

    def there(self) -> Tensor | None:
        """The state where it is kept, or made again already."""
        if self.kept is not None and self.kept._version != self.version:
            raise RuntimeError(
                "a state that the backward pass needs was changed in place after the residual that made it; use the "
                "operation that returns a new tensor."
            )
        return self.made if self.kept is None else self.kept


Value = TypeVar("Value", Tensor, Tensor | float, Tensor | None)


def detached(value: Value) -> Value:
    """Tensors without their graph, what else there is as it is."""
    return value.detach() if isinstance(value, Tensor) else value


class MemoryPlan(NamedTuple):
    """What one residual's rewrites save of their states; see `use_memory`."""

    plan: Plan = "save"
    every: int = 8

    @property
    def on(self) -> bool:
        """Compiled code decides by itself what to save."""
        return self.plan != "save" and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def saved(self, state: Tensor, known: SavedState | None) -> SavedState | None:
        """What stands for `state`: what is known of it, unless it has changed since; None where the state is saved.

        Raises:
            UserError: within a transform of torch.func.
        """
        if not self.on:
            return None
        if transformed():
            if not state.requires_grad:
                return None
            raise UserError(
                f"the memory plan '{self.plan}' is for backward(), not for gradients by torch.func (grad, vjp, jacrev, "
                'hessian); for these choose use_memory(module, "save").'
            )
        return known if known is not None and known.version == state._version else SavedState(state)

    def follow(self, saved: SavedState, new: Tensor, redo: Remake, undo: Remake) -> SavedState:
        """What stands for `new`, which `redo` made of the state of `saved`. What `redo` and `undo` hold must be
        `detached`, and neither may hold `new`: it would keep itself."""
        if not new.requires_grad:
            return SavedState(new)
        keep = self.plan == "recover" or (saved.depth + 1) % self.every == 0
        after = SavedState(new, keep, saved.depth + 1)
        saved.after = weakref.ref(after)
        if self.plan == "recover":
            saved.source, saved.remake = after, undo
            if saved.depth:
                saved.kept = None
        elif not keep:
            after.source, after.remake = saved, redo
        return after


def standing_in(saved: SavedState | None, state: Tensor) -> AbstractContextManager[Any]:
    """Within, what is saved for the backward pass of this very `state`, or of a view of all of it, is `saved`."""
    if saved is None:
        return nullcontext()
    # What is saved holds the hooks: they must not hold the state.
    own = _extent(state)

    def pack(tensor: Tensor) -> Any:
        # Hooks are given an alias of what is saved, never the object: it is known by the memory that it shares.
        same = _extent(tensor) == own
        # Detached: a node that saves its own result would otherwise hold itself.
        return (saved, tensor.shape, tensor.stride()) if same else tensor.detach()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        saved, shape, stride = packed
        return saved.value().as_strided(shape, stride)  # type: ignore[no-any-return]

    return saved_tensors_hooks(pack, unpack)


def _extent(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def attach(state: Tensor, saved: SavedState | None) -> Tensor:
    """`state`, the graph node that made it carrying what stands for it; a change in place gives it another node."""
    if saved is not None and (node := state.grad_fn) is not None:
        notes, key = _notes(state), (SavedState, state.output_nr)
        notes[key] = saved
        # A graph may be held long after its backward pass has freed what it saved.
        node.register_hook(lambda *_: notes.pop(key, None) and None)
    return state


def attached(state: Tensor) -> SavedState | None:
    """What `attach` gave the node that made this tensor."""
    return _notes(state).get((SavedState, state.output_nr))


def _notes(state: Tensor) -> dict[Any, Any]:
    return {} if state.grad_fn is None else state.grad_fn.metadata  # type: ignore[return-value]
