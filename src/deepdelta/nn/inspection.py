"""What rewrites do, handed to a recorder, and what a trained network loses without a part of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from deepdelta.errors import UserError, nearest
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.residual import DeltaResidual
from deepdelta.nn.rewriting import RewriteRecord, Step

Recorder = Callable[[str, RewriteRecord], None]


@contextmanager
def recording(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within the context, every delta residual in `module` hands each of its rewrites to `recorder`.

    Outside it nothing is computed or kept. Under torch.compile the residuals are compiled anew on the first entry,
    since the recorded values are additional outputs of the same operation. Of contexts within one another the innermost
    records.

    Args:
        module: any module that holds residuals made by `DeltaStream.wrap`.
        recorder: called as recorder(name of the residual in `module`, record), once per rank, in the order of
            application.
    """
    residuals = _residuals(module)
    before = {name: residual.runtime.recorder for name, residual in residuals.items()}
    for name, residual in residuals.items():
        residual.runtime = residual.runtime._replace(recorder=partial(recorder, name))
    try:
        yield
    finally:
        for name, residual in residuals.items():
            residual.runtime = residual.runtime._replace(recorder=before[name])


def _residuals(module: nn.Module) -> dict[str, DeltaResidual]:
    return {name: part for name, part in module.named_modules() if isinstance(part, DeltaResidual)}


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What is replaced in every rewrite X' = X + k (w^T - b k^T X) of a residual; of rank r in all r of them.

    | rule | gate=g | erase=False | write=False |
    | --- | --- | --- | --- |
    | delta | w = g v, b = g | b = 0: write_only | w = 0: erase_only |
    | write_only | w = g v | refused: it has none | w = 0: X' = X |
    | erase_only | b = g | b = 0: X' = X | refused: it has none |
    | additive | refused: it has none | refused: it has none | w = 0: X' = X |
    | additive_erase | b = g; h is written as before | b = 0 | w = 0 |
    | channels | b = g; w h is written as before | b = 0 | w = 0 |
    | two_gate | b = g; the gate of the write is left alone | b = 0 | w = 0 |

    The clamped gate stands for the whole gate, a learned factor that opens it included, for every token and value
    channel. With a direction of norm n != 1, gate=1 leaves 1 - n^2 of what is read, as it does in the rule itself.

    Raises:
        UserError: a gate outside [0, 2].
    """

    gate: float | None = None
    """What the gate is clamped to; None leaves it."""
    erase: bool = True
    """False cuts the erase term."""
    write: bool = True
    """False cuts the write."""

    def __post_init__(self) -> None:
        if self.gate is not None and not 0 <= self.gate <= 2:
            raise UserError(f"gate must lie in [0, 2] or be None, got {self.gate}.")

    def lacking(self, config: ResidualConfig) -> str | None:
        """The part that this intervention is about and the rule does not have; None where it has all of them."""
        if self.gate is not None and config.rule == "additive":
            return f"the rule '{config.rule}' has no gate"
        if not self.erase and not config.erases:
            return f"the rule '{config.rule}' has no erase term"
        if not self.write and config.rule == "erase_only":
            return f"the rule '{config.rule}' has no write"
        return None


@contextmanager
def intervening(module: nn.Module, interventions: Mapping[str, Intervention]) -> Iterator[None]:
    """Within the context, the residuals named do their rewrites as their interventions say.

    As under a recorder, and together with one if both are wanted (it then sees the replaced parts), the reference
    backend does these rewrites; other residuals keep theirs. Cached decoding and the backward pass honour it too. Under
    torch.compile these residuals are compiled anew on the first entry, not for another gate. On a residual that has an
    intervention already, the inner context's holds until it ends.

    Args:
        module: any module that holds residuals made by `DeltaStream.wrap`.
        interventions: by the residual's name in `module`, as `named_modules` and `recording` give it.

    Raises:
        UserError: no residual has such a name, or its rule lacks the part; nothing is changed then.
    """
    residuals = _residuals(module)
    for name, intervention in interventions.items():
        if name not in residuals:
            raise UserError(f"there is no residual '{name}' in this module; {nearest(name, residuals)}")
        if lacking := intervention.lacking(residuals[name].config):
            raise UserError(f"'{name}' cannot be intervened on so: {lacking}; leave that part of {intervention} out.")
    before = {name: residuals[name].runtime.intervention for name in interventions}
    for name, intervention in interventions.items():
        # A tensor: a number would be compiled in, anew for each one.
        gate = None if intervention.gate is None else torch.tensor(intervention.gate, dtype=torch.float64, device="cpu")
        replaced = partial(_replaced, gate, intervention.erase, intervention.write, residuals[name].config)
        residuals[name].runtime = residuals[name].runtime._replace(intervention=replaced)
    try:
        yield
    finally:
        for name, earlier in before.items():
            residuals[name].runtime = residuals[name].runtime._replace(intervention=earlier)


def _replaced(gate: Tensor | None, erases: bool, writes: bool, config: ResidualConfig, step: Step) -> Step:
    """The step with that gate, without its erase or without its write."""
    if gate is not None and config.writes_branch:
        assert step.erase is not None
        erase = torch.zeros_like(step.erase) + gate
        # But in two_gate the one gate there is.
        beta = step.beta if config.rule == "two_gate" else erase
        step = step._replace(erase=erase, beta=beta)
    elif gate is not None:
        assert step.beta is not None
        beta = torch.zeros_like(step.beta) + gate
        write = step.write if step.target is None else beta * step.target
        step = step._replace(beta=beta, write=write, erase=None if step.erase is None else beta)
    if not erases:
        step = step._replace(erase=None)
    return step if writes else step._replace(write=0.0)
