"""Shared depth: a byte GPT of two layers, repeated a drawn number of times in training and asked at many more.

An addition that is repeated drifts, while an erase has a fixed point: the error of a read shrinks as (1 - b)^r. So a
residual that erases may bear more repetitions than it was trained with. Every repetition is told the embeddings, in all
conditions alike (`GPTConfig.repeats`).
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Len
from torch import Tensor

from deepdelta.config import Count, Distinct
from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.lab.experiments.config import as_large_as
from deepdelta.lab.tasks import fitting
from deepdelta.lab.tasks.fitting import AdamW, at_best_rate, fit
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.models import GPTConfig, LanguageModel, Rival, language_model
from deepdelta.models.gpt import Size
from deepdelta.nn import ResidualConfig
from deepdelta.nn.presets import PRESETS
from deepdelta.training import TrainConfig, evaluate
from deepdelta.training.config import Positive
from deepdelta.training.step import step_batch, step_repeats


@dataclass(frozen=True, kw_only=True)
class LoopsSettings(AdamW):
    """The text, the sizes of the GPT and the recipe; a condition changes `residual`, `rival` and `out_norm`."""

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    rival: Rival | None = None
    out_norm: Positive | None = None
    """RMSNorm of what each branch returns, its weight starting at this number; None: no norm."""
    source: str = "stdlib"
    """The text, as `data.source` of a run."""
    dim: Size = 64
    layers: Size = 2
    heads: Size = 2
    context: Size = 128
    repeats: Count = 6
    """The most that a training step draws."""
    asked: Annotated[tuple[Count, ...], Distinct, Len(1)] = (1, 2, 4, 6, 8, 16, 32)
    """Repetitions at which it is tested; the last gives the number that conditions are compared in."""
    rates: Annotated[tuple[Positive, ...], Distinct, Len(1)] = (3e-3, 1e-2, 3e-2)
    """Each run is made at each of these, in place of `lr`, and the best one at `repeats` on the last tenth of the
    training part counts."""
    test_tokens: Count = 32768
    steps: Count = 400
    batch_size: Count = 8
    lr: Positive = 1e-2
    weight_decay: float = 0.1

    def model(self, vocabulary: int) -> GPTConfig:
        """The GPT, its MLP as wide as gives it the parameters of the one with plain residuals."""
        sizes = GPTConfig(
            vocab_size=vocabulary,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            dim=self.dim,
            embedding_std=0.125,
            repeats=self.repeats,
            residual=PRESETS["additive"],
        )
        own = replace(sizes, residual=self.residual, rival=self.rival, out_norm=self.out_norm)
        return as_large_as(sizes, own, "this condition")


def run(settings: LoopsSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train a GPT at every rate, and test the one that does best with as many repetitions as training draws.

    Returns:
        loss: nats per token of the validation part at the last number of `asked`; loss_1 and so on: at each of them.
        lr: the rate that was taken.

    Raises:
        Diverged: at every rate.
    """
    # What is trained on leaves out the last tenth of the training part, on which a rate is chosen.
    data = DataConfig(source=settings.source, held_out="train_tail")
    trained_on, tested_on = load_corpus(data), load_corpus(replace(data, held_out="validation"))
    config = TrainConfig(
        model=settings.model(trained_on.vocab_size),
        seed=seed,
        batch_size=settings.batch_size,
        draw_repeats=True,
    )

    def loss_of(model: LanguageModel, corpus: Corpus, repeats: int) -> float:
        return evaluate(
            model,
            corpus,
            batch_size=settings.batch_size,
            device=torch.device("cpu"),
            tokens=settings.test_tokens,
            repeats=repeats,
        ).loss

    def trained(rate: float, progress: Progress) -> LanguageModel:
        model = language_model(config.model, seed)

        def loss(step: int) -> Tensor:
            inputs, labels = step_batch(config, trained_on, step)
            made: Tensor = model(inputs, labels, loss_alone=True, repeats=step_repeats(config, step)).loss
            return made

        fit(model, loss, replace(settings, lr=rate), progress)
        return model

    model, rate = at_best_rate(
        settings.rates, trained, lambda one: loss_of(one, trained_on, settings.repeats), progress
    )
    losses = {f"loss_{repeats}": loss_of(model, tested_on, repeats) for repeats in settings.asked}
    return {"loss": losses[f"loss_{settings.asked[-1]}"], **losses, "lr": rate}


CODE = {"preset": "code-cc-repeat"}

TASK = Task(
    settings=LoopsSettings(),
    conditions={
        "additive": fitting.CONDITIONS["additive"],
        "normed": Variant(
            summary="h is added after a norm whose weight starts at 1/64",
            changes={**fitting.NORMED.changes, "out_norm": 0.015625},
        ),
        "retention": Variant(
            summary="four streams that are not mixed, each of which a learned number lets fade",
            changes={"rival": "retention"},
        ),
        "hyper-connections": Variant(
            summary="hyper-connections: a free mix of four streams", changes={"rival": "hyper-connections"}
        ),
        "default-write-only": Variant(
            summary="the default without its erase: V = 4, h written by learned weights",
            changes={"residual": {"preset": "plain-start", "gate": "constant", "erase_init": 0.0}},
        ),
        "default": Variant(
            summary="the default: the same with an erase that starts closed",
            changes={"residual": {"preset": "plain-start"}},
            control="default-write-only",
        ),
        "code-write-only": Variant(
            summary="the form of the authors' code without its convolution of embeddings, nothing is erased",
            changes={"residual": CODE | {"rule": "write_only"}},
        ),
        "code": Variant(
            summary="that form with its erase, gates in (0, 2) that start at 1",
            changes={"residual": CODE},
            control="code-write-only",
        ),
        "code-low-gate": Variant(
            summary="the same, gates start at 0.25",
            changes={"residual": CODE | {"gate_init": 0.25}},
            control="code-write-only",
        ),
    },
    baseline="additive",
    primary="loss",
    unit="nats per byte of held-out text, the layers repeated 32 times",
    higher_is_better=False,
    run=run,
)
