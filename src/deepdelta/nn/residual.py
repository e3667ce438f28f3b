"""The residual that joins the parts around any branch: compress -> norm -> branch -> rewrite.

Shapes: V value channels, D compute width, r rank; `...` leading axes, the last of them the token axis where a part
needs one. x_in is the compressed state, c its norm, h = F(c) the branch output.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.nn.activation_memory import MemoryPlan, attach, attached, detached, standing_in
from deepdelta.nn.backend import Backend, Work, described, runs_fused
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.input_map import InputMap, StreamState
from deepdelta.nn.layout import Layout, check_kind
from deepdelta.nn.linear import Linear, RMSNorm, precise_linear
from deepdelta.nn.parts.compression import build_compression
from deepdelta.nn.parts.direction import BranchDirection, build_direction, normalisation
from deepdelta.nn.parts.gate import Gate
from deepdelta.nn.parts.query import Query
from deepdelta.nn.parts.target import BranchWrite, ChannelWrite, Target
from deepdelta.nn.plain import plain
from deepdelta.nn.rewriting import Remakes, RewriteRecord, Step, fused, record, redo, undo
from deepdelta.ops.step import Gating, Normalise, rewrite_along


class Runtime(NamedTuple):
    """How a residual runs; changed by `use_backend`, `use_memory`, `recording` and `intervening` alone."""

    backend: Backend = "auto"
    memory: MemoryPlan = MemoryPlan()
    recorder: Callable[[RewriteRecord], None] | None = None
    intervention: "Callable[[Step], Step] | None" = None
    """What replaces parts of each rewrite."""

    @property
    def may_fuse(self) -> bool:
        """Whether fused code may rewrite now: never under a recorder or an intervention, which it would pass by."""
        return self.backend != "reference" and self.recorder is None and self.intervention is None


def _first(output: Any) -> Any:
    """h of what a branch returns."""
    if isinstance(output, dict):
        return next(iter(output.values()), None)
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output


def _blocks(h_D: Tensor, count: int) -> list[Tensor]:
    """h cut into blocks of its width, each with zeros in the place of the others."""
    if count == 1:
        return [h_D]
    width = h_D.shape[-1] // count
    parts = h_D.chunk(count, -1)
    return [F.pad(part, (width * place, width * (count - 1 - place))) for place, part in enumerate(parts)]


def _replaced(output: Any, state: Tensor) -> Any:
    """What a branch returned, with the state in the place of h."""
    if isinstance(output, dict):
        # A copy of its kind: the outputs of transformers are dictionaries with attributes.
        changed = copy.copy(output)
        changed[next(iter(output))] = state
        return changed
    if isinstance(output, list):
        return [state, *output[1:]]
    if isinstance(output, tuple):
        return type(output)(*(state, *output[1:])) if hasattr(output, "_fields") else (state, *output[1:])
    return state


class DeltaResidual(nn.Module):
    """A branch F with a delta residual around it; made by `DeltaStream.wrap`.

    X' = X + k (w^T - b k^T X), with w and b as the rule says (docs/method.md#rules). Parts that the rule does not use
    are None.
    """

    def __init__(
        self, config: ResidualConfig, dim: int, std: float, layout: Layout, compression: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, self.dim, self.layout, self.runtime = config, dim, layout, Runtime()
        self.work = Work.rewrite(config, dim, layout.channel_first)
        # A shared compression belongs to the residual that made it; held in a tuple, it is not registered twice.
        self._shared_compression = None if compression is None else (compression,)
        self.compression = build_compression(config, dim, std) if compression is None else None
        self.norm: nn.Module = RMSNorm(dim, config.norm_eps) if config.norm == "rms" else nn.Identity()
        # Its maps have names that no branch has: tools choose layers by their names.
        self.ask = Query(config, dim, std) if config.query else None
        self.direction = None if config.writes_branch else build_direction(config, dim, std)
        self.gate = Gate(config, dim, std, config.gate_init) if config.has_gate else None
        self.erase_gate = Gate(config, dim, std, config.erase_init) if config.has_erase_gate else None
        self.target = Target(config, dim, std) if config.uses_target else None
        self.channels = ChannelWrite(config, dim) if config.rule == "channels" else None
        several = config.rule in ("additive", "additive_erase") and config.value_channels > 1
        self.write = BranchWrite(config, dim, std) if several or config.rule == "two_gate" else None
        self.branch: nn.Module | None = None

    def extra_repr(self) -> str:
        return f"rule={self.config.rule}, backend={described(self.runtime.backend, self.work, self._parameter())}"

    def compression_part(self) -> nn.Module:
        """The compression that this residual reads through, its own or another's."""
        part = self._shared_compression[0] if self._shared_compression else self.compression
        assert part is not None
        return part

    def input_map(self) -> InputMap:
        """How this residual reads the state for its branch."""
        needs_x_in = self.config.uses_target and self.config.target in ("scaled_sigmoid", "linear_input")
        return InputMap(self.compression_part(), self.norm, needs_x_in, self.ask)

    def open(
        self, state: Float[Tensor, "..."], norm: nn.Module | None = None
    ) -> tuple[Float[Tensor, "..."], Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]]:
        """The branch's input c, and the function that takes the branch's output h to the rewritten state.

        The manual form of this module: `branch_input, rewrite = residual.open(state)`, any computation of the
        output, then `state = rewrite(branch_output)`. With norm='none' a `norm` that the network has already can be
        given: branch and gate see what it makes of the compressed state.

        Raises:
            UserError: the state is not (..., V, D) (or (N, V, C, H, W) on a channel-first stream), lies on another
                device or has another dtype than the parameters, or the output is no tensor of the input's shape on its
                device.
        """
        given = self.opened(state, self.input_map(), norm)
        return self.branch_input(given), lambda h: self.closed(self.rewrite(given, h))

    def forward(self, state: Float[Tensor, "..."], *args: Any, input_map: InputMap | None = None, **kwargs: Any) -> Any:
        """The rewritten state; of a branch that returns a tuple, a list or a dictionary the first value is h, and what
        comes back is of the same kind, with the others as they were.

        A state is known by its last axes alone: vectors that were not expanded, of V tokens, are taken for one. Of a
        list of residuals that follow one another make a `DeltaStream.chain`. `input_map` takes the place of this
        residual's own, as in cached decoding.
        """
        branch, given = self.wrapped(), self.opened(state, input_map or self.input_map())
        output = branch(self.branch_input(given), *args, **kwargs)
        return _replaced(output, self.closed(self.rewrite(given, _first(output))))

    def wrapped(self) -> nn.Module:
        """The branch; refused where there is none."""
        if self.branch is None:
            raise UserError("this residual wraps no branch: use `c, rewrite = residual.open(state)`.")
        return self.branch

    def shape(self) -> tuple[int, int, bool]:
        """V, D, and whether they stand channel-first."""
        return self.config.value_channels, self.dim, self.layout.channel_first

    def check(self, state_VD: Tensor) -> None:
        """Refuse a state (..., V, D) without the token axis, or on another device or of another dtype than the
        parameters."""
        if self.config.needs_tokens and state_VD.ndim < 3:
            raise UserError(
                f"compression='{self.config.compression}' with expansion='{self.config.expansion}' works over a token "
                f"axis: a state (..., token, value channels, width) is needed, got shape {tuple(state_VD.shape)}."
            )
        check_kind("the state", state_VD, "residual", self._parameter())

    def _parameter(self) -> Tensor | None:
        """One that is of the state's kind; the norm's first: a branch may have parameters of another kind."""
        if isinstance(self.norm, RMSNorm):
            return self.norm.weight
        return next(chain(self.norm.parameters(), self.parameters()), None)

    def opened(self, state: Tensor, input_map: InputMap, norm: nn.Module | None = None) -> StreamState:
        """A state as the user has it, read by `input_map`, and by a `norm` of the network's own."""
        self.layout.check_state(state, self.config.value_channels, self.dim)
        state_VD = self.layout.state_inward(state)
        self.check(state_VD)
        # Of the tensor as it came: its view has a node of its own.
        memory = self.runtime.memory
        saved = memory.saved(state_VD, attached(state) if memory.on else None)
        reading = input_map if norm is None else replace(input_map, norm=norm)
        with standing_in(saved, state_VD):
            return reading(StreamState(state_VD, saved))

    def branch_input(self, given: StreamState) -> Tensor:
        """c as the branch sees it."""
        return self.layout.outward(given.read())

    def closed(self, after: StreamState) -> Tensor:
        """The state as the user has it."""
        return attach(self.layout.state_outward(after.state), after.saved)

    def rewrite(self, given: StreamState, h: Tensor, following: InputMap | None = None) -> StreamState:
        """The state rewritten with the branch's output h, and read by the input map that follows, if one is given:
        where the fused step can, in the rewrite's own pass."""
        h_D, runtime, c_D = self._checked(h, given), self.runtime, None
        if following is not None and following.one_token is not None and runtime.may_fuse:
            state_VD, c_D = following.one_token(given.state, h_D, given.read())
            return following(StreamState(state_VD)) if c_D is None else StreamState(state_VD, c=c_D)
        state_VD, saved = given.state, runtime.memory.saved(given.state, given.saved)
        fuses = runtime.may_fuse and runs_fused(runtime.backend, self.work, state_VD, state_VD.numel())
        weights = following.weights(state_VD.dtype) if following is not None and fuses else None
        steps = self._steps(given, h_D, fuses)
        for step in steps:
            with standing_in(saved, state_VD):
                if fuses:
                    opening = weights if step is steps[-1] else None
                    new_VD, c_D, remakes = fused(state_VD, step.along(state_VD), opening)
                else:
                    new_VD, remakes = self._reference(state_VD, step)
            if saved is not None:
                saved = runtime.memory.follow(saved, new_VD, *remakes())
            state_VD = new_VD
        after = StreamState(state_VD, saved)
        if following is None:
            return after
        with standing_in(saved, state_VD):
            return following(after) if weights is None or c_D is None else following.opened(after, weights, c_D)

    def _reference(self, state_VD: Tensor, step: "Step") -> "tuple[Tensor, Remakes]":
        """X' and what makes X' of X and X of X'."""
        if self.runtime.intervention is not None:
            step = self.runtime.intervention(step)
        along = step.along(state_VD)
        new_VD, read_V, scale = rewritten = rewrite_along(state_VD, along.h, along.write, along.erase, along.normalise)
        if self.runtime.recorder is not None:
            seen_VD = state_VD
            if step.across:
                seen_VD = state_VD.mT
                rewritten = rewrite_along(seen_VD, step.h, step.write, step.erase, step.normalise)
            self.runtime.recorder(record(seen_VD, step, rewritten, self.config.direction_eps))
        bare = along.detached
        return new_VD, lambda: (partial(redo, bare()), partial(undo, bare(), detached(scale), detached(read_V)))

    def _checked(self, h: Tensor, given: StreamState) -> Tensor:
        """The branch's output, (..., D)."""
        c = self.branch_input(given)
        if not isinstance(h, Tensor):
            raise UserError(
                "the branch must return a tensor, or a tuple, list or dictionary that starts with one, got "
                f"{type(h).__name__}; wrap a module that returns its output so."
            )
        if h.device != c.device:
            raise UserError(
                f"the branch must return its output on the device of its input, {c.device}, got {h.device}; "
                "move it with .to(device)."
            )
        if h.shape != c.shape:
            raise UserError(
                f"the branch must return its output in the shape of its input, {tuple(c.shape)}, got {tuple(h.shape)}; "
                "where the width changes, reduce the state and expand it again."
            )
        return self.layout.inward(h)

    def _steps(self, given: StreamState, h_D: Tensor, fuses: bool) -> list["Step"]:
        """The rewrites in the order of application, w and b as the rule says (docs/method.md#rules); a fused step makes
        both of a gating itself."""
        config, along_h, c_D = self.config, normalisation(self.config, self.dim), given.read()
        if (maps := self.linear_maps()) is not None:
            gating = self.gating(precise_linear(c_D, *maps))
            if fuses:
                return [Step(h_D, 0.0, None, along_h, None, None, gating)]
            if gating.share is None:
                return [self._target_step(h_D, gating.beta(), gating.target())]
            w, b = gating.coefficients()
            return [Step(h_D, w, b, along_h, b, None)]
        if self.channels is not None:
            assert self.gate is not None
            (k_V, w), b = self.channels(c_D), self.gate(c_D)[0]
            return [Step(k_V, w * h_D.to(w.dtype), b, Normalise(None, 0), b, None, across=True)]
        if config.writes_branch:
            write: Tensor | float = 1.0 if self.write is None else self.write(c_D)
            if self.erase_gate is None:
                return [Step(h_D, write, None, along_h, None, None)]
            erase = self.erase_gate(c_D)[0]
            if self.gate is None:
                parts = zip(_blocks(h_D, config.erase_blocks), erase.chunk(config.erase_blocks, -1), strict=True)
                return [Step(part_D, write, b, along_h, b, None) for part_D, b in parts]
            gate = self.gate(c_D)[0]
            return [Step(h_D, gate * write, erase, along_h, gate, None)]
        assert self.direction is not None and self.gate is not None
        vectors, gates = self.direction(given.state, h_D), self.gate(c_D)
        targets: list[Tensor | None] = [None] * len(vectors)
        if self.target is not None:
            targets = list(self.target(given.x_in, c_D, h_D, vectors))
        return [self._target_step(*parts) for parts in zip(vectors, gates, targets, strict=True)]

    def linear_maps(self) -> tuple[Tensor, Tensor] | None:
        """Weights (G + V, D) and biases (G + V) of the gate's and the write's numbers as one linear map of c.

        Without a target or a map of what is written (G, D) and (G). None where they are more than that, or a module
        that these stand for is not plainly ours.
        """
        gate = self._gate()
        writes = self.write if self.target is None else self.target
        if not self.config.linear_gating or not (plain(gate, Gate) and plain(gate.outer, Linear)):
            return None
        if self.direction is not None and not plain(self.direction, BranchDirection):
            return None
        weight, bias = gate.outer.weight, gate.outer.bias
        assert bias is not None
        if writes is None:
            return weight, bias
        if not ((plain(writes, Target) or plain(writes, BranchWrite)) and plain(writes.map, Linear)):
            return None
        more_weight, more_bias = writes.linear_map()
        return torch.cat((weight, more_weight)), torch.cat((bias, more_bias))

    def _gate(self) -> nn.Module | None:
        """The gate whose beta is b, or scales w."""
        return self.erase_gate if self.config.rule == "additive_erase" else self.gate

    def gating(self, numbers: Tensor) -> Gating:
        """What `linear_maps` made of c, with what else the gate has."""
        gate = self._gate()
        assert isinstance(gate, Gate)
        factor = None if gate.opening is None else gate.opening.to(numbers.dtype)
        if gate.range != 2:
            factor = numbers.new_full((1,), gate.range / 2) if factor is None else factor * (gate.range / 2)
        share = None
        if self.config.writes_branch:
            share = 1.0 if self.write is None else self.write.share
        return Gating(numbers, gate.outputs, self.config.erases, share, factor)

    def _target_step(self, h_D: Tensor, beta: Tensor, target: Tensor | None) -> "Step":
        """delta, write_only, erase_only: w = beta v or nothing, b = beta or nothing, along k = s h."""
        write: Tensor | float = 0.0 if target is None else beta * target
        erase = beta if self.config.erases else None
        return Step(h_D, write, erase, normalisation(self.config, self.dim), beta, target)
