"""One object that gives expand, wrap and reduce: the convention known from hyper-connections."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TypedDict, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepdelta import notebook
from deepdelta.config import from_plain, to_plain
from deepdelta.errors import UserError, nearest
from deepdelta.nn import config
from deepdelta.nn.adding import refuse_adding, unwrapped
from deepdelta.nn.backend import Work, described
from deepdelta.nn.chain import Chain
from deepdelta.nn.config import ResidualConfig, Rule, refuse_unused
from deepdelta.nn.layout import Layout, check_kind, with_width_first
from deepdelta.nn.linear import initialise
from deepdelta.nn.parts.compression import Pool, Reduce, build_compression
from deepdelta.nn.parts.expansion import build_expansion
from deepdelta.nn.presets import PRESETS, settled
from deepdelta.nn.residual import DeltaResidual
from deepdelta.nn.untrained import watch


class ResidualOptions(TypedDict, total=False):
    """The fields of `ResidualConfig` beside value_channels and rule, as editors and type checkers know them."""

    rank: int
    direction: config.Direction
    direction_pool: config.Pool
    direction_hidden: int
    direction_norm: config.DirectionNorm
    direction_eps: float
    target: config.Target
    target_init: float
    target_scale: float
    target_value: float
    gate: config.Gate
    gate_range: config.GateRange
    gate_init: float
    gate_hidden: int
    gate_hidden_bias: bool
    gate_per_channel: bool
    erase_init: float
    erase_blocks: int
    plain_start: bool
    expansion: config.Expansion
    expansion_kernel: int
    compression: config.Compression
    compression_kernel: int
    compression_causal: bool
    compression_init: config.CompressionInit
    compression_sharing: config.CompressionSharing
    query: bool
    norm: config.Norm
    norm_eps: float


class DeltaStream(nn.Module):
    """The state of a network with delta residuals: expand into it, wrap branches around it, reduce it at the end.

        stream = DeltaStream(dim=512, value_channels=4)
        block = stream.wrap(attention)          # any module (..., dim) -> (..., dim)
        x = stream.reduce(block(stream.expand(x)))

    The stream holds the expansion and the final compression, `stream.expansion` and `stream.readout`, which also stand
    in an nn.Sequential as they are; each wrapped block holds its own parts and its branch, and the stream never holds a
    block.

    Args:
        dim: D, the width of the vectors that the branches see.
        value_channels: V, how many such vectors the state holds; 1 keeps the network's state as it is. None stands for
            the preset's, or for 4, and for 1 with rule 'additive', which then is the plain residual
            x + branch(norm(x)) (with compression 'channel').
        rule: how the state is rewritten (docs/method.md#rules); None stands for the preset's.
        preset: a name in `deepdelta.PRESETS`, whose settings the options are laid over. With neither rule nor preset it
            is `plain-start`: X' = X + h w_h^T - a beta k (k^T X), which starts as the plain residual (a = 0, w_h = 1).
        reduce: how `reduce` reads the state: learned, by a compression of the stream's own; sum or mean, of the value
            channels, without parameters.
        channel_first: vectors are (N, C, *space) and states (N, V, C, *space), as convolutional networks have them,
            instead of (..., D) and (..., V, D).
        seed: what the parameters are drawn from, together with their names; None takes it from torch's generator.
        init_factor: matrices start N(0, (init_factor / sqrt(dim))^2).
        options: the other fields of `ResidualConfig`: direction, target, gate, expansion, compression and so on.

    Raises:
        UserError: an unknown option or preset (the nearest valid one is named), settings that do not go together, or
            one that this residual does not use.
    """

    def __init__(
        self,
        dim: int,
        value_channels: int | None = None,
        rule: Rule | None = None,
        *,
        preset: str | None = None,
        reduce: Reduce = "learned",
        channel_first: bool = False,
        seed: int | None = None,
        init_factor: float = 0.5,
        **options: Unpack[ResidualOptions],
    ) -> None:
        super().__init__()
        if dim < 1:
            raise UserError(f"dim must be at least 1, got {dim}.")
        known = [field.name for field in fields(ResidualConfig)]
        if unknown := sorted(options.keys() - known):
            own = ("preset", "reduce", "channel_first", "seed", "init_factor")
            raise UserError(f"DeltaStream: unknown key '{unknown[0]}'; {nearest(unknown[0], [*known, *own])}")
        first = {"preset": preset, "value_channels": value_channels, "rule": rule}
        given = {name: value for name, value in first.items() if value is not None} | options
        if rule is None and preset is None:
            given["preset"] = "plain-start"
        self.config = from_plain(ResidualConfig, settled(given), where="DeltaStream")
        refuse_unused(self.config, given, "DeltaStream")
        self.config.check_width(dim)
        if channel_first and self.config.needs_tokens:
            raise UserError(
                "channel_first=True has no token axis; use expansion='repeat' and compression='channel' or "
                "'channel_conv'."
            )
        self.dim, self.std, self.layout = dim, init_factor / math.sqrt(dim), Layout(channel_first)
        # On the CPU whatever the default device: on 'meta' there would be no number.
        self.seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        self.expansion = build_expansion(self.config, dim)
        if reduce not in get_args(Reduce):
            raise UserError(f"DeltaStream: there is no reduce='{reduce}'; {nearest(str(reduce), get_args(Reduce))}")
        self.readout = build_compression(self.config, dim, self.std) if reduce == "learned" else Pool(reduce)
        if channel_first:
            with_width_first(self.expansion, self.readout)
        self._wrapped = 0
        initialise(self, self.seed, "stream")

    def extra_repr(self) -> str:
        # Of residuals that `wrap` makes; the readout may have no parameter, and then lies nowhere.
        where = next(self.parameters(), torch.empty(0))
        work = Work.rewrite(self.config, self.dim, self.layout.channel_first)
        return (
            f"dim={self.dim}, value_channels={self.config.value_channels}, rule={self.config.rule}, "
            f"residuals start as backend={described('auto', work, where)}"
        )

    def _repr_html_(self) -> str:
        """For a notebook: its width and every setting that is not the default one of its rule."""
        usual = PRESETS["plain-start"] if self.config.plain_start else ResidualConfig(rule=self.config.rule)
        plain, default = to_plain(self.config), to_plain(usual)
        rows: list[tuple[str, object]] = [("dim", self.dim), ("value_channels", self.config.value_channels)]
        rows += [("rule", self.config.rule), ("parameters", f"{sum(p.numel() for p in self.parameters()):,}")]
        rows += [(name, value) for name, value in plain.items() if value != default[name] and name not in dict(rows)]
        return notebook.table("DeltaStream", rows)

    def expand(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The state (..., V, D) of vectors (..., D), or (N, V, C, *space) of (N, C, *space)."""
        self.layout.check_vectors(x, self.dim)
        self._check_tokens(x.ndim - 1, x)
        check_kind("x", x, "stream", next(self.expansion.parameters(), None))
        return self.expansion(x)  # type: ignore[no-any-return]

    def wrap(
        self,
        branch: nn.Module | None = None,
        *,
        norm: nn.Module | None = None,
        share_compression: DeltaResidual | None = None,
    ) -> DeltaResidual:
        """A module that replaces x + branch(norm(x)) by the rewrite of the state.

        Args:
            branch: any module from vectors to vectors of the same shape; extra arguments pass through, and of a
                returned tuple, list or dictionary the first value is the branch output. None leaves the manual form
                `residual.open(state)`.
            norm: a norm that the network has already, from vectors to vectors, in place of the residual's own (with
                norm='none'); it becomes the residual's `norm`. In a chain, nn.RMSNorm and those of transformers that
                are the same run in the fused pass, others after it.
            share_compression: another residual of this stream whose compression this one uses too (the authors' code
                shares one between the attention and the MLP of a block); it stays that residual's own.

        Raises:
            UserError: a branch that is known to add its input itself, or a second norm.
        """
        if branch is not None:
            refuse_adding(branch)
        if norm is not None and self.config.norm != "none":
            raise UserError(
                f"wrap(norm=...) takes the place of the residual's own norm: make the stream with norm='none', got "
                f"norm='{self.config.norm}'."
            )
        if share_compression is not None:
            other = share_compression.config, share_compression.dim
            if other != (self.config, self.dim):
                raise UserError(
                    f"share_compression must be a residual of a stream with these settings and width {self.dim}, got "
                    f"one of width {share_compression.dim} with {share_compression.config}."
                )
        shared = None if share_compression is None else share_compression.compression_part()
        residual = DeltaResidual(self.config, self.dim, self.std, self.layout, shared)
        initialise(residual, self.seed, f"residual{self._wrapped}")
        self._wrapped += 1
        # Set after the start of the parameters: those of branch and norm are their owner's.
        residual.branch = branch
        if norm is not None:
            residual.norm = norm
        watch(self, residual)
        return residual

    def chain(self, modules: Iterable[nn.Module] | Mapping[str, nn.Module]) -> Chain:
        """One module of residuals of this stream that follow one another: each rewrite opens the next in its own pass.

            blocks = stream.chain([stream.wrap(attention), stream.wrap(mlp), stream.wrap(another)])
            state = blocks(state, mask=mask)  # extra arguments go to every branch

        It is an nn.Sequential, and gives what its members give one after another.

        Args:
            modules: residuals made by `wrap`; a mapping names them. Any other module (also a branch that is not
                wrapped) is called with the state alone, and what it returns goes on.

        Raises:
            UserError: a residual without a branch, or of a stream of another shape; when it is called, a branch or
                module that returns anything but one tensor.
        """
        chain = Chain(OrderedDict(modules)) if isinstance(modules, Mapping) else Chain(*modules)
        for name, module in chain.named_children():
            residual = unwrapped(module)
            if isinstance(residual, DeltaResidual):
                residual.wrapped()
                own = self.config.value_channels, self.dim, self.layout.channel_first
                if residual.shape() != own:
                    raise UserError(
                        f"a chain takes residuals of a stream with (value channels, width, channel-first) = {own}, got "
                        f"'{name}' with {residual.shape()}; reduce the state there and expand it into the next stream."
                    )
        return chain

    def map_channels(self, module: nn.Module, state: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Apply a module from vectors to vectors to every value channel of the state alike.

        For what a network does to its plain state outside of residuals: the shortcut map of a change of stage, a norm
        after the addition. Width and resolution may change.
        """
        self.layout.check_state(state, self.config.value_channels, self.dim)
        axis = 1 if self.layout.channel_first else -2
        channels_first = state.movedim(axis, 0)
        mapped = module(channels_first.flatten(0, 1)) if channels_first.ndim > 2 else module(channels_first)
        if channels_first.ndim > 2:
            mapped = mapped.unflatten(0, channels_first.shape[:2])
        return mapped.movedim(0, axis)  # type: ignore[no-any-return]

    def reduce(self, state: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Vectors of a state, by the stream's own compression."""
        self.layout.check_state(state, self.config.value_channels, self.dim)
        self._check_tokens(state.ndim - 2, state)
        check_kind("the state", state, "stream", next(self.readout.parameters(), None))
        return self.readout(state)  # type: ignore[no-any-return]

    def _check_tokens(self, leading: int, tensor: Tensor) -> None:
        if self.config.needs_tokens and leading < 1:
            raise UserError(
                f"expansion='{self.config.expansion}' with compression='{self.config.compression}' works over a "
                f"token axis: (..., token, width) is needed, got shape {tuple(tensor.shape)}."
            )
