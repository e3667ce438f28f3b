"""Whether a run is well: its gates, how its state grows over depth, and where a number is first not finite."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from deepdelta.models import GPT
from deepdelta.nn import RewriteRecord, recording

DEAD, SATURATED = 0.01, 1.99
"""A gate below the one does nothing, and its gradient is next to 0; above the other it mirrors, likewise."""
WARNED_SHARE, WARNED_GROWTH = 0.5, 100.0
"""From which share of such gates, and from which growth of the state, a run is warned of."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Of one batch, over every rewrite of a model; gates are None where the rule has none."""

    gate_mean: float | None
    gates_dead: float | None
    """The share of gates below DEAD in size."""
    gates_saturated: float | None
    """The share of those above SATURATED."""
    starts_closed: bool = False
    """Whether gates start at 0 on purpose, and open as they learn: then closed ones are no ill."""
    state_growth: float
    """The mean norm |X_j| of a value channel before the last rewrite, as a multiple of that before the first."""

    @property
    def row(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            name: round(value, 6)
            for name, value in asdict(self).items()
            if value is not None and name != "starts_closed"
        }

    @property
    def warning(self) -> str | None:
        """What is likely to hold the training back."""
        found = []
        if (self.gates_dead or 0) > WARNED_SHARE and not self.starts_closed:
            found.append(f"{self.gates_dead:.0%} of the gates are below {DEAD}: their residuals do nothing")
        if (self.gates_saturated or 0) > WARNED_SHARE:
            found.append(f"{self.gates_saturated:.0%} of the gates are above {SATURATED}: they hardly learn any more")
        if self.state_growth > WARNED_GROWTH:
            found.append(f"the state's norm grows {self.state_growth:,.0f} times from the first rewrite to the last")
        return f"Warning: {'; '.join(found)}." if found else None


@torch.no_grad()
def health(model: nn.Module, ids: Int[Tensor, "B T"]) -> Health | None:
    """The health of a model on a batch; None for a rival, which has no rewrites, and where a number is not finite."""
    if not isinstance(model, GPT):
        return None
    gates: list[Tensor] = []
    norms: list[Tensor] = []

    def note(name: str, record: RewriteRecord) -> None:
        norms.append(record.state_norm.mean())
        if record.beta is not None:
            gates.append(record.beta.flatten().float())

    with recording(model, note):
        model(ids)
    growth = (norms[-1] / norms[0]).item()
    if not torch.tensor(growth).isfinite() or not all(gate.isfinite().all() for gate in gates):
        return None
    if not gates:
        return Health(gate_mean=None, gates_dead=None, gates_saturated=None, state_growth=growth)
    every = torch.cat(gates)
    return Health(
        gate_mean=every.mean().item(),
        gates_dead=(every.abs() < DEAD).float().mean().item(),
        gates_saturated=(every > SATURATED).float().mean().item(),
        starts_closed=model.config.residual.starts_plain,
        state_growth=growth,
    )


@torch.no_grad()
def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the module of `model` whose output is the first, while `run` calls it, that holds NaN or infinity."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if not found and any(not tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: object) -> list[Tensor]:
    """Those with a fraction in what a module returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, tuple | list) else []
