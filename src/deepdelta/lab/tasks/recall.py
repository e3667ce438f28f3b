"""Multi-query associative recall with overwrites: keys are bound several times, and their last value is asked for.

A sequence is `writes` pairs (key, value) followed by every key once; at a query the model answers with the value that
the key was bound to last. Half of the keys are bound once, the others at least twice, so attention has to find the last
binding: values are overwritten over tokens, not over depth, and a residual's erase is not tested. Related: the
multi-query recall task of Zoology (Arora et al., 2023), which binds once.

The answers are reported against depth and against width. Shapes: B sequences, K keys, W writes, T = 2 W + K tokens.
"""

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from jaxtyping import Bool, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from deepdelta.config import Count, Distinct
from deepdelta.errors import UserError
from deepdelta.lab.tasks.fitting import CONDITIONS, AdamW, fit, part_of
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.models import GPT, GPTConfig
from deepdelta.nn import ResidualConfig
from deepdelta.training.config import Positive


@dataclass(frozen=True, kw_only=True)
class RecallSettings(AdamW):
    """Sizes of the sequences and of the causal transformers, and the recipe; a condition changes `residual` alone.

    One model is trained at every depth with the first width, and at every other width with the first depth.
    """

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    """The default repeats the embedding over the value channels: a convolution over tokens would tell a value its key
    and make V = 4 an easier task than V = 1."""
    depths: Annotated[tuple[Count, ...], Distinct] = (2, 4)
    """Layers: of an attention and an MLP residual each."""
    widths: Annotated[tuple[Count, ...], Distinct] = (32, 16)
    heads: Count = 2
    embedding_std: float = 0.5
    init_factor: float = 1.5
    """Of the `GPTConfig`. At its own start, small as large models want it, the plain residual learns no more in these
    steps than which values are recent, and the comparison would be one of starts."""
    keys: Annotated[int, Ge(2)] = 4
    """Keys in a sequence; keys // 2 of them are bound once."""
    values: Annotated[int, Ge(2)] = 8
    writes: int = 12
    """Pairs in a sequence."""
    steps: Count = 1000
    batch_size: Count = 32
    lr: Positive = 5e-3
    test_sequences: Count = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        once = self.keys // 2
        if self.writes < once + 2 * (self.keys - once):
            raise UserError(
                f"writes must bind {once} of {self.keys} keys once and the others at least twice, so be at least "
                f"{once + 2 * (self.keys - once)}, got {self.writes}: raise writes or lower keys."
            )
        for layers, dim in self.points():
            self.model(layers, dim)  # what the model refuses, the settings refuse

    def points(self) -> list[tuple[int, int]]:
        """(depth, width) of every model that a run trains."""
        depth, width = self.depths[0], self.widths[0]
        return [(other, width) for other in self.depths] + [(depth, other) for other in self.widths[1:]]

    def model(self, layers: int, dim: int) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.keys + self.values,
            context=2 * self.writes + self.keys,
            layers=layers,
            heads=self.heads,
            dim=dim,
            embedding_std=self.embedding_std,
            init_factor=self.init_factor,
            residual=self.residual,
        )


class RecallBatch(NamedTuple):
    tokens: Int[Tensor, "B T"]
    """Keys are 0 .. K - 1, values K and above."""
    labels: Int[Tensor, "B T"]
    """At the queries the value's token, elsewhere -1."""
    overwritten: Bool[Tensor, "B T"]
    """The queries of keys that were bound more than once."""


def recall_batch(settings: RecallSettings, count: int, generator: Generator) -> RecallBatch:
    """`count` sequences: keys, order and values uniform, given how many keys are bound once."""
    keys, writes = settings.keys, settings.writes
    # Which keys are bound once differs from sequence to sequence: positions in a random order of the keys.
    names_BK = torch.rand(count, keys, generator=generator).argsort(-1)
    once = keys // 2
    certain = torch.cat((torch.arange(keys), torch.arange(once, keys)))
    extra_BE = torch.randint(once, keys, (count, writes - len(certain)), generator=generator)
    places_BW = torch.cat((certain.expand(count, -1), extra_BE), dim=-1)
    shuffle_BW = torch.rand(count, writes, generator=generator).argsort(-1)
    places_BW = places_BW.gather(1, shuffle_BW)
    values_BW = torch.randint(settings.values, (count, writes), generator=generator) + keys

    bound_BKW = places_BW[:, None, :] == torch.arange(keys)[:, None]
    last_BK = (bound_BKW * torch.arange(1, writes + 1)).argmax(-1)
    order_BK = torch.rand(count, keys, generator=generator).argsort(-1)

    pairs_BW2 = torch.stack((names_BK.gather(1, places_BW), values_BW), dim=-1)
    tokens_BT = torch.cat((pairs_BW2.flatten(1), names_BK.gather(1, order_BK)), dim=1)
    labels_BT = torch.full_like(tokens_BT, -1)
    labels_BT[:, 2 * writes :] = values_BW.gather(1, last_BK).gather(1, order_BK)
    overwritten_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    overwritten_BT[:, 2 * writes :] = order_BK >= once
    return RecallBatch(tokens_BT, labels_BT, overwritten_BT)


def run(settings: RecallSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train every model on the same fresh sequences and test it on others.

    Returns:
        accuracy_overwritten: fraction of right answers for keys that were bound more than once, the argmax taken over
            the values; accuracy_once: for keys bound once; loss: mean cross-entropy of all answers in nats.
        Each as the mean over the models and, with _dD_wW added, of the model of depth D and width W.
    """
    points = settings.points()
    found: dict[str, list[float]] = {}
    by_point: dict[str, float] = {}
    for number, (layers, dim) in enumerate(points):
        model = GPT(settings.model(layers, dim), seed=seed)
        _train(settings, model, seed, part_of(progress, number, len(points)))
        for name, value in _tested(settings, model, seed).items():
            found.setdefault(name, []).append(value)
            by_point[f"{name}_d{layers}_w{dim}"] = value
    return {name: sum(values) / len(values) for name, values in found.items()} | by_point


def _train(settings: RecallSettings, model: GPT, seed: int, progress: Progress) -> None:
    generator = Generator().manual_seed(2 * seed)

    def loss_of(step: int) -> Tensor:
        batch = recall_batch(settings, settings.batch_size, generator)
        loss: Tensor = model(batch.tokens, batch.labels).loss
        return loss

    fit(model, loss_of, settings, progress)


@torch.no_grad()
def _tested(settings: RecallSettings, model: GPT, seed: int) -> dict[str, float]:
    batch = recall_batch(settings, settings.test_sequences, Generator().manual_seed(2 * seed + 1))
    logits_BTN = torch.cat([model(tokens).logits for tokens in torch.split(batch.tokens, 128)])
    asked_BT = batch.labels >= 0
    right_BT = logits_BTN[..., settings.keys :].argmax(-1) + settings.keys == batch.labels
    return {
        "accuracy_overwritten": right_BT[batch.overwritten].float().mean().item(),
        "accuracy_once": right_BT[asked_BT & ~batch.overwritten].float().mean().item(),
        "loss": F.cross_entropy(logits_BTN[asked_BT], batch.labels[asked_BT]).item(),
    }


TASK = Task(
    settings=RecallSettings(),
    conditions=CONDITIONS
    | {
        "additive-4": Variant(
            summary="the expanded additive residual, V = 4",
            changes={"residual": {"rule": "additive", "value_channels": 4}},
        )
    },
    baseline="additive",
    primary="accuracy_overwritten",
    unit="fraction of answers",
    higher_is_better=True,
    run=run,
)
