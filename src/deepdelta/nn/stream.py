"""One object that gives expand, wrap and reduce: the convention known from hyper-connections."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepdelta.config import from_plain
from deepdelta.errors import UserError
from deepdelta.nn.compression import build_compression
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.expansion import build_expansion
from deepdelta.nn.linear import initialise
from deepdelta.nn.residual import DeltaResidual


class DeltaStream(nn.Module):
    """The state of a network with delta residuals: expand into it, wrap branches around it, reduce it at the end.

        stream = DeltaStream(dim=512, value_channels=4)
        block = stream.wrap(attention)          # any module (..., dim) -> (..., dim)
        x = stream.reduce(block(stream.expand(x)))

    The stream holds the expansion and the final compression; each wrapped block holds its own parts and its branch,
    and the stream never holds a block.

    Args:
        dim: D, the width of the vectors that the branches see.
        value_channels: V, how many such vectors the state holds; 1 keeps the network's state as it is.
        seed: what the parameters are drawn from, together with their names; None takes it from torch's generator.
        init_factor: matrices start N(0, (init_factor / sqrt(dim))^2) (section 3).
        options: the fields of `ResidualConfig`: rule, direction, target, gate, expansion, compression and so on.

    Raises:
        UserError: an unknown option (the nearest valid one is named) or settings that do not go together.
    """

    def __init__(
        self,
        dim: int,
        value_channels: int = 4,
        *,
        seed: int | None = None,
        init_factor: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise UserError(f"dim must be at least 1, got {dim}.")
        self.config = from_plain(ResidualConfig, {"value_channels": value_channels, **options}, where="DeltaStream")
        self.dim, self.std = dim, init_factor / math.sqrt(dim)
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.expansion = build_expansion(self.config, dim)
        self.readout = build_compression(self.config, dim, self.std)
        self._wrapped = 0
        initialise(self, self.seed, "stream")

    def expand(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The state (..., V, D) of vectors (..., D)."""
        if x.shape[-1] != self.dim:
            raise UserError(f"x must end in the stream's width {self.dim}, got shape {tuple(x.shape)}.")
        self._check_tokens(x.ndim - 1, x)
        return self.expansion(x)  # type: ignore[no-any-return]

    def wrap(self, branch: nn.Module | None = None, *, share_compression: DeltaResidual | None = None) -> DeltaResidual:
        """A module that replaces x + branch(norm(x)) by the rewrite of the state.

        Args:
            branch: any module (..., D) -> (..., D); extra arguments pass through, and of a returned tuple the first
                element is the branch output. None leaves the manual form `residual.open(state)`.
            share_compression: another residual of this stream whose compression this one uses too (the authors' code
                shares one between the attention and the MLP of a block); it stays that residual's own.
        """
        shared = None if share_compression is None else share_compression.compression
        residual = DeltaResidual(self.config, self.dim, self.std, None, shared)
        initialise(residual, self.seed, f"residual{self._wrapped}")
        self._wrapped += 1
        residual.branch = branch
        return residual

    def reduce(self, state: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Vectors (..., D) of a state (..., V, D), by the stream's own compression."""
        if tuple(state.shape[-2:]) != (self.config.value_channels, self.dim):
            raise UserError(
                f"the state must end in (value channels, width) = {(self.config.value_channels, self.dim)}, "
                f"got shape {tuple(state.shape)}; make it with stream.expand(x)."
            )
        self._check_tokens(state.ndim - 2, state)
        return self.readout(state)  # type: ignore[no-any-return]

    def _check_tokens(self, leading: int, tensor: Tensor) -> None:
        if self.config.needs_tokens and leading < 1:
            raise UserError(
                f"expansion='{self.config.expansion}' with compression='{self.config.compression}' works over a "
                f"token axis: (..., token, width) is needed, got shape {tuple(tensor.shape)}."
            )
