"""Activation memory: the states between residuals are not saved for the backward pass but made again in it.

A rewrite X' = X + h a^T is cheap to repeat from h, which is saved anyway, and the V numbers a per token. Saved tensors
that are the state are replaced by an `Entry`, which knows how to make it again when the backward pass asks.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from deepdelta.errors import UserError, nearest
from deepdelta.ops.derivatives import transformed

Plan = Literal["save", "replay", "recover"]
Remake = Callable[[Tensor], Tensor]
_ENTRIES = WeakTensorKeyDictionary()
"""The entry of each state that is alive: kept here, since what hangs on a tensor is pickled with it."""


class Entry:
    """A state somewhere between two residuals.

    Under `replay`, every `every`-th state is kept and the others are made again from the kept one before them, with the
    forward's own operation: bit for bit. Under `recover`, only the last state is kept and each is made from the one
    after it, X = X' - h a^T: exact but for rounding, which adds up over the layers.
    """

    made: Tensor | None

    def __init__(self, kept: Tensor | None, parent: "Entry | None", redo: Remake | None, depth: int) -> None:
        self.kept, self.made = kept, None
        self.version = 0 if kept is None else kept._version
        self.parent, self.redo, self.depth = parent, redo, depth
        self.undo: Remake | None = None
        self.child: Entry | weakref.ref[Entry] | None = None

    def value(self) -> Tensor:
        """The state itself."""
        if self.kept is not None and self.kept._version != self.version:
            raise RuntimeError(
                "a state that the backward pass needs was changed in place after the residual that made it; use the "
                "operation that returns a new tensor."
            )
        state = self.kept if self.kept is not None else self.made
        if state is None:
            state = self._recovered() if isinstance(self.child, Entry) else self._replayed()
        # The backward pass goes from the last layer to the first: what lies after has been used.
        later = self._next()
        while later is not None and later.made is not None:
            later.made, later = None, later._next()
        return state

    def _next(self) -> "Entry | None":
        return self.child() if isinstance(self.child, weakref.ref) else self.child

    def _replayed(self) -> Tensor:
        missing: list[Entry] = []
        entry = self
        while entry.kept is None and entry.made is None:
            missing.append(entry)
            assert entry.parent is not None
            entry = entry.parent
        state = entry.kept if entry.kept is not None else entry.made
        for entry in reversed(missing):
            assert entry.redo is not None and state is not None
            state = entry.made = entry.redo(state)
        assert state is not None
        return state

    def _recovered(self) -> Tensor:
        assert isinstance(self.child, Entry) and self.child.undo is not None
        self.made = self.child.undo(self.child.value())
        return self.made


Value = TypeVar("Value", Tensor, Tensor | float, Tensor | None)


def detached(value: Value) -> Value:
    """Tensors without their graph, what else there is as it is."""
    return value.detach() if isinstance(value, Tensor) else value


class Memory:
    """A plan for the states of one residual's rewrites."""

    def __init__(self, plan: Plan = "save", every: int = 8) -> None:
        self.plan, self.every = plan, every

    @property
    def on(self) -> bool:
        """Compiled code decides by itself what to save."""
        return self.plan != "save" and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def watching(self, state: Tensor) -> AbstractContextManager[None]:
        """Within, saving `state` for the backward pass saves its entry instead."""
        if not self.on or not state.requires_grad:
            return nullcontext()
        if transformed():
            raise UserError(
                f"the memory plan '{self.plan}' is for backward(), not for gradients by torch.func (grad, vjp, jacrev, "
                'hessian); for these choose use_memory(module, "save").'
            )
        return self._watching(state)

    @contextmanager
    def _watching(self, state: Tensor) -> Iterator[None]:
        entry = _entry(state)
        address, dtype = state.data_ptr(), state.dtype

        def pack(tensor: Tensor) -> Any:
            same = tensor.data_ptr() == address and tensor.dtype == dtype and tensor.numel() == state_size
            # Detached: a node that saves its own result would otherwise hold itself.
            return (entry, tensor.shape, tensor.stride()) if same else tensor.detach()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            entry, shape, stride = packed
            return entry.value().as_strided(shape, stride)  # type: ignore[no-any-return]

        state_size = state.numel()
        with saved_tensors_hooks(pack, unpack):
            yield

    def follow(self, state: Tensor, new: Tensor, redo: Remake, undo: Remake) -> None:
        """Note that `new` was made from `state` by `redo`. What `redo` and `undo` hold must be `detached`, and neither
        may hold `new`: an entry would keep its own state."""
        if not self.on or not new.requires_grad:
            return
        parent = _entry(state)
        depth = parent.depth + 1
        keep = self.plan == "recover" or depth % self.every == 0
        entry = Entry(new.detach() if keep else None, None if keep else parent, redo, depth)
        entry.version = new._version
        if self.plan == "recover":
            parent.child, entry.undo = entry, undo
            if parent.undo is not None:
                parent.kept = None
        else:
            parent.child = weakref.ref(entry)
        _ENTRIES[new] = entry

    def hand_on(self, state: Tensor, view: Tensor) -> Tensor:
        """`view` of the same state, known by the same entry."""
        entry = _known(state) if self.on else None
        if entry is not None and view is not state:
            _ENTRIES[view] = entry
        return view


def _known(state: Tensor) -> Entry | None:
    return _ENTRIES.get(state)  # type: ignore[no-untyped-call,no-any-return]


def _entry(state: Tensor) -> Entry:
    entry = _known(state)
    if entry is None or entry.version != state._version:
        # Not as a residual made it (an expansion, a user's operation in between): it is saved like any other tensor.
        entry = Entry(state.detach(), None, None, 0)
        _ENTRIES[state] = entry
    return entry


def use_memory(module: nn.Module, plan: Plan = "replay", every: int = 8) -> None:
    """Choose what every delta residual in `module` saves of its state for the backward pass (eager mode).

    - save: each state, V times what the additive model saves of its own.
    - replay: every `every`-th state; the others are made again from it, bit for bit as in the forward pass.
    - recover: the last state; each is made from the one after it, which adds rounding errors from layer to layer.

    The last two are for backward(), second derivatives by it included; gradients by torch.func are refused under them.

    Raises:
        UserError: another plan, or every < 1.
    """
    if plan not in ("save", "replay", "recover"):
        raise UserError(f"there is no memory plan '{plan}'; {nearest(plan, ('save', 'replay', 'recover'))}")
    if every < 1:
        raise UserError(f"every must be at least 1, got {every}.")
    for part in module.modules():
        if isinstance(part.__dict__.get("memory"), Memory):
            part.__dict__["memory"] = Memory(plan, every)
