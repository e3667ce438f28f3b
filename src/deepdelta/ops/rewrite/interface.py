"""The public signatures of the rewrite; every rule of the library is a call of `rewrite`."""

from jaxtyping import Float
from torch import Tensor

from deepdelta.errors import UserError
from deepdelta.ops.gates import check_gate
from deepdelta.ops.rewrite import reference


def rewrite(
    state: Float[Tensor, "*batch V D"],
    direction: Float[Tensor, "*batch D"],
    write: Float[Tensor, "*batch V"] | float,
    erase: Float[Tensor, "*batch #V"] | None = None,
) -> tuple[Float[Tensor, "*batch V D"], Float[Tensor, "*batch V"] | None]:
    """The primitive X' = X + k (w^T - b k^T X) (docs/method.md#rules: every rule is this with its own w and b).

    Args:
        state: X, one width-D vector per value channel.
        direction: k, of any norm. A direction k = s h may be passed as h with w scaled by s and b by s^2:
            the result is the same and k is never stored.
        write: w, one number per value channel, or one number for all.
        erase: b, one number per value channel or one for all (last axis 1); None leaves the erase term out.

    Returns:
        X' in the dtype of `state` (arithmetic in fp32, or fp64 for an fp64 state), and the read k^T X that the
        erase term used, in the precision of the arithmetic (None without erase).
    """
    return reference.rewrite(state, direction, write, erase)


def delta_rewrite(
    state: Float[Tensor, "*batch V D"],
    direction: Float[Tensor, "*batch D"],
    target: Float[Tensor, "*batch V"],
    gate: Float[Tensor, "..."],
    *,
    unbounded: bool = False,
) -> Float[Tensor, "*batch V D"]:
    """The delta rule X' = X + beta k (v^T - k^T X) = (I - beta k k^T) X + beta k v^T (docs/method.md#the-idea).

    Args:
        state: X (..., V, D).
        direction: k (..., D), of unit norm; it is used as it comes, never normalised here.
        target: v (..., V).
        gate: beta (...), in [0, 2]; with a last axis of length V, one gate per value channel.
        unbounded: take any gate, for the inverse of a rewrite and for study: outside [0, 2] the shortcut I - beta k k^T
            lengthens what lies along k. The values are not looked at then, which on a GPU saves a synchronisation and
            under torch.vmap is the only way. Compiled code never looks.

    Raises:
        UserError: shapes, dtypes or devices that do not belong together, or a gate outside [0, 2] (or NaN).
    """
    _check(state, direction, target, gate)
    if not unbounded:
        check_gate(gate)
    gate_V = gate.unsqueeze(-1) if gate.ndim == state.ndim - 2 else gate
    return rewrite(state, direction, gate_V * target, gate_V)[0]


def _check(state: Tensor, direction: Tensor, target: Tensor, gate: Tensor) -> None:
    if state.ndim < 2:
        raise UserError(f"state must have shape (..., value channels, width), got {tuple(state.shape)}.")
    *batch, channels, width = state.shape
    expected = {
        "direction": (direction, [(*batch, width)]),
        "target": (target, [(*batch, channels)]),
        "gate": (gate, [tuple(batch), (*batch, channels)]),
    }
    for name, (tensor, shapes) in expected.items():
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise UserError(
                f"{name} must have shape {wanted} for a state of shape {tuple(state.shape)} "
                f"(..., value channels, width), got {tuple(tensor.shape)}; reshape or expand it."
            )
        if tensor.dtype != state.dtype or tensor.device != state.device:
            raise UserError(
                f"{name} must have the state's dtype and device ({state.dtype}, {state.device}), "
                f"got {tensor.dtype}, {tensor.device}; convert it with {name}.to(state)."
            )
