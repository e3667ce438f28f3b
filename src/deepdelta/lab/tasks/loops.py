"""Shared depth: a byte GPT of two layers, repeated a drawn number of times in training and asked at many more.

An addition that is repeated drifts, while an erase has a fixed point: the error of a read shrinks as (1 - b)^r. So a
residual that erases may bear more repetitions than it was trained with. Every repetition is told the embeddings, in all
conditions alike (`GPTConfig.repeats`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Len

from deepdelta.config import Count, Distinct
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.lab.tasks.texts import CODE, TEXT_CONDITIONS, TextSettings, loss_on, text_of, trained
from deepdelta.models.gpt import Size


@dataclass(frozen=True, kw_only=True)
class LoopsSettings(TextSettings):
    """What tasks on text have, of two layers that are repeated."""

    layers: Size = 2
    repeats: Count | None = 6
    asked: Annotated[tuple[Count, ...], Distinct, Len(1)] = (1, 2, 4, 6, 8, 16, 32)
    """Repetitions at which it is tested; the last gives the number that conditions are compared in."""
    tested_in: Literal["fp32", "fp64"] = "fp32"
    """The numbers that it is tested in. In fp32 the square of a state that grows with every repetition leaves their
    range, and the norm that reads it gives 0; fp64 tells that from a function that drifts."""


def run(settings: LoopsSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train a GPT at every rate, and test the one that does best with as many repetitions as training draws at most.

    Returns:
        loss: nats per byte of the validation part at the last number of `asked`; loss_1 and so on: at each of them.
        lr: the rate that was taken.

    Raises:
        Diverged: at every rate.
    """
    text = text_of(settings)
    model, rate = trained(settings, text, seed, progress)
    model.to({"fp32": torch.float32, "fp64": torch.float64}[settings.tested_in])
    losses = {f"loss_{repeats}": loss_on(text.tested, model, settings, repeats) for repeats in settings.asked}
    return {"loss": losses[f"loss_{settings.asked[-1]}"], **losses, "lr": rate}


TASK = Task(
    settings=LoopsSettings(),
    conditions=TEXT_CONDITIONS
    | {
        "code-low-gate": Variant(
            summary="the same, gates start at 0.25",
            changes={"residual": CODE | {"gate_init": 0.25}},
            control="code-write-only",
        ),
        "code-low-gate-1": Variant(
            summary="that with gates in (0, 1)",
            changes={"residual": CODE | {"gate_init": 0.25, "gate_range": 1}},
            control="code-write-only",
        ),
        "retention": Variant(
            summary="four streams that are not mixed, each of which a learned number lets fade",
            changes={"rival": "retention"},
        ),
        "hyper-connections": Variant(
            summary="hyper-connections: a free mix of four streams", changes={"rival": "hyper-connections"}
        ),
    },
    baseline="additive",
    primary="loss",
    unit="nats per byte of held-out text, at the last number of repetitions in `asked`",
    higher_is_better=False,
    refuted="h after a norm, or retention, is within 0.02 nats of the best form with an erase at the last of `asked`",
    run=run,
    replaced={"lr": "rates"},
)
