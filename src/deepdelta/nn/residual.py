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

from deepdelta.errors import UserError
from deepdelta.nn.compression import build_compression
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.direction import ScaledDirection, build_direction, scaled
from deepdelta.nn.gate import Gate
from deepdelta.nn.layout import Layout
from deepdelta.nn.linear import RMSNorm
from deepdelta.nn.target import BranchWrite, Target
from deepdelta.ops import read_along, rewrite


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


class DeltaResidual(nn.Module):
    """A branch F with a delta residual around it; made by `DeltaStream.wrap`.

    X' = X + k (w^T - b k^T X), with w and b as the rule says (section 1 of the method).
    """

    def __init__(
        self, config: ResidualConfig, dim: int, std: float, layout: Layout, compression: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, self.dim, self.layout = config, dim, layout
        self.recorder: Callable[[RewriteRecord], None] | None = None
        # A shared compression belongs to the residual that made it; held in a tuple, it is not registered twice.
        self._shared_compression = None if compression is None else (compression,)
        if compression is None:
            self.compression = build_compression(config, dim, std)
        self.norm = RMSNorm(dim, config.norm_eps) if config.norm == "rms" else nn.Identity()
        rule = config.rule
        if rule != "additive":
            self.direction = build_direction(config, dim, std)
            self.gate = Gate(config, dim, std, config.erase_init if rule == "additive_erase" else config.gate_init)
        if rule == "two_gate":
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
        self, state: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]]:
        """The branch's input c, and the function that takes the branch's output h to the rewritten state.

        The manual form of this module: `branch_input, rewrite = residual.open(state)`, any computation of the
        output, then `state = rewrite(branch_output)`.

        Raises:
            UserError: the state is not (..., V, D) (or (N, V, C, H, W) on a channel-first stream), or the output has
                another shape than the branch's input.
        """
        self.layout.check_state(state, self.config.value_channels, self.dim)
        state_VD = self.layout.state_inward(state)
        x_in_D = self.compression_part()(state_VD)
        c_D = self.norm(x_in_D)
        return self.layout.outward(c_D), partial(self._close, state_VD, x_in_D, c_D)

    def forward(self, state: Float[Tensor, "..."], *args: Any, **kwargs: Any) -> Any:
        """The rewritten state; of a branch that returns a tuple the first element is h and the others pass through."""
        if self.branch is None:
            raise UserError("this residual wraps no branch: use `c, rewrite = residual.open(state)`.")
        c_D, close = self.open(state)
        output = self.branch(c_D, *args, **kwargs)
        if isinstance(output, tuple):
            return (close(output[0]), *output[1:])
        return close(output)

    def _close(self, state_VD: Tensor, x_in_D: Tensor, c_D: Tensor, h: Tensor) -> Tensor:
        h_D = self.layout.inward(h)
        if h_D.shape != x_in_D.shape:
            raise UserError(
                "the branch must return its output in the shape of its input, "
                f"{tuple(self.layout.outward(c_D).shape)}, got {tuple(h.shape)}; where the width changes, reduce the "
                "state and expand it again."
            )
        return self.layout.state_outward(self._rewritten(state_VD, x_in_D, c_D, h_D))

    def _rewritten(self, state_VD: Tensor, x_in_D: Tensor, c_D: Tensor, h_D: Tensor) -> Tensor:
        if self.config.rule == "additive":
            return self._write_branch(state_VD, c_D, h_D, None, None)
        gates = self.gate(c_D)
        if self.config.rule == "additive_erase":
            return self._write_branch(state_VD, c_D, h_D, None, gates[0])
        if self.config.rule == "two_gate":
            return self._write_branch(state_VD, c_D, h_D, gates[0], self.erase_gate(c_D)[0])
        vectors = self.direction(state_VD, h_D)
        directions = [scaled(vector, self.config) for vector in vectors]
        targets: list[Tensor | None] = [None] * self.config.rank
        if self.config.uses_target:
            targets = list(self.target(x_in_D, c_D, h_D, [direction.norm for direction in directions]))
        for direction, beta, target in zip(directions, gates, targets, strict=True):
            state_VD = self._write_target(state_VD, direction, beta, target)
        return state_VD

    def _write_target(self, state_VD: Tensor, k: ScaledDirection, beta: Tensor, target: Tensor | None) -> Tensor:
        """delta, write_only, erase_only: w = beta v or nothing, b = beta or nothing, along k = scale * vector."""
        write = 0.0 if target is None else beta * k.write_scale * target
        erase = beta * k.scale * k.scale if self.config.erases else None
        new_VD, read = rewrite(state_VD, k.vector, write, erase)
        if self.recorder is not None:
            if target is not None and k.write_scale is not k.scale:
                target = target * (k.write_scale / k.scale)
            self._record(state_VD, k, beta, beta if self.config.erases else None, read, target)
        return new_VD

    def _write_branch(
        self, state_VD: Tensor, c_D: Tensor, h_D: Tensor, beta: Tensor | None, erase: Tensor | None
    ) -> Tensor:
        """additive, additive_erase, two_gate: X + h w_h^T, minus b k (k^T X) along the unit direction of h."""
        write: Tensor | float = self.write(c_D) if hasattr(self, "write") else 1.0
        if beta is not None:
            write = beta * write
        k = scaled(h_D, self.config) if erase is not None or self.recorder is not None else None
        coefficient = erase * k.scale * k.scale if erase is not None and k is not None else None
        new_VD, read = rewrite(state_VD, h_D, write, coefficient)
        if self.recorder is not None and k is not None:
            self._record(state_VD, k, erase if beta is None else beta, erase, read, None)
        return new_VD

    def _record(
        self,
        state_VD: Tensor,
        k: ScaledDirection,
        beta: Tensor | None,
        erase: Tensor | None,
        read: Tensor | None,
        target: Tensor | None,
    ) -> None:
        """Hand over what the rewrite used; the read along the unscaled vector becomes the read along k."""
        assert self.recorder is not None
        read_V = (read_along(state_VD, k.vector) if read is None else read) * k.scale
        norm = k.vector.to(read_V.dtype).norm(dim=-1, keepdim=True) * k.scale
        sizes_V = norm * state_VD.to(read_V.dtype).norm(dim=-1)
        cosine_V = torch.where(sizes_V > 0, read_V / sizes_V, torch.zeros_like(read_V))
        values = (beta, erase, read_V, target, norm.squeeze(-1), k.norm.squeeze(-1), cosine_V)
        self.recorder(RewriteRecord(*(None if value is None else value.detach() for value in values)))  # type: ignore[arg-type]
