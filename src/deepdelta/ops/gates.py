"""The one check of gates that are given by hand."""

import torch
from torch import Tensor

from deepdelta.errors import UserError


def check_gate(gate: Tensor) -> None:
    """Refuse a gate outside [0, 2], NaN included. Compiled code and tensors without values are not looked at."""
    if torch.compiler.is_compiling() or gate.is_meta:
        return
    outside = ~((gate >= 0) & (gate <= 2))
    if outside.any():
        raise UserError(
            f"gate must lie in [0, 2], got {gate[outside][0].item():g} {where(outside)}: "
            "clamp it, or pass unbounded=True to study other gates."
        )


def where(mask: Tensor) -> str:
    """The batch entries at which `mask` holds, the first five by name."""
    if mask.ndim == 0:
        return "(no batch axes)"
    entries = [tuple(entry) for entry in mask.nonzero().tolist()]
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return f"at batch {'entry' if len(entries) == 1 else 'entries'} {', '.join(map(str, entries[:5]))}{more}"
