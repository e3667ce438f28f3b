"""The residual that joins the parts around any branch: compress -> norm -> branch -> rewrite.

Shapes: V value channels, D compute width, r rank; `...` leading axes, the last of them the token axis where a part
needs one. x_in is the compressed state, c its norm, h = F(c) the branch output.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.nn.compression import build_compression
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.direction import BranchDirection, build_direction, normalisation
from deepdelta.nn.gate import Gate
from deepdelta.nn.layout import Layout, check_kind
from deepdelta.nn.linear import Linear, RMSNorm, precise_linear
from deepdelta.nn.plain import plain
from deepdelta.nn.reading import Folded, Opened, Reading
from deepdelta.nn.replay import Memory, detached
from deepdelta.nn.target import BranchWrite, Target
from deepdelta.ops import read_along, rewrite
from deepdelta.ops.step import FusedStep, Gating, Normalise, Rewritten, fused_step, remake, rewrite_along, scale_of


class RewriteRecord(NamedTuple):
    """One rewrite seen from inside; detached, in fp32 or wider; None where the rule has no such thing."""

    beta: Tensor | None
    """The gate of the write (of the erase for erase_only and additive_erase), (..., 1) or (..., V)."""
    erase: Tensor | None
    """The erase coefficient b, (..., 1) or (..., V)."""
    read: Tensor
    """k^T X before the rewrite, (..., V)."""
    target: Tensor | None
    """v, (..., V), on the scale of the read along k."""
    norm: Tensor
    """|k|, (...)."""
    branch_norm: Tensor
    """The size of the vector that k is made of, sqrt(|h|^2 + eps^2), (...)."""
    cosine: Tensor
    """cos(k, X_j) per value channel, (..., V); 0 where either is 0."""
    write: Tensor
    """w, (..., V), on the scale of k: what is written is k w^T."""
    direction: Tensor
    """k, (..., D)."""
    state_norm: Tensor
    """|X_j| before the rewrite, per value channel, (..., V)."""


class DeltaResidual(nn.Module):
    """A branch F with a delta residual around it; made by `DeltaStream.wrap`.

    X' = X + k (w^T - b k^T X), with w and b as the rule says (docs/method.md#rules).
    """

    def __init__(
        self, config: ResidualConfig, dim: int, std: float, layout: Layout, compression: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, self.dim, self.layout = config, dim, layout
        self.recorder: Callable[[RewriteRecord], None] | None = None
        self.intervention: Callable[[Step], Step] | None = None
        """What replaces parts of each rewrite; see `intervening`."""
        self.fused = False
        """Whether the rewrites are done by `ops.step.fused_step`; see `use_backend`."""
        self.memory = Memory()
        """What is saved of the state for the backward pass; see `use_memory`."""
        # A shared compression belongs to the residual that made it; held in a tuple, it is not registered twice.
        self._shared_compression = None if compression is None else (compression,)
        if compression is None:
            self.compression = build_compression(config, dim, std)
        self.norm = RMSNorm(dim, config.norm_eps) if config.norm == "rms" else nn.Identity()
        rule = config.rule
        if not config.writes_branch:
            self.direction = build_direction(config, dim, std)
        if config.has_gate:
            self.gate = Gate(config, dim, std, config.gate_init)
        if config.has_erase_gate:
            self.erase_gate = Gate(config, dim, std, config.erase_init)
        if config.uses_target:
            self.target = Target(config, dim, std)
        if rule == "two_gate" or (config.writes_branch and config.value_channels > 1):
            self.write = BranchWrite(config, dim, std)
        self.branch: nn.Module | None = None

    def compression_part(self) -> nn.Module:
        """The compression that this residual reads through, its own or another's."""
        return self._shared_compression[0] if self._shared_compression else self.compression

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
        return self._open(state, self.reading(), norm)

    def _open(
        self, state: Tensor, reading: Reading, norm: nn.Module | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.layout.check_state(state, self.config.value_channels, self.dim)
        if self.config.needs_tokens and state.ndim < 3:
            raise UserError(
                f"compression='{self.config.compression}' with expansion='{self.config.expansion}' works over a token "
                f"axis: a state (..., token, value channels, width) is needed, got shape {tuple(state.shape)}."
            )
        # The norm's first: a branch may have parameters of another kind.
        parameter = self.norm.weight if isinstance(self.norm, RMSNorm) else next(self.parameters(), None)
        check_kind("the state", state, "residual", parameter)
        state_VD = self.memory.hand_on(state, self.layout.state_inward(state))
        with self.memory.watching(state_VD):
            opened = reading.open(state_VD)
            if norm is not None:
                opened = opened._replace(c=norm(opened.c))
        return self.layout.outward(opened.c), partial(self._close, opened)

    def forward(
        self, state: Float[Tensor, "..."] | Opened, *args: Any, reading: Reading | None = None, **kwargs: Any
    ) -> Any:
        """The rewritten state; of a branch that returns a tuple the first element is h and the others pass through.

        A state is known by its last axes alone: vectors that were not expanded, of V tokens, are taken for one.

        Models that know their order of residuals hand on an opened state instead, with the reading that follows:
        `opened = residual(opened, following)`, extra arguments going to the branch. Where the fused step can, it opens
        in the rewrite's own pass. `reading` takes the place of this residual's own, as in cached decoding.
        """
        if self.branch is None:
            raise UserError("this residual wraps no branch: use `c, rewrite = residual.open(state)`.")
        if isinstance(state, Opened):
            return self._advance(state, *args)
        c_D, close = self._open(state, self.reading() if reading is None else reading)
        output = self.branch(c_D, *args, **kwargs)
        if isinstance(output, tuple):
            return (close(output[0]), *output[1:])
        return close(output)

    def reading(self) -> Reading:
        """How this residual reads the state for its branch."""
        needs_x_in = self.config.uses_target and self.config.target in ("scaled_sigmoid", "linear_input")
        return Reading(self.compression_part(), self.norm, needs_x_in)

    def _advance(self, opened: Opened, following: Reading, *args: Any) -> Opened:
        assert self.branch is not None and not self.layout.channel_first
        folded = following.folded() if self.runs_fused() else None
        h_D = self.branch(opened.c, *args)
        if folded is None:
            state_VD = self._rewritten(opened, h_D)
            with self.memory.watching(state_VD):
                return following.open(state_VD)
        *earlier, last = self._steps(opened, h_D)
        state_VD = opened.state
        for step in earlier:
            state_VD = self._fused(state_VD, step).state
        state_VD, c_D, _ = self._fused(state_VD, last, folded)
        assert c_D is not None
        return Opened(state_VD, None, c_D)

    def _fused(self, state_VD: Tensor, step: "Step", folded: Folded | None = None) -> FusedStep:
        opening = (None, None, 0.0) if folded is None else folded
        with self.memory.watching(state_VD):
            result = fused_step(
                state_VD,
                step.h,
                step.write,
                step.erase,
                step.normalise,
                *opening,
                opens=folded is not None,
                gating=step.gating,
            )
        self.memory.follow(
            state_VD, result.state, partial(remake, result.done), partial(remake, result.done, backwards=True)
        )
        return result

    def runs_fused(self) -> bool:
        """Whether the fused step rewrites now: never under a recorder or an intervention, which it would pass by."""
        return self.fused and self.recorder is None and self.intervention is None

    def _close(self, opened: Opened, h: Tensor) -> Tensor:
        if not isinstance(h, Tensor):
            raise UserError(
                f"the branch must return a tensor, or a tuple that starts with one, got {type(h).__name__}; wrap a "
                "module that returns its output so."
            )
        if h.device != opened.c.device:
            raise UserError(
                f"the branch must return its output on the device of its input, {opened.c.device}, got {h.device}; "
                "move it with .to(device)."
            )
        h_D = self.layout.inward(h)
        if h_D.shape != opened.c.shape:
            raise UserError(
                "the branch must return its output in the shape of its input, "
                f"{tuple(self.layout.outward(opened.c).shape)}, got {tuple(h.shape)}; where the width changes, reduce "
                "the state and expand it again."
            )
        state_VD = self._rewritten(opened, h_D)
        return self.memory.hand_on(state_VD, self.layout.state_outward(state_VD))

    def _rewritten(self, opened: Opened, h_D: Tensor) -> Tensor:
        state_VD = opened.state
        for step in self._steps(opened, h_D):
            if self.runs_fused():
                state_VD = self._fused(state_VD, step).state
                continue
            if self.intervention is not None:
                step = self.intervention(step)
            with self.memory.watching(state_VD):
                rewritten = rewrite_along(state_VD, step.h, step.write, step.erase, step.normalise)
            if self.recorder is not None:
                self.recorder(_record(state_VD, step, rewritten, self.config.direction_eps))
            if self.memory.on:
                bare, scale, read = step.detached(), detached(rewritten.scale), detached(rewritten.read)
                self.memory.follow(state_VD, rewritten.state, partial(_redo, bare), partial(_undo, bare, scale, read))
            state_VD = rewritten.state
        return state_VD

    def _steps(self, opened: Opened, h_D: Tensor) -> list["Step"]:
        """The rewrites in the order of application, w and b as the rule says (docs/method.md#rules)."""
        rule, along_h, c_D = self.config.rule, Normalise(self.config.direction_eps**2, 0), opened.c
        if (maps := self.linear_maps()) is not None:
            gating = Gating(precise_linear(c_D, *maps), self.gate.outputs, self.config.erases)
            if not self.runs_fused():
                return [self._target_step(h_D, gating.beta(), gating.target())]
            return [Step(h_D, 0.0, None, normalisation(self.config, self.dim), None, None, gating)]
        if self.config.writes_branch:
            write: Tensor | float = self.write(c_D) if hasattr(self, "write") else 1.0
            if rule == "additive":
                return [Step(h_D, write, None, along_h, None, None)]
            erase = self.erase_gate(c_D)[0]
            if rule == "additive_erase":
                return [Step(h_D, write, erase, along_h, erase, None)]
            gate = self.gate(c_D)[0]
            return [Step(h_D, gate * write, erase, along_h, gate, None)]
        vectors, gates = self.direction(opened.state, h_D), self.gate(c_D)
        targets: list[Tensor | None] = [None] * len(vectors)
        if self.config.uses_target:
            targets = list(self.target(opened.x_in, c_D, h_D, vectors))
        return [self._target_step(*parts) for parts in zip(vectors, gates, targets, strict=True)]

    def linear_maps(self) -> tuple[Tensor, Tensor] | None:
        """Weights (G + V, D) and biases (G + V) of the gate's and the target's numbers as one linear map of c.

        Without a target (G, D) and (G). None where gate or target are more than that, or a module that these stand for
        is not plainly ours.
        """
        config = self.config
        if (
            config.writes_branch
            or (config.rank, config.direction, config.gate) != (1, "branch", "linear")
            or (config.uses_target and config.target != "linear")
            or config.direction_norm == "free"
        ):
            return None
        if not (plain(self.direction, BranchDirection) and plain(self.gate, Gate) and plain(self.gate.outer, Linear)):
            return None
        if config.uses_target and not (plain(self.target, Target) and plain(self.target.map, Linear)):
            return None
        weight, bias = self.gate.outer.weight, self.gate.outer.bias
        assert bias is not None
        if not config.uses_target:
            return weight, bias
        return torch.cat((weight, self.target.map.weight)), F.pad(bias, (0, config.value_channels))

    def _target_step(self, h_D: Tensor, beta: Tensor, target: Tensor | None) -> "Step":
        """delta, write_only, erase_only: w = beta v or nothing, b = beta or nothing, along k = s h."""
        write: Tensor | float = 0.0 if target is None else beta * target
        erase = beta if self.config.erases else None
        return Step(h_D, write, erase, normalisation(self.config, self.dim), beta, target)


class Step(NamedTuple):
    """One rewrite along the direction of h, as `ops.step` takes it, with the gate and the target for the recorder."""

    h: Tensor
    write: Tensor | float
    erase: Tensor | None
    normalise: Normalise
    beta: Tensor | None
    target: Tensor | None
    """v on the scale of the write: 1 + W c where |h| (1 + W c) is written along h."""
    gating: Gating | None = None
    """What a fused step is to make write and erase of."""

    def detached(self) -> "Step":
        """What is needed to do it again, without its graph."""
        return Step(detached(self.h), detached(self.write), detached(self.erase), self.normalise, None, None)


@torch.no_grad()
def _redo(step: Step, state_VD: Tensor) -> Tensor:
    return rewrite_along(state_VD, step.h, step.write, step.erase, step.normalise).state


@torch.no_grad()
def _undo(step: Step, scale: Tensor | float, read_V: Tensor | None, new_VD: Tensor) -> Tensor:
    """X = X' - h a^T with the coefficients a that the step had."""
    power = step.normalise.power if isinstance(step.write, Tensor) else 0
    coefficient = step.write * scale**power
    if step.erase is not None and read_V is not None:
        coefficient = coefficient - step.erase * scale**2 * read_V
    return rewrite(new_VD, step.h, -coefficient, None)[0]


def _record(state_VD: Tensor, step: Step, rewritten: Rewritten, eps: float) -> RewriteRecord:
    """What the rewrite used, on the scale of k; where it had no read of its own, the read along the unit direction."""
    raw_V = read_along(state_VD, step.h) if rewritten.read is None else rewritten.read
    h_D = step.h.to(raw_V.dtype)
    scale, size = scale_of(step.h, step.normalise), h_D.norm(dim=-1, keepdim=True)
    # The operator form compares the raw read with v: on the scale of k both are smaller by s. Along h v lacks |h|.
    target = None if step.target is None else step.target * scale ** (step.normalise.power - 1)
    state_norm_V = state_VD.to(raw_V.dtype).norm(dim=-1)
    sizes_V = size * state_norm_V
    cosine_V = torch.where(sizes_V > 0, raw_V / sizes_V, torch.zeros_like(raw_V))
    branch_norm = (size.square() + eps * eps).sqrt().squeeze(-1)
    power = step.normalise.power if isinstance(step.write, Tensor) else 0
    write_V = (torch.zeros_like(raw_V) + step.write) * scale ** (power - 1)
    values = (
        *(step.beta, step.erase, raw_V * scale, target, (size * scale).squeeze(-1), branch_norm, cosine_V),
        *(write_V, h_D * scale, state_norm_V),
    )
    return RewriteRecord(*(None if value is None else value.detach() for value in values))  # type: ignore[arg-type]
