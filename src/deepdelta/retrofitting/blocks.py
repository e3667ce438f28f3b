"""How a network's own blocks become delta blocks in place: another class with another forward, and one more child.

Names of the network's parameters stay as they are, nothing of it is copied, and every change is noted so that it can
be taken back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepdelta.errors import UserError
from deepdelta.nn import DeltaResidual, DeltaStream
from deepdelta.nn.input_map import InputMap, StreamState
from deepdelta.retrofitting.config import RetrofitConfig
from deepdelta.retrofitting.describing import full_name
from deepdelta.retrofitting.places import join


class Absent:
    """Stands for an attribute that was not there; a class, which a deep copy leaves the same."""


class Opening(NamedTuple):
    """A residual on its way: what it read of the state, and what is left to do."""

    residual: DeltaResidual
    given: StreamState

    def x_in(self) -> Tensor:
        """The compressed state."""
        assert self.given.x_in is not None
        return self.residual.layout.outward(self.given.x_in)

    def c(self) -> Tensor:
        """x_in, normed."""
        return self.residual.branch_input(self.given)

    def rewrite(self, h: Tensor) -> Tensor:
        """The state after it, of the branch's output."""
        return self.residual.closed(self.residual.rewrite(self.given, h))

    def onward(self, h: Tensor, reading: InputMap) -> StreamState:
        """The same, read by the next residual of the block: where the fused step can, in the rewrite's own pass."""
        return self.residual.rewrite(self.given, h, reading)


class Deltas(nn.Module):
    """What a block is given: a residual for each of its additions, and the way into and out of the state.

    Args:
        residuals: by name, in the order of application.
        entry: the stream that a block expands its input into: of the first block of a stack, or of every block where
            a plain input is known by its axes.
        plain_axes: the axes of a plain input; a state has one more. None: whatever comes to a block with an entry is
            plain.
        stream: the stream whose state the last block reduces.
        before: the stream whose state ends in this block, which changes the width.
    """

    def __init__(
        self,
        residuals: Mapping[str, DeltaResidual],
        entry: DeltaStream | None = None,
        plain_axes: int | None = None,
        stream: DeltaStream | None = None,
        before: DeltaStream | None = None,
    ) -> None:
        super().__init__()
        for name, residual in residuals.items():
            self.add_module(name, residual)
        # Not registered here: what a stream learns is its readout, and that belongs to the block that reads it out.
        self._entry = None if entry is None else (entry,)
        self.plain_axes = plain_axes
        self.stream = stream
        self.before = before

    def enter(self, x: Tensor) -> Tensor:
        """The state: of a plain input where this block can begin a stack, else what came."""
        if self._entry is None or (self.plain_axes is not None and x.ndim > self.plain_axes):
            return x
        return self._entry[0].expand(x)

    def reading(self, name: str, norm: nn.Module | None = None, alone: bool = True) -> InputMap:
        """How the residual `name` reads the state, and its branch, if it is `alone`, with it.

        A `norm` of the network's own stands between its reading and both branch and gate. Without one the branch reads
        x_in, and the residual's own norm, if it has one, is for the gate and W alone. At V = 1 the norm is called, not
        done in a fused pass, which would round otherwise: a retrofit starts there as the network, to the bit.
        """
        residual = self._residual(name)
        reading = residual.input_map()
        if norm is None:
            return replace(reading, needs_x_in=True)
        x_in = reading.needs_x_in or not alone or residual.config.value_channels == 1
        return replace(reading, norm=norm, needs_x_in=x_in)

    def open(self, name: str, state: Tensor | StreamState, reading: InputMap) -> Opening:
        """The residual `name` with what its branch reads of the state, unless the one before it has read that."""
        residual = self._residual(name)
        return Opening(residual, state if isinstance(state, StreamState) else residual.opened(state, reading))

    def read(self, name: str, state: Tensor) -> Tensor:
        """The vectors that a residual reads of the state, before any norm."""
        residual = self._residual(name)
        return residual.layout.outward(residual.compression_part()(residual.layout.state_inward(state)))

    def _residual(self, name: str) -> DeltaResidual:
        return self.get_submodule(name)  # type: ignore[return-value]

    def leave(self, state: Tensor) -> Tensor:
        """What the block returns: the state, in the last block of a stack its reduction."""
        return state if self.stream is None else self.stream.reduce(state)


class Remade:
    """Base of what `delta_class` mixes in: a copy and a pickle name the two classes that the class is made of."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts, usual = type(self).__bases__, super().__reduce_ex__(protocol)
        ours = len(parts) == 2 and issubclass(parts[0], Remade)
        return (_blank, parts, *usual[2:]) if ours else usual


class DeltaBlock(Remade, nn.Module):
    """Base of the delta versions of blocks: `forward` in terms of `delta` and of the block's own modules."""

    delta: Deltas
    RESIDUALS: tuple[str, ...]
    """Their names in the order of application."""


@cache
def delta_class(version: type[Remade], plain: type) -> type:
    """A subclass of `plain` with what `version` does differently, under the name that libraries look for."""
    return type(plain.__name__, (version, plain), {"__doc__": version.__doc__, "__module__": __name__})


def _blank(version: type[Remade], plain: type) -> Any:
    return object.__new__(delta_class(version, plain))  # type: ignore[arg-type]


def _known_again(value: Any) -> Any:
    """What tells a value from another one; of a class that `delta_class` made, which no pickle can name, its parts."""
    return value.__bases__ if isinstance(value, type) else value


class Job:
    """One retrofit: makes streams, changes modules, and can take every change back."""

    def __init__(self, config: RetrofitConfig, names: Mapping[nn.Module, str]) -> None:
        self.config = config
        self.parts: list[str] = []
        """Names of the modules that new parameters are in."""
        self.told = False
        """Whether it has been said that what was added is frozen beside an adapter."""
        self._names = names
        self._streams = 0
        self._changes: list[tuple[Any, str, Any, Any]] = []
        self._frozen: list[tuple[nn.Module, str]] = []
        self._hooks: list[RemovableHandle] = []
        self._marked: list[tuple[Any, str, dict[str, Any]]] = []

    def stream(self, width: int, **options: Any) -> DeltaStream:
        """A stream of these vectors; each has a seed of its own."""
        assert self.config.seed is not None
        self._streams += 1
        settings = asdict(self.config.residual()) | options
        return DeltaStream(width, seed=self.config.seed + self._streams - 1, **settings)

    def part(self, module: nn.Module, child: str = "") -> None:
        """Note that `module` (or its child to be) holds new parameters."""
        self.parts.append(join(self._names[module], child))

    def change(self, module: Any, name: str, value: Any) -> None:
        """Set an attribute, so that `undo` sets it back."""
        self._changes.append((module, name, getattr(module, name, Absent), _known_again(value)))
        setattr(module, name, value)

    def convert(self, block: nn.Module, version: type[DeltaBlock], deltas: Deltas) -> None:
        """Make `block` a delta block with these residuals, on the device and in the dtype of its parameters."""
        self.part(block)
        place(deltas, block)
        self.change(block, "delta", deltas)
        vars(block).pop("forward", None)
        self.change(block, "__class__", delta_class(version, type(block)))  # type: ignore[arg-type]

    def hook(self, handle: RemovableHandle) -> None:
        """A hook that lasts as long as the retrofit."""
        self._hooks.append(handle)

    def mark(self, settings: Any, name: str, version: type[Remade], entry: dict[str, Any]) -> None:
        """Add `entry` to the attribute `name` of a library's settings, which several models may share; they become of
        the class that writes it. Settings that have been marked stay as they are."""
        if any(one is settings for one, _, _ in self._marked):
            return
        if not isinstance(settings, version):
            setattr(settings, name, [])
            settings.__class__ = delta_class(version, type(settings))  # type: ignore[arg-type]
        self._marked.append((settings, name, entry))
        getattr(settings, name).append(entry)

    def freeze(self, module: nn.Module, name: str) -> None:
        """No gradient for a parameter that has one; its module is noted, since loading may put another in its place."""
        parameter = module._parameters[name]
        if parameter is not None and parameter.requires_grad:
            parameter.requires_grad_(False)
            self._frozen.append((module, name))

    def frozen(self, requires_grad: bool) -> None:
        """Set it for what was frozen, where it still is."""
        for module, name in self._frozen:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(requires_grad)

    def check_undo(self) -> None:
        """Refuse what `undo` would break.

        Raises:
            UserError: something stands in the place of what was set, or a block has a forward of its own.
        """
        for module, name, _, value in self._changes:
            now = getattr(module, name, Absent)
            if _known_again(now) != value:
                what = now if isinstance(now, type) else type(now)
                raise UserError(
                    f"undo_retrofit must find a {type(module).__name__}'s {name.strip('_')} as retrofit left it, and "
                    f"there is {what.__module__}.{what.__qualname__}; first take off what replaced it (an adapter, "
                    "sharding)."
                )
            if name == "__class__":
                refuse_own_forward(module, "keep the delta version; take them off before you undo")

    def undo(self) -> None:
        """Everything as it was before."""
        self.frozen(True)
        for hook in self._hooks:
            hook.remove()
        for settings, name, entry in self._marked:
            getattr(settings, name).remove(entry)
            if not getattr(settings, name):
                delattr(settings, name)
                settings.__class__ = type(settings).__bases__[1]
        for module, name, value, _ in reversed(self._changes):
            if value is Absent:
                delattr(module, name)
            else:
                setattr(module, name, value)
                if name == "__class__":
                    vars(module).pop("forward", None)


def place(new: nn.Module, beside: nn.Module) -> None:
    """Give `new` the mode of `beside`, and the device and dtype of its first floating-point parameter."""
    like = next(parameter for parameter in beside.parameters() if parameter.is_floating_point())
    new.train(beside.training).to(like.device, like.dtype)


def check_blocks(owner: nn.Module, blocks: list[nn.Module], known: Iterable[str]) -> None:
    """Every block must be of a class that is known exactly: a subclass may compute something else.

    Raises:
        UserError: no blocks, a block of another class, one whose forward was replaced, or one in several places.
    """
    here, known = type(owner).__name__, list(known)
    names = ", ".join(name.rpartition(".")[2] for name in known)
    if not blocks:
        raise UserError(f"retrofit needs a {here} with at least one block, got one with none.")
    for block in blocks:
        if full_name(type(block)) not in known:
            raise UserError(
                f"retrofit knows the blocks {names} in {here}, got {type(block).__name__}, whose forward may add "
                "elsewhere; wrap its branches with deepdelta.DeltaStream."
            )
        refuse_own_forward(block, "hide the delta version; retrofit before they are set, or take them off first")
        if any(one.is_meta for one in block.parameters()) and any(has_own_forward(one) for one in block.modules()):
            raise UserError(
                f"the weights of {type(block).__name__} are offloaded, so that new ones beside them would have no "
                "values; retrofit before the model is offloaded."
            )
    if len(set(map(id, blocks))) < len(blocks):
        raise UserError(
            f"retrofit needs blocks that each stand in one place, and this {here} runs one of them several times."
        )


def has_own_forward(module: nn.Module) -> bool:
    """Whether another forward than the class's is set on the object; hooks that were taken off leave the class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def refuse_own_forward(block: nn.Module, consequence: str) -> None:
    if has_own_forward(block):
        raise UserError(
            f"{type(block).__name__} has a forward set on the object itself, as hooks of device maps do, which would "
            f"{consequence}."
        )
