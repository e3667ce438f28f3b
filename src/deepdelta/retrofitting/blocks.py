"""How a network's own blocks become delta blocks in place: another class with another forward, and one more child.

Names of the network's parameters stay as they are, nothing of it is copied, and every change is noted so that it can
be taken back.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from torch import Tensor, nn

from deepdelta.errors import UserError
from deepdelta.nn import DeltaResidual, DeltaStream
from deepdelta.retrofitting.config import RetrofitConfig


class Absent:
    """Stands for an attribute that was not there; a class, which a deep copy leaves the same."""


class Deltas(nn.Module):
    """What a block is given: a residual for each of its additions, and the way into and out of the state.

    Args:
        residuals: by name, in the order of application.
        entry: the stream that the first block of a stack expands its input into.
        stream: the stream whose state the last block reduces.
        before: the stream whose state ends in this block, which changes the width.
    """

    def __init__(
        self,
        residuals: Mapping[str, DeltaResidual],
        entry: DeltaStream | None = None,
        stream: DeltaStream | None = None,
        before: DeltaStream | None = None,
    ) -> None:
        super().__init__()
        for name, residual in residuals.items():
            self.add_module(name, residual)
        # Not registered here: what a stream learns is its readout, and that belongs to the block that reads it out.
        self._entry = None if entry is None else (entry,)
        self.stream = stream
        self.before = before

    def __getitem__(self, name: str) -> DeltaResidual:
        return self.get_submodule(name)  # type: ignore[return-value]

    def enter(self, x: Tensor) -> Tensor:
        """The state: of the plain input in the first block of a stack, else what came."""
        return x if self._entry is None else self._entry[0].expand(x)

    def read(self, name: str, state: Tensor) -> Tensor:
        """The vectors that a residual reads of the state, before any norm."""
        residual = self[name]
        return residual.layout.outward(residual.compression_part()(residual.layout.state_inward(state)))

    def leave(self, state: Tensor) -> Tensor:
        """What the block returns: the state, in the last block of a stack its reduction."""
        return state if self.stream is None else self.stream.reduce(state)


class DeltaBlock(nn.Module):
    """Base of the delta versions of blocks: `forward` in terms of `delta` and of the block's own modules."""

    delta: Deltas
    RESIDUALS: tuple[str, ...]
    """Their names in the order of application."""


@cache
def delta_class(version: type[DeltaBlock], plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the block's class with the forward of its delta version: isinstance and hooks work as before."""
    return type(f"Delta{plain.__name__}", (version, plain), {"__doc__": version.__doc__, "__module__": __name__})


class Job:
    """One retrofit: makes streams, changes modules, and can take every change back."""

    def __init__(self, config: RetrofitConfig, names: Mapping[nn.Module, str]) -> None:
        self.config = config
        self.parts: list[str] = []
        """Names of the modules that new parameters are in."""
        self._names = names
        self._streams = 0
        self._changes: list[tuple[nn.Module, str, Any]] = []
        self._frozen: list[nn.Parameter] = []
        self._hooks: list[Any] = []

    def stream(self, width: int, **options: Any) -> DeltaStream:
        """A stream of these vectors; each has a seed of its own."""
        assert self.config.seed is not None
        self._streams += 1
        settings = asdict(self.config.residual()) | options
        return DeltaStream(width, seed=self.config.seed + self._streams - 1, **settings)

    def part(self, module: nn.Module, child: str = "") -> None:
        """Note that `module` (or its child to be) holds new parameters."""
        self.parts.append(".".join(filter(None, (self._names[module], child))))

    def change(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute, so that `undo` sets it back."""
        self._changes.append((module, name, getattr(module, name, Absent)))
        setattr(module, name, value)

    def convert(self, block: nn.Module, version: type[DeltaBlock], deltas: Deltas) -> None:
        """Make `block` a delta block with these residuals, on the device and in the dtype of its parameters."""
        self.part(block)
        place(deltas, block)
        self.change(block, "delta", deltas)
        self.change(block, "__class__", delta_class(version, type(block)))  # type: ignore[arg-type]

    def hook(self, module: nn.Module, function: Any) -> None:
        """A forward hook (module, args, output), for as long as the retrofit lasts."""
        self._hooks.append(module.register_forward_hook(function))

    def freeze(self, parameter: nn.Parameter) -> None:
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            self._frozen.append(parameter)

    def undo(self) -> None:
        """Everything as it was before."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        for module, name, value in reversed(self._changes):
            if value is Absent:
                delattr(module, name)
            else:
                setattr(module, name, value)


def place(new: nn.Module, beside: nn.Module) -> None:
    """Give `new` the mode of `beside`, and the device and dtype of its first floating-point parameter."""
    like = next(parameter for parameter in beside.parameters() if parameter.is_floating_point())
    new.train(beside.training).to(like.device, like.dtype)


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def check_blocks(owner: nn.Module, blocks: list[nn.Module], known: Mapping[str, type[DeltaBlock]]) -> None:
    """Every block must be of a class that is known exactly: a subclass may compute something else.

    Raises:
        UserError: no blocks, a block of another class, one whose forward was replaced, or one in several places.
    """
    here, names = type(owner).__name__, ", ".join(name.rpartition(".")[2] for name in known)
    if not blocks:
        raise UserError(f"retrofit needs a {here} with at least one block, got one with none.")
    for block in blocks:
        if full_name(type(block)) not in known:
            raise UserError(
                f"retrofit knows the blocks {names} in {here}, got {type(block).__name__}, whose forward may add "
                "elsewhere; wrap its branches with deepdelta.DeltaStream."
            )
        if "forward" in vars(block):
            raise UserError(
                f"{type(block).__name__} has a forward set on the object itself, as hooks of device maps do, and that "
                "would hide the delta version; retrofit before they are set, or take them off first."
            )
    if len(set(map(id, blocks))) < len(blocks):
        raise UserError(
            f"retrofit needs blocks that each stand in one place, and this {here} runs one of them several times."
        )
