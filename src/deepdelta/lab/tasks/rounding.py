"""Does a bounded state bear few bits? Trained GPTs whose states are rounded between their sublayers.

Each residual's output X is rounded to a format after division by one number s per residual, the largest |X| on
training text, so that the format's range is used: int8 and int4 to the nearest of 2^(n - 1) - 1 steps either side of 0,
e4m3 to the nearest such float. What lies beyond s is cut off. A state that grows in norm, or has few large numbers,
loses more.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from annotated_types import Len
from jaxtyping import Float
from torch import Tensor

from deepdelta.config import Count, Distinct
from deepdelta.data import Corpus, spread
from deepdelta.lab.tasks.task import Progress, Task
from deepdelta.lab.tasks.texts import TEXT_CONDITIONS, TextSettings, loss_on, text_of, trained
from deepdelta.models import GPT
from deepdelta.nn import DeltaResidual

Format = Literal["int8", "int4", "e4m3"]
E4M3_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def _steps(bits: int) -> Callable[[Tensor], Tensor]:
    most = 2 ** (bits - 1) - 1
    return lambda x: (x * most).round() / most


ROUND: Mapping[Format, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "int8": _steps(8),
        "int4": _steps(4),
        "e4m3": lambda x: (x * E4M3_LARGEST).to(torch.float8_e4m3fn).to(x.dtype) / E4M3_LARGEST,
    }
)
"""From numbers in [-1, 1] to the nearest that a format has, its largest number being 1."""


def rounded(x: Float[Tensor, "*shape"], scale: float, form: Format) -> Float[Tensor, "*shape"]:
    """s round(x / s), what lies beyond +-s cut off."""
    return ROUND[form]((x / scale).clamp(-1, 1)) * scale


@contextmanager
def after_each(residuals: list[DeltaResidual], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within it, each residual's output is what `change` makes of its number and the output."""
    hooks = [
        residual.register_forward_hook(lambda module, args, state, number=number: change(number, state))
        for number, residual in enumerate(residuals)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, kw_only=True)
class RoundingSettings(TextSettings):
    """What tasks on text have, and the formats."""

    formats: Annotated[tuple[Format, ...], Distinct, Len(1)] = ("int8", "int4", "e4m3")
    """The first gives the number that conditions are compared in."""
    calibration_tokens: Count = 8192
    """Of the training part, on which the largest |X| after each residual is found."""


@torch.no_grad()
def largest(model: GPT, corpus: Corpus, settings: RoundingSettings) -> list[float]:
    """The largest |X| after each residual on windows evenly spread over the training part."""
    found = [0.0] * len(model.residuals())

    def note(number: int, state: Tensor) -> Tensor:
        found[number] = max(found[number], state.abs().max().item())
        return state

    windows = spread(corpus.train, context=settings.context, limit=settings.calibration_tokens)
    with after_each(model.residuals(), note):
        for part in torch.split(windows, settings.batch_size):
            model(part[:, :-1])
    return found


def run(settings: RoundingSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train a GPT at every rate, take the best, and test it with and without rounding.

    Returns:
        loss: nats per byte of the validation part; rise_FORMAT: by how much rounding raises it; rise: with the first
        format; largest: the largest |X| after the last residual, on training text. lr: the rate that was taken.

    Raises:
        Diverged: at every rate.
    """
    text = text_of(settings)
    model, rate = trained(settings, text, seed, progress)
    assert isinstance(model, GPT)
    scales, plain = largest(model, text.trained, settings), loss_on(text.tested, model, settings)
    rises = {}
    for form in settings.formats:
        with after_each(model.residuals(), lambda number, state, form=form: rounded(state, scales[number], form)):
            rises[f"rise_{form}"] = loss_on(text.tested, model, settings) - plain
    return {"rise": rises[f"rise_{settings.formats[0]}"], "loss": plain, **rises, "largest": scales[-1], "lr": rate}


TASK = Task(
    settings=RoundingSettings(),
    conditions=TEXT_CONDITIONS,
    baseline="additive",
    primary="rise",
    unit="nats per byte that the loss rises where states are rounded between sublayers, to the first of `formats`",
    higher_is_better=False,
    refuted="int8 costs h after a norm no more than 1.2 times what it costs the better form with an erase",
    run=run,
    replaced={"lr": "rates"},
)
