"""What the rewrites of a trained model do, and what its loss is without them.

Shapes: N windows, B of them in a batch, T tokens of input in a window.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.nn import functional as F

from deepdelta.errors import UserError
from deepdelta.lab.analysis.statistics import load_scipy, paired
from deepdelta.lab.audit.directions import Alternatives
from deepdelta.lab.audit.findings import NOT_FINITE, Effect, Findings
from deepdelta.lab.audit.shortcut import shortcut
from deepdelta.lab.audit.tally import Sampler, Tally
from deepdelta.models import GPT
from deepdelta.nn import DeltaResidual, Intervention, ResidualConfig, RewriteRecord, intervening, recording

INTERVENTIONS: Mapping[str, Intervention] = MappingProxyType(
    {
        "gate 0": Intervention(gate=0.0),
        "gate 1": Intervention(gate=1.0),
        "gate 2": Intervention(gate=2.0),
        "erase cut": Intervention(erase=False),
        "write cut": Intervention(write=False),
    }
)

Progress = Callable[[int, str], None]


@torch.no_grad()
def audit(
    model: GPT,
    windows: Int[Tensor, "N T1"],
    *,
    sample: int = 64,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Findings:
    """Measure every residual of `model` on `windows`, and the loss under every intervention.

    The measurements come from one pass over the windows; every intervention that the rule has a part for costs a pass
    per residual, and one for all residuals at once (`passes` counts them). The reference backend rewrites in all of
    them, so that losses are paired to the last bit.

    Args:
        windows: successive tokens, (windows, T + 1); all but the last are inputs, all but the first labels.
        sample: how many tokens, evenly spread, the shortcut's spectrum is taken over.
        batch_size: windows per forward pass.
        progress: called as progress(windows done in all passes so far, what is being done).

    Raises:
        UserError: no room for a token, a sample or batch size below 1, rewrites or a loss that are not finite, scipy is
            absent.
    """
    if windows.numel() == 0 or windows.shape[1] < 2:
        raise UserError(
            f"windows must hold at least one input and its label each, got shape {tuple(windows.shape)}; "
            "give at least one window of two tokens."
        )
    for name, value in (("sample", sample), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")
    load_scipy()
    names = [name for name, part in model.named_modules() if isinstance(part, DeltaResidual)]
    config, tokens, done = model.config.residual, windows.shape[0] * (windows.shape[1] - 1), 0
    tallies = {name: Tally(config) for name in names}
    sampler, alternatives = Sampler(tokens, sample), Alternatives()

    def record(name: str, rewrite: RewriteRecord) -> None:
        here = RewriteRecord(*(None if value is None else value.cpu() for value in rewrite))  # type: ignore[arg-type]
        tallies[name].add(name, here)
        sampler.add(name, here)

    def watched(inputs: Tensor) -> AbstractContextManager[None]:
        sampler.advance(inputs.numel())
        return recording(model, record)

    def losses(doing: str, context: Callable[[Tensor], AbstractContextManager[None]]) -> Float64[np.ndarray, " N"]:
        nonlocal done
        found = []
        for inputs, labels in _batches(windows, batch_size, model.embedding.weight.device):
            with context(inputs):
                found.append(_window_losses(model, inputs, labels))
            done += inputs.shape[0]
            if progress is not None:
                progress(done, doing)
        return np.concatenate(found)

    def effect(label: str, target: str | None) -> Effect:
        """Of an intervention on the residual `target`, or on all."""
        if (reason := INTERVENTIONS[label].lacking(config)) is not None:
            return Effect(intervention=label, change=None, remark=reason)
        # One that replaces nothing still has the reference rewrite, as every residual had when it was watched.
        replaced = {name: INTERVENTIONS[label] if target in (None, name) else Intervention() for name in names}
        changed = losses(f"{label}, {target or 'all sublayers'}", lambda inputs: intervening(model, replaced))
        changes = (changed - plain).tolist()
        if not np.isfinite(changes).all():
            return Effect(intervention=label, change=None, remark=NOT_FINITE)
        return Effect(intervention=label, change=paired(changes, least=2), remark=None)

    with _evaluating(model):
        with alternatives.watching(model):
            plain = losses("rewrites", watched)
        if not np.isfinite(plain).all():
            raise UserError(
                "the model's loss on this text is not finite, so there is nothing to compare; did its training diverge?"
            )
        residuals = tuple(
            tally.result(name, tuple(effect(label, name) for label in INTERVENTIONS), alternatives.of(name))
            for name, tally in tallies.items()
        )
        everywhere = tuple(effect(label, None) for label in INTERVENTIONS)
    return Findings(
        tokens=tokens,
        windows=windows.shape[0],
        window=windows.shape[1] - 1,
        loss=float(plain.mean()),
        residuals=residuals,
        everywhere=everywhere,
        shortcut=shortcut(sampler.factors()) if config.erases else None,
    )


def passes(config: ResidualConfig, residuals: int) -> int:
    """How many passes over the windows `audit` makes of a model with so many residuals."""
    usable = sum(intervention.lacking(config) is None for intervention in INTERVENTIONS.values())
    return 1 + usable * (residuals + 1)


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """The model in evaluation mode, afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    windows: Int[Tensor, "N T1"], batch_size: int, device: torch.device
) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    for first in range(0, windows.shape[0], batch_size):
        here = windows[first : first + batch_size].to(device)
        yield here[:, :-1], here[:, 1:]


def _window_losses(model: GPT, inputs: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Float64[np.ndarray, " B"]:
    """Nats per token of each window."""
    logits = model(inputs).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape).cpu().double().mean(1).numpy()
