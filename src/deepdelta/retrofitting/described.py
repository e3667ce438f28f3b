"""What tables of blocks say, done: the blocks' forward in terms of their own modules, and the stacks that run them.

Models hand vectors from block to block untouched, so these are the state, with one axis more, from the first block's
end to the last block's beginning. A norm of the block's own stands between its reading of the state and its branch.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.nn.input_map import InputMap, StreamState
from deepdelta.retrofitting.blocks import DeltaBlock, Deltas, Job, check_blocks
from deepdelta.retrofitting.describing import Addition, Block, Branch, Stack, Takes, each, found, full_name
from deepdelta.retrofitting.families import FOUR
from deepdelta.retrofitting.huggingface import major_release


class DescribedDeltas(Deltas):
    """With the description of the block that they belong to."""

    def __init__(self, stack: Stack, description: Block, block: nn.Module, **parts: Any) -> None:
        super().__init__(plain_axes=stack.plain_axes, **parts)
        self.description, self.channel_first = description, stack.channel_first
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        self.names = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        self.defaults = {one.name: one.default for one in parameters if one.default is not one.empty}

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The vectors or the state that came, and the further arguments by name."""
        named = self.defaults | dict(zip(self.names, args, strict=False)) | kwargs
        return named.pop(self.names[0]), named

    def has(self, name: str) -> bool:
        return name in self._modules

    def map(self, module: nn.Module, state: Tensor) -> Tensor:
        """On each value channel alike."""
        assert self._entry is not None
        return self._entry[0].map_channels(module, state) if self.channel_first else module(state)


class DescribedBlock(DeltaBlock):
    """A block with delta residuals in place of the additions that its description names."""

    delta: DescribedDeltas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        delta, rest = self.delta, tuple[Any, ...]()
        state, extras = delta.given(args, kwargs)
        onward: StreamState | None = None
        additions = self._additions(extras)
        readings = [self._reading(addition) for addition in additions]
        for number, addition in enumerate(additions):
            first, before = addition.branches[0], None
            if onward is None:
                if addition.shortcut and not isinstance(shortcut := found(self, addition.shortcut), nn.Identity):
                    state, before = shortcut(state), state
                state = delta.enter(state)
            opening = delta.open(addition.name, onward or state, readings[number])
            read = opening.c if first.norm else opening.x_in
            h, more = self._output(first, read() if before is None else before, extras)
            rest += more
            for branch in addition.branches[1:]:
                norm, x_in = self._norm(branch), opening.x_in()
                other, more = self._output(branch, x_in if norm is None else norm(x_in), extras)
                h, rest = h + other, rest + more
            last = number + 1 == len(additions)
            if last or additions[number + 1].shortcut or addition.after:
                state, onward = opening.rewrite(h), None
                if addition.after:
                    state = delta.map(found(self, addition.after), state)
            else:
                onward = opening.onward(h, readings[number + 1])
        state = delta.leave(state)
        return (state, *rest) if delta.description.returns_rest else state

    def _additions(self, extras: dict[str, Any]) -> list[Addition]:
        """Those that this call makes.

        Raises:
            UserError: the block lacks the modules of one.
        """
        asked_for = [
            one for one in self.delta.description.additions if not one.given or extras.get(one.given) is not None
        ]
        for one in asked_for:
            if not self.delta.has(one.name):
                raise UserError(
                    f"{one.given} needs a {type(self).__name__} that was made with add_cross_attention=True."
                )
        return asked_for

    def _reading(self, addition: Addition) -> InputMap:
        return self.delta.reading(addition.name, self._norm(addition.branches[0]), len(addition.branches) == 1)

    def _norm(self, branch: Branch) -> nn.Module | None:
        return found(self, branch.norm) if branch.norm else None

    def _output(self, branch: Branch, x: Tensor, extras: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """F(x), and what the first step returned beside its own."""
        rest: tuple[Any, ...] = ()
        for number, step in enumerate(branch.steps):
            part = found(self, step) if isinstance(step, str) else step
            if part is None:
                continue
            if isinstance(part, Tensor):
                x = part * x
            elif isinstance(part, int | float):
                x = F.dropout(x, part, self.training)
            else:
                result = part(x, **passed(branch.takes, extras)) if number == 0 else part(x)
                x = result[0] if isinstance(result, tuple) else result
                if number == 0 and isinstance(result, tuple):
                    rest = result[1:]
        return x, rest


def passed(takes: Takes, extras: dict[str, Any]) -> dict[str, Any]:
    """What the first step gets of the block's further arguments."""
    if isinstance(takes, tuple):
        return {name: extras[name] for name in takes if name in extras}
    return {new: value for name, value in extras.items() if (new := takes.get(name, name))}


def retrofit_stack(owner: nn.Module, stack: Stack, job: Job) -> None:
    """Convert all blocks of a stack, one state through all of them.

    Raises:
        UserError: a release of transformers that is too old, blocks of other classes or with settings that have no
            description, a description that names what is not there, or another depth than the settings say.
    """
    if full_name(type(owner)).startswith("transformers.") and major_release() == 4:
        if full_name(type(owner)) not in FOUR:
            held = ", ".join(sorted(name.rpartition(".")[2] for name in FOUR))
            raise UserError(
                f"of transformers 4.57 retrofit knows {held} alone, got {type(owner).__name__}; install transformers "
                "5.24."
            )
        stack = FOUR[full_name(type(owner))]
    blocks: list[nn.Module] = each(owner, stack.path)
    known = stack.known()
    check_blocks(owner, blocks, known)
    if stack.depth and len(blocks) != (depth := found(owner, stack.depth)):
        setting = stack.depth.replace("config.", "")
        raise UserError(
            f"{type(owner).__name__} must hold as many blocks as its config says, {depth}, got {len(blocks)}; set "
            f"config.{setting} to that."
        )
    stream = job.stream(found(owner, stack.width), norm=stack.norm, channel_first=stack.channel_first)
    for i, block in enumerate(blocks):
        description = _fitting(block, known[full_name(type(block))])
        names = [one.name for one in description.additions if _present(block, one.given, one.branches)]
        _check(block, description, names, first=i == 0)
        deltas = DescribedDeltas(
            stack,
            description,
            block,
            residuals={name: stream.wrap() for name in names},
            entry=stream,
            stream=stream if i == len(blocks) - 1 else None,
        )
        job.convert(block, DescribedBlock, deltas)
    reduced = ReducedHiddenStates(stack, owner, blocks[-1])
    # The part whose forward runs the blocks first: what follows it in the owner reads its output.
    for module in dict.fromkeys((found(owner, stack.loop) if stack.loop else owner, owner)):
        job.hook(module.register_forward_hook(reduced))
    if end := next((one for name in stack.end if (one := getattr(owner, name, None)) is not None), None):
        job.hook(end.register_forward_pre_hook(reduced.before))


def _fitting(block: nn.Module, descriptions: tuple[Block, ...]) -> Block:
    """The description of a block with these settings."""
    for one in descriptions:
        if all(getattr(block, name, None) == value for name, value in one.when.items()):
            return one
    settings = {name: getattr(block, name, None) for one in descriptions for name in one.when}
    wanted = " or ".join(", ".join(f"{name}={value!r}" for name, value in one.when.items()) for one in descriptions)
    got = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    raise UserError(
        f"retrofit knows a {type(block).__name__} with {wanted}, got one with {got}; set that in its configuration, or "
        "wrap its branches with deepdelta.DeltaStream."
    )


def _present(block: nn.Module, given: str, branches: tuple[Branch, ...]) -> bool:
    """False for an addition that only some calls make, in a block that has no modules for it."""
    step = branches[0].steps[0]
    return not (given and isinstance(step, str) and not hasattr(block, step.partition(".")[0]))


def _check(block: nn.Module, description: Block, names: list[str], first: bool) -> None:
    """Everything that a description names must be there, and a map of the shortcut in the first block alone."""
    for addition in description.additions:
        if addition.name not in names:
            continue
        paths = [step for branch in addition.branches for step in (*branch.steps, branch.norm)]
        for path in (*paths, addition.after, addition.shortcut):
            if isinstance(path, str) and path:
                found(block, path)
        if addition.shortcut and not first and not isinstance(found(block, addition.shortcut), nn.Identity):
            raise UserError(
                f"retrofit knows a {type(block).__name__} that changes width or resolution as the first of its stack "
                "alone, and there is a later one; wrap the branches with deepdelta.DeltaStream."
            )


class ReducedHiddenStates:
    """What leaves the stack of blocks is reduced, whichever of them was the last to run.

    Forward hook: of every state between two blocks (`output_hidden_states=True`), what the second one reads; of the
    last, and of the output, the reduction. And a hook before what reads the stack's end, for a stack that is cut short
    (`config.num_hidden_layers`, an early exit, `layers[:n]`).
    """

    def __init__(self, stack: Stack, owner: nn.Module, last: nn.Module) -> None:
        self.stack, self.owner, self.last = stack, owner, last

    def before(self, end: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._left(args[0]), *args[1:]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(map(self._reduced, output))
        if isinstance(output, dict):
            for key in ("last_hidden_state", "hidden_states"):
                if output.get(key) is not None:
                    output[key] = self._reduced(output[key])
            return output
        return self._left(output)

    def _reduced(self, part: Any) -> Any:
        """Of a tuple of states the first is the first block's input, the last what the last block or the final norm
        returned; a tuple of anything else stays as it is."""
        if not isinstance(part, tuple) or not any(map(self._is_state, part)):
            return self._left(part)
        readers: list[Any] = [
            next(part for part in block.modules() if isinstance(part, DeltaBlock))
            for block in each(self.owner, self.stack.path.partition("*")[0] + "*")
        ]
        read = [
            reader.delta.read(reader.delta.description.additions[0].name, state) if self._is_state(state) else state
            for reader, state in zip(readers[1:], part[1:-1], strict=False)
        ]
        return part[0], *read, self._left(part[-1])

    def _left(self, state: Any) -> Any:
        last: Any = self.last
        return last.delta.leave(state) if self._is_state(state) else state

    def _is_state(self, state: Any) -> bool:
        last: Any = self.last
        stream = last.delta.stream
        shape = (stream.config.value_channels, stream.dim)
        axes = slice(1, 3) if self.stack.channel_first else slice(-2, None)
        return isinstance(state, Tensor) and state.ndim == self.stack.plain_axes + 1 and state.shape[axes] == shape
