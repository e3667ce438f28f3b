"""What a study measured and what its analysis found, as frozen dataclasses: the contract between runs and views.

`results.json` is exactly this, nothing in a table or a picture comes from anywhere else. Losses are in nats per token,
times in seconds, memory in bytes. Costs of an operation count one token's forward and backward pass.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deepdelta import notebook
from deepdelta.config import to_plain
from deepdelta.errors import UserError
from deepdelta.files import AnyPath, write_json
from deepdelta.lab.analysis.comparison import Comparison
from deepdelta.lab.analysis.stored import Stored, load_stored
from deepdelta.lab.measure.cost import Cost
from deepdelta.lab.measure.rewrites import GATE_BINS

BudgetName = Literal["tokens", "flops", "time"]
"""What the runs of a comparison have in common: training tokens, floating-point operations, or seconds."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    description: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How the validation loss was measured: on how many tokens, and how contexts are cut (plain English)."""

    tokens: int
    contexts: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    steps: int
    tokens_per_step: int
    threads_per_run: int
    start_steps: int | None = None
    """Of the run that all runs of a seed start from; None: they start from new weights."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Losses after `step` optimiser steps and `seconds` of training since the run began (0 steps: before training)."""

    step: int
    seconds: float
    train_loss: float | None = None
    validation_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run. `validation_loss` is None where the loss became non-finite and the run stopped (diverged)."""

    seed: int
    validation_loss: float | None
    seconds: float
    steps: int | None = None
    """Those planned; None: the study's."""
    curve: tuple[CurvePoint, ...] = ()

    def __post_init__(self) -> None:
        if self.validation_loss is not None and not math.isfinite(self.validation_loss):
            raise UserError(
                f"validation_loss must be finite, got {self.validation_loss}; a run that diverged has null there"
            )


@dataclass(frozen=True, kw_only=True)
class RewriteSummary:
    """What one trained sublayer's rewrite does, over validation tokens of all the condition's finished runs.

    None stands where the rule has no such quantity: no gate, no target, no direction.

    Fields:
        gate_histogram: number of gates in each of the GATE_BINS equal bins over [0, 2].
        discrepancy_before, discrepancy_after: root mean square over tokens and value channels of k^T X - v,
            before and after the rewrite, with the same k and v.
        direction_norm: mean ||k||. cosine: mean over tokens and value channels of |cos(k, X)|.
        state_norm: mean over tokens and value channels of |X_j|, the norm of a channel before the rewrite.
    """

    layer: int
    sublayer: str
    gate_histogram: tuple[int, ...] | None = None
    gate_mean: float | None = None
    discrepancy_before: float | None = None
    discrepancy_after: float | None = None
    direction_norm: float | None = None
    cosine: float | None = None
    state_norm: float | None = None

    def __post_init__(self) -> None:
        counts = self.gate_histogram
        if counts is not None and (len(counts) != GATE_BINS or min(counts) < 0):
            raise UserError(f"gate_histogram must hold {GATE_BINS} counts >= 0, got {counts}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a trained model writes on its own after `prompt`, the beginning of the validation part."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a condition's learning rate was chosen: the lowest mean loss on the last tenth of the training part.

    Fields:
        lr: the chosen one. edge: it is the lowest or the highest of the grid, so that a better one may lie beyond.
        grid, losses: the rates tried and their mean losses; None where a run diverged.
        seeds: of those runs; none is reported on.
    """

    lr: float
    edge: bool
    grid: tuple[float, ...]
    losses: tuple[float | None, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Factorial:
    """Factors whose effects are told apart, on the conditions that have them all and the levels in `where`.

    Without `interactions`, which a fraction of a full factorial may not tell from each other, main effects alone.
    """

    factors: tuple[str, ...]
    where: dict[str, str] = field(default_factory=dict)
    interactions: bool = True


@dataclass(frozen=True, kw_only=True)
class Power:
    """The plan for the number of seeds: `pilot_sd` is the spread of paired differences, `difference` what matters."""

    pilot_sd: float
    difference: float


@dataclass(frozen=True, kw_only=True)
class Primary:
    """What a study was made to find out, written down before it runs.

    Fields:
        condition, reference: the comparison that answers; None: with the baseline.
        refuted: what result would refute the hope behind it, in words and numbers.
        stop: when the study ends, such as "eight seeds, once".
    """

    condition: str
    reference: str | None = None
    refuted: str
    stop: str


@dataclass(frozen=True, kw_only=True)
class Extrapolate:
    """Carry the fitted laws to so many training FLOPs; with a floor, L = floor + b C^-a instead of L = b C^-a."""

    flops: float
    floor: bool = False


@dataclass(frozen=True, kw_only=True)
class ConditionResult:
    """One condition of the study. `flops_per_token` counts forward and backward, element-wise work included.

    Fields:
        control: the condition that this one is compared with besides the baseline.
        factors: its level of each factor.
        runs: at the study's first budget. matched: at the others; a run that serves two budgets has its curve once.
        sample: of its first finished run; None where there is no tokenizer, or from before there were samples.
    """

    name: str
    summary: str
    rule: str
    value_channels: int
    parameters: int
    flops_per_token: float
    cost: Cost | None = None
    runs: tuple[RunResult, ...] = ()
    rewrites: tuple[RewriteSummary, ...] = ()
    control: str | None = None
    factors: dict[str, str] = field(default_factory=dict)
    tuned: Tuned | None = None
    matched: dict[BudgetName, tuple[RunResult, ...]] = field(default_factory=dict)
    sample: Sample | None = None

    def __post_init__(self) -> None:
        for runs in (self.runs, *self.matched.values()):
            seeds = [run.seed for run in runs]
            if len(set(seeds)) != len(seeds):
                raise UserError(f"runs of '{self.name}' must have different seeds, got {seeds}")

    def at(self, budget: BudgetName) -> tuple[RunResult, ...]:
        """The runs at one of the study's budgets."""
        return self.matched.get(budget, self.runs)

    def losses(self, budget: BudgetName | None = None) -> dict[int, float]:
        """Validation loss by seed, of the runs that ended with one; at the first budget unless another is named."""
        runs = self.runs if budget is None else self.at(budget)
        return {run.seed: run.validation_loss for run in runs if run.validation_loss is not None}


@dataclass(frozen=True, kw_only=True)
class NGram:
    """n-grams counted on the training batches of the study's seeds, asked on its validation tokens: a floor to clear.

    Fields:
        order: n. losses: nats per token by seed, of `measure.ngram.WittenBell`.
    """

    order: int
    losses: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Measurements(Stored):
    """All that a study measured. Times are ISO 8601."""

    name: str
    description: str
    baseline: str
    started: str
    finished: str
    corpus: Corpus
    validation: Validation
    budget: Budget
    seeds: tuple[int, ...]
    conditions: tuple[ConditionResult, ...]
    budgets: tuple[BudgetName, ...] = ("tokens",)
    factorials: dict[str, Factorial] = field(default_factory=dict)
    power: Power | None = None
    exploratory: bool = False
    primary: Primary | None = None
    ngram: NGram | None = None
    """None where ids are too many to count, or runs too long."""

    def __post_init__(self) -> None:
        names = [condition.name for condition in self.conditions]
        if len(set(names)) != len(names):
            raise UserError(f"conditions must have different names, got {names}")
        if self.baseline not in names:
            raise UserError(f"baseline must be one of the conditions {names}, got '{self.baseline}'")
        unplanned = {run.seed for condition in self.conditions for run in condition.runs} - set(self.seeds)
        if unplanned:
            raise UserError(f"runs must have seeds of the study {list(self.seeds)}, got {sorted(unplanned)}")

    def condition(self, name: str) -> ConditionResult:
        return next(condition for condition in self.conditions if condition.name == name)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`condition` compared with `reference`, the baseline or its control, at one budget.

    Fields:
        budget: None where the runs of all conditions are alike in what they spend, as those of a task.
        differences: condition minus reference, by seed.
    """

    condition: str
    reference: str
    budget: BudgetName | None = None
    differences: dict[int, float]
    comparison: Comparison


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An effect of a factorial in nats per token; negative means a lower loss.

    Fields:
        factorial: the title of the factorial it belongs to.
        name: 'erase: yes - no' for a main effect, 'erase: yes - no x write: branch - target' for an interaction.
        values: by seed.
    """

    factorial: str
    name: str
    budget: BudgetName
    values: dict[int, float]
    comparison: Comparison


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Conditions by what their comparison with the baseline at the first budget shows; `seeds`: the most of any."""

    lower: tuple[str, ...]
    higher: tuple[str, ...]
    not_separated: tuple[str, ...]
    without_interval: tuple[str, ...]
    seeds: int


@dataclass(frozen=True, kw_only=True)
class StudyResults(Measurements):
    """A study with its analysis, computed once from what was measured: by `analyse`.

    Fields:
        seeds_needed: for the difference and the spread of `power`; None without these.
    """

    contrasts: tuple[Contrast, ...]
    effects: tuple[Effect, ...]
    headline: Headline
    seeds_needed: int | None

    def against_baseline(self) -> tuple[Contrast, ...]:
        """The contrasts with the baseline at the study's first budget, one per condition at most."""
        wanted = (self.baseline, self.budgets[0])
        return tuple(one for one in self.contrasts if (one.reference, one.budget) == wanted)

    def _repr_html_(self) -> str:
        """For a notebook: the conditions with their changes from the baseline, drawn where there are intervals."""
        found = {one.condition: one.comparison for one in self.against_baseline()}
        rows, drawn = [], []
        for one in self.conditions:
            losses, change = one.losses().values(), found.get(one.name)
            loss = f"{sum(losses) / len(losses):.4f}" if losses else "-"
            rows.append([one.name, loss, "-" if change is None else f"{change.mean:+.4f}", "-"])
            if change is not None and (reach := change.t_interval) is not None:
                rows[-1][-1] = f"{reach.low:+.4f} to {reach.high:+.4f}"
                drawn.append((change.mean, reach.low, reach.high))
        head = ("condition", "loss", f"change from {self.baseline}", "95 % interval")
        says = f"Changes from {self.baseline} with their 95 % intervals, in the order of the table"
        picture = notebook.intervals(drawn, says) if drawn else ""
        return notebook.shown(notebook.table(f"{self.name}: {self.description}", rows, head), picture)

    @property
    def answer(self) -> Contrast | None:
        """The primary contrast at the first budget; None where none was named."""
        if (one := self.primary) is None:
            return None
        wanted = (one.condition, one.reference or self.baseline, self.budgets[0])
        return next((own for own in self.contrasts if (own.condition, own.reference, own.budget) == wanted), None)

    def save(self, path: AnyPath) -> None:
        """Write the file atomically, without the curves, which the records of the runs hold."""
        plain = to_plain(self)
        for condition in plain["conditions"]:
            for runs in (condition["runs"], *condition["matched"].values()):
                for run in runs:
                    del run["curve"]
        write_json(Path(path), plain)


def load_results(path: AnyPath) -> StudyResults:
    """The results in a file that `StudyResults.save` wrote.

    Raises:
        UserError: the file is absent, of another format, or does not hold the results of a study.
    """
    return load_stored(StudyResults, path, "deepdelta study")
