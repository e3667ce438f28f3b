"""What tasks on text share: a byte GPT whose residual a condition changes, trained at several rates by one recipe."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Len
from torch import Tensor

from deepdelta.config import Count, Distinct
from deepdelta.data import Corpus, DataConfig, load_corpus
from deepdelta.lab.experiments.config import as_large_as
from deepdelta.lab.tasks.fitting import CONDITIONS, NORMED, AdamW, at_best_rate, fit
from deepdelta.lab.tasks.task import Progress, Variant
from deepdelta.models import GPTConfig, LanguageModel, Rival, language_model
from deepdelta.models.gpt import Size, Spread
from deepdelta.nn import ResidualConfig
from deepdelta.nn.presets import PRESETS
from deepdelta.training import TrainConfig, evaluate
from deepdelta.training.config import Positive
from deepdelta.training.step import step_batch, step_repeats


@dataclass(frozen=True, kw_only=True)
class TextSettings(AdamW):
    """The text, the sizes of the GPT and the recipe; a condition changes `residual`, `rival` and `out_norm`."""

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    rival: Rival | None = None
    out_norm: Positive | None = None
    """RMSNorm of what each branch returns, its weight starting at this number; None: no norm."""
    source: str = "stdlib"
    """The text, as `data.source` of a run."""
    dim: Size = 64
    layers: Size = 4
    heads: Size = 2
    context: Size = 128
    embedding_std: Spread = 0.125
    repeats: Count | None = None
    """Of a looped GPT: the most repetitions that a training step draws."""
    rates: Annotated[tuple[Positive, ...], Distinct, Len(1)] = (3e-3, 1e-2, 3e-2)
    """Each run is made at each of these, in place of `lr`, and the one with the lowest loss on the last tenth of the
    training part counts; where it is at an end of them, one further is tried, at most twice."""
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
            embedding_std=self.embedding_std,
            repeats=self.repeats,
            residual=PRESETS["additive"],
        )
        own = replace(sizes, residual=self.residual, rival=self.rival, out_norm=self.out_norm)
        return as_large_as(sizes, own, "this condition")


class Text(NamedTuple):
    """The text of a task: what is trained on leaves out the last tenth of the training part, for choices."""

    trained: Corpus
    """Its validation part is that last tenth."""
    tested: Corpus


def text_of(settings: TextSettings) -> Text:
    data = DataConfig(source=settings.source, held_out="train_tail")
    return Text(load_corpus(data), load_corpus(replace(data, held_out="validation")))


def untrained(settings: TextSettings, text: Text, seed: int) -> tuple[TrainConfig, LanguageModel]:
    """What draws its batches, and the model as training starts."""
    config = TrainConfig(
        model=settings.model(text.trained.vocab_size),
        seed=seed,
        batch_size=settings.batch_size,
        draw_repeats=settings.repeats is not None,
    )
    return config, language_model(config.model, seed)


def trained_at(settings: TextSettings, text: Text, seed: int, rate: float, progress: Progress) -> LanguageModel:
    """A model trained at one rate.

    Raises:
        Diverged: the loss or a gradient is no longer a finite number.
    """
    config, model = untrained(settings, text, seed)

    def loss(step: int) -> Tensor:
        inputs, labels = step_batch(config, text.trained, step)
        made: Tensor = model(inputs, labels, loss_alone=True, repeats=step_repeats(config, step)).loss
        return made

    fit(model, loss, replace(settings, lr=rate), progress)
    return model


def trained(settings: TextSettings, text: Text, seed: int, progress: Progress) -> tuple[LanguageModel, float]:
    """The model trained at the rate that does best on the last tenth of the training part, and that rate.

    Raises:
        Diverged: at every rate.
    """
    return at_best_rate(
        settings.rates,
        lambda rate, part: trained_at(settings, text, seed, rate, part),
        lambda model: loss_on(text.trained, model, settings),
        progress,
    )


def loss_on(corpus: Corpus, model: LanguageModel, settings: TextSettings, repeats: int | None = None) -> float:
    """Nats per byte on `test_tokens` of the corpus's validation part, evenly spread."""
    return evaluate(
        model,
        corpus,
        batch_size=settings.batch_size,
        device=torch.device("cpu"),
        tokens=settings.test_tokens,
        repeats=repeats,
    ).loss


CODE: dict[str, Any] = {"preset": "code-cc-repeat"}

TEXT_CONDITIONS = {
    "additive": CONDITIONS["additive"],
    "normed": Variant(
        summary="h is added after a norm whose weight starts at 1/64", changes={**NORMED.changes, "out_norm": 0.015625}
    ),
    "default-write-only": Variant(
        summary="the default of DeltaStream without its erase: V = 4, h written by learned weights",
        changes={"residual": {"preset": "plain-start", "gate": "constant", "erase_init": 0.0}},
    ),
    "default": Variant(
        summary="the default of DeltaStream: the same with an erase that starts closed",
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
}
"""The plain residual and one with a norm; the default and the authors' form, each with its twin that does not erase."""
