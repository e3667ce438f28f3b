"""Where the width stands: last, as in sequence models, or first after the batch, as in convolutional ones.

The parts of a residual work on (..., V, D) and (..., D); a channel-first stream hands them permuted views.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepdelta.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The way between the user's axes and the library's.

    Channel-last: vectors (..., D), states (..., V, D). Channel-first: vectors (N, C, *space), states (N, V, C, *space).
    """

    channel_first: bool

    def inward(self, x: Tensor) -> Tensor:
        """Vectors to (..., D)."""
        return x.movedim(1, -1) if self.channel_first else x

    def outward(self, x_D: Tensor) -> Tensor:
        """Vectors (..., D) back."""
        return x_D.movedim(-1, 1) if self.channel_first else x_D

    def state_inward(self, state: Tensor) -> Tensor:
        """A state to (..., V, D)."""
        return state.movedim((1, 2), (-2, -1)) if self.channel_first else state

    def state_outward(self, state_VD: Tensor) -> Tensor:
        """A state (..., V, D) back."""
        return state_VD.movedim((-2, -1), (1, 2)) if self.channel_first else state_VD

    def check_vectors(self, x: Tensor, width: int) -> None:
        """Refuse vectors of another width."""
        if self.channel_first:
            if x.ndim < 3 or x.shape[1] != width:
                raise UserError(f"x must be (batch, {width}, *space) on this stream, got shape {tuple(x.shape)}.")
        elif x.ndim < 1 or x.shape[-1] != width:
            raise UserError(f"x must end in the stream's width {width}, got shape {tuple(x.shape)}.")

    def check_state(self, state: Tensor, channels: int, width: int) -> None:
        """Refuse a state of another shape."""
        if self.channel_first:
            if state.ndim < 4 or tuple(state.shape[1:3]) != (channels, width):
                raise UserError(
                    f"the state must be (batch, {channels}, {width}, *space) on this stream, got shape "
                    f"{tuple(state.shape)}; make it with stream.expand(x)."
                )
        elif tuple(state.shape[-2:]) != (channels, width):
            raise UserError(
                f"the state must end in (value channels, width) = {(channels, width)}, got shape "
                f"{tuple(state.shape)}; make it with stream.expand(x)."
            )


FIRST = Layout(True)


def with_width_first(expansion: nn.Module, readout: nn.Module) -> None:
    """Have both ends of a stream take and give what networks hold whose width stands first, called by the stream or on
    their own."""
    expansion.register_forward_pre_hook(_vectors_in)
    expansion.register_forward_hook(_state_out)
    readout.register_forward_pre_hook(_state_in)
    readout.register_forward_hook(_vectors_out)


def _vectors_in(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return FIRST.inward(args[0])


def _state_out(module: nn.Module, args: tuple[Tensor], state_VD: Tensor) -> Tensor:
    return FIRST.state_outward(state_VD)


def _state_in(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return FIRST.state_inward(args[0])


def _vectors_out(module: nn.Module, args: tuple[Tensor], x_D: Tensor) -> Tensor:
    return FIRST.outward(x_D)


def check_kind(name: str, tensor: Tensor, owner: str, parameter: Tensor | None) -> None:
    """Refuse a tensor that does not lie where its owner's parameters do, or has another dtype that autocast does not
    convert; an owner without parameters takes any, and so does one whose parameters are on 'meta': there they wait
    for hooks that bring them in (offloading), or torch itself refuses them."""
    if parameter is None or parameter.is_meta:
        return
    if tensor.device != parameter.device:
        raise UserError(
            f"{name} must be on the {owner}'s device, {parameter.device}, got {tensor.device}; move one of them with "
            ".to(device)."
        )
    if tensor.dtype != parameter.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise UserError(
            f"{name} must have the {owner}'s dtype, {parameter.dtype}, got {tensor.dtype}; convert one of them with "
            ".to(dtype), or use torch.autocast."
        )
