"""Studies as typed files: comparisons, comparisons over sizes, and searches."""

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from deepdelta.config import Count, Distinct, Seeds, Settings, from_plain, merged, to_plain
from deepdelta.errors import UserError, nearest, unknown
from deepdelta.files import FORMAT, check_format, parse, read_object
from deepdelta.lab.analysis.factorial import design
from deepdelta.lab.analysis.results import BudgetName, Extrapolate, Factorial, Power, Primary
from deepdelta.lab.analysis.statistics import seeds_needed
from deepdelta.models import GPTConfig, parameter_count
from deepdelta.nn.config import refuse_unused
from deepdelta.training import TrainConfig
from deepdelta.training.config import run_settings, settings_over

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

COMMON = frozenset({"data", "device", "precision", "threads"})
"""Settings that no condition may change."""

START_SEED = 1000
"""What is added to a run's seed for the run that it starts from, or it would see the same batches over again."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One model of the comparison: what it is, and what it changes in the study's common settings."""

    summary: str
    changes: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    """The condition that this one is compared with besides the baseline."""
    factors: dict[str, str] = field(default_factory=dict)
    """Its level of each factor."""


@dataclass(frozen=True, kw_only=True)
class Tune(Settings):
    """Each condition's learning rate is chosen on the same grid, by the loss on the last tenth of the training part."""

    lr: tuple[float, ...]
    seeds: Seeds
    """None of those that are reported."""
    steps: Count | None = None
    """Of a tuning run; None: the study's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.lr) < 2 or len(set(self.lr)) != len(self.lr) or not all(rate > 0 for rate in self.lr):
            raise UserError(f"lr must be a grid of at least two different rates above 0, got {list(self.lr)}.")


@dataclass(frozen=True, kw_only=True)
class Rung(Settings):
    """A round of a search: every candidate left runs so long on so many seeds, the best `keep` go on."""

    steps: Count
    seeds: Seeds
    keep: Count


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving over the conditions, by the loss on the last tenth of the training part."""

    rungs: tuple[Rung, ...]
    candidates: tuple[str, ...] = ()
    """Of the conditions; none named: all but the baseline, which runs in every rung to compare with."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Settings):
    """What studies of every kind have: conditions that differ in the named changes and in nothing else."""

    format: int = FORMAT
    name: str
    question: str
    baseline: str
    seeds: Seeds
    train: dict[str, Any]
    """Common settings, keys of TrainConfig or `preset`; the seed comes from `seeds`. A condition whose residual names
    a `rule` or a `preset` takes nothing from the residual here."""
    conditions: dict[str, Condition]
    cost_rounds: Count = 12
    """Interleaved rounds of the cost phase."""
    rewrite_tokens: Count = 16384
    """Validation tokens per run on which gates and discrepancies are collected."""
    tune: Tune | None = None
    match_parameters: bool = False
    """Give every condition's MLP the width (`mlp_dim`) that brings its parameters nearest to the baseline's."""
    keep_checkpoints: bool = True
    """Keep the trained weights of finished runs; results need their records alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.name, *self.conditions):
            if not FILE_NAME.fullmatch(name):
                raise UserError(
                    f"names of studies and conditions name files: letters, digits, '.', '_' and '-' only, got '{name}'."
                )
        check_known("baseline must be one of the conditions", self.baseline, self.conditions)
        if "seed" in self.train or any("seed" in condition.changes for condition in self.conditions.values()):
            raise UserError("the seed of a run comes from the study's seeds; remove 'seed' from train and changes.")
        for name, condition in self.conditions.items():
            for key in COMMON & set(condition.changes):
                raise UserError(
                    f"conditions must share '{key}', or their losses or costs do not compare: move it from the "
                    f"changes of {name} to train."
                )
            for key, by in self.decided().items():
                if key in condition.changes:
                    raise UserError(f"'{key}' is decided by the study's {by}: remove it from the changes of {name}.")
            if condition.control is not None:
                others = [other for other in self.conditions if other != name]
                check_known(f"the control of {name} must be another condition", condition.control, others)
        if self.tune and (shared := set(self.tune.seeds) & set(self.seeds)):
            raise UserError(
                f"tuning must not see the seeds that are reported, both have {sorted(shared)}: change tune.seeds."
            )
        self.check()
        own = self.train_config(self.baseline, self.seeds[0]).tokens_per_step
        for name in self.conditions:
            if (other := self.train_config(name, self.seeds[0]).tokens_per_step) != own:
                raise UserError(
                    f"all conditions must make steps of as many tokens, got {own:,} for {self.baseline} and {other:,} "
                    f"for {name}: set batch_size, accumulate and context in train."
                )

    def check(self) -> None:
        """Refuse what does not go with a kind's own tables."""

    def decided(self) -> dict[str, str]:
        """The settings that another part of the study than a condition decides, and which part."""
        return {"lr": "tune"} if self.tune else {}

    def setting_steps(self) -> list[str]:
        """What besides `train` says how long runs are."""
        return [name for name, condition in self.conditions.items() if "steps" in condition.changes]

    def lasting(self, steps: int) -> "StudyConfig":
        """The study with another number of steps per run; its warm-up keeps its share.

        Raises:
            UserError: another part of the study than `train` says how long runs are.
        """
        if by := ", ".join(self.setting_steps()):
            raise UserError(f"the steps of {self.name} are set by {by}, so --steps cannot; change a copy of its file.")
        run = self.train_config(self.baseline, self.seeds[0]).stretched(steps)
        return replace(self, train=merged(self.train, {"steps": steps, "warmup": run.warmup}))

    def train_config(self, condition: str, seed: int) -> TrainConfig:
        """The run of one condition and seed."""
        changes = self.conditions[condition].changes
        where = f"study {self.name}, condition {condition}"
        run = run_settings(self.train, changes, {"seed": seed}, where=where)
        refuse_unused(run.model.residual, changes.get("model", {}).get("residual", {}), where)
        run = replace(run, lr=run.rate)
        if self.match_parameters and condition != self.baseline:
            model = as_large_as(self.train_config(self.baseline, seed).model, run.model, condition)
            return replace(run, model=model)
        return run


@dataclass(frozen=True, kw_only=True)
class Comparison(StudyConfig):
    """Every condition runs once per seed, then all are compared."""

    budgets: Annotated[tuple[BudgetName, ...], Distinct] = ("tokens",)
    """What runs have in common: tokens (the same steps), flops, time. The first is the one that pictures show."""
    factorials: dict[str, Factorial] = field(default_factory=dict)
    power: Power | None = None
    exploratory: bool = False
    """Allow fewer seeds than `power` asks for; every table then says so."""
    primary: Primary | None = None
    """The comparison that answers the question, what would refute it, and when the study ends."""
    start: dict[str, Any] | None = None
    """Changes of the baseline's settings for a run per seed that is trained first; others go on from its weights."""

    def decided(self) -> dict[str, str]:
        return super().decided() | ({"steps": "budgets"} if set(self.budgets) - {"tokens"} else {})

    def check(self) -> None:
        if set(self.budgets) - {"tokens"}:
            self.check_work()
        if self.start is not None:
            self.check_start(self.start)
        if (one := self.primary) is not None:
            others = [name for name in self.conditions if name != self.baseline]
            check_known("the primary contrast's condition must be one besides the baseline", one.condition, others)
            known = [name for name in (self.baseline, self.conditions[one.condition].control) if name is not None]
            check_known(
                f"{one.condition} is compared with the baseline and its control", one.reference or self.baseline, known
            )
        for title, factorial in self.factorials.items():
            design(title, factorial, {name: condition.factors for name, condition in self.conditions.items()})
        if self.power is not None and not self.exploratory:
            needed = seeds_needed(self.power.pilot_sd, self.power.difference)
            if len(self.seeds) < needed:
                raise UserError(
                    f"a difference of {self.power.difference:g} nats with a paired spread of {self.power.pilot_sd:g} "
                    f"takes {needed} seeds, the study has {len(self.seeds)}: add seeds, or set exploratory = true, "
                    "which every table then says."
                )

    def check_work(self) -> None:
        """Refuse steps whose work is not counted."""
        for name in self.conditions:
            if self.train_config(name, self.seeds[0]).draw_repeats:
                raise UserError(
                    f"{name} draws how often its layers are repeated, and FLOPs and times are those of the most "
                    "repetitions: leave draw_repeats out, or compare at equal tokens alone."
                )

    def check_start(self, start: dict[str, Any]) -> None:
        if self.tune:
            raise UserError("runs that are tuned, searched among or fitted over sizes have no start: remove start.")
        if self.match_parameters:
            raise UserError("runs that go on from the baseline's weights need its mlp_dim: remove match_parameters.")
        for key in sorted(COMMON & set(start)):
            raise UserError(f"the start must share '{key}' with the runs that go on from it: move it to train.")
        if "seed" in start:
            raise UserError("the seed of a start comes from the study's seeds; remove 'seed' from start.")
        for name in self.conditions:
            if self.train_config(name, self.seeds[0]).init_offset:
                raise UserError(f"runs that go on from a start have its weights: remove init_offset from '{name}'.")
        self.start_config(self.seeds[0])

    def start_config(self, seed: int) -> TrainConfig:
        """The run that those of a seed start from."""
        assert self.start is not None
        baseline, other = to_plain(self.train_config(self.baseline, seed)), {"seed": seed + START_SEED}
        return run_settings(baseline, self.start, other, where=f"study {self.name}, start")


@dataclass(frozen=True, kw_only=True)
class Sizes(Comparison):
    """A comparison once per size, then laws of loss against compute."""

    sizes: dict[str, dict[str, Any]]
    """Changes of `train` by size."""
    extrapolate: Extrapolate

    def setting_steps(self) -> list[str]:
        return [size for size, changes in self.sizes.items() if "steps" in changes] + super().setting_steps()

    def check(self) -> None:
        super().check()
        self.check_work()
        needed = 2 + self.extrapolate.floor
        if len(self.sizes) < needed or not self.extrapolate.flops > 0:
            raise UserError(
                f"extrapolate needs at least {needed} sizes and flops above 0, "
                f"got {len(self.sizes)} and {self.extrapolate.flops:g}."
            )
        for size in self.sizes:
            if not FILE_NAME.fullmatch(size):
                raise UserError(f"names of sizes name folders: letters, digits, '.', '_' and '-' only, got '{size}'.")
            self.sized(size)

    def check_start(self, start: dict[str, Any]) -> None:
        raise UserError("runs that are tuned, searched among or fitted over sizes have no start: remove start.")

    def sized(self, size: str) -> Comparison:
        """The comparison at one of the sizes."""
        shared = {one.name: getattr(self, one.name) for one in fields(Comparison)}
        train = settings_over(self.train, self.sizes[size])
        return Comparison(**shared | {"name": f"{self.name}-{size}", "train": train})


@dataclass(frozen=True, kw_only=True)
class Search(StudyConfig):
    """A search among the conditions; `seeds` stay unused, for the study that confirms."""

    search: Halving

    def setting_steps(self) -> list[str]:
        return super().setting_steps() or ["the rungs of the search"]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The conditions that the search chooses among."""
        return self.search.candidates or tuple(name for name in self.conditions if name != self.baseline)

    def check(self) -> None:
        others = [other for other in self.conditions if other != self.baseline]
        for name in self.candidates:
            check_known("candidates must be conditions other than the baseline", name, others)
        seen = {seed for rung in self.search.rungs for seed in rung.seeds}
        if shared := seen & set(self.seeds):
            raise UserError(
                f"the search must not see the seeds that confirm, both have {sorted(shared)}: change its rungs' seeds."
            )
        left = [len(self.candidates), *(rung.keep for rung in self.search.rungs)]
        if len(left) < 2 or any(b >= a for a, b in itertools.pairwise(left)):
            raise UserError(f"every rung must keep fewer candidates than it gets, got {left[1:]} of {left[0]}.")


def check_known(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UserError(f"{what}, got '{name}'; {nearest(name, known)}")


def kind_of(plain: Mapping[str, Any], where: str) -> type[StudyConfig]:
    """The kind of study that a file describes, by its tables.

    Raises:
        UserError: it has tables of different kinds.
    """
    kind: type[StudyConfig] = Search if "search" in plain else Comparison
    if "sizes" in plain or "extrapolate" in plain:
        if kind is Search:
            raise UserError(f"{where}: a study either searches or fits laws over sizes: remove search or sizes.")
        if not ("sizes" in plain and "extrapolate" in plain):
            raise UserError(f"{where}: sizes and extrapolate go together: give both or neither.")
        kind = Sizes
    if kind is Search:
        for key in {one.name for one in fields(Comparison)} - {one.name for one in fields(Search)}:
            if key in plain:
                raise UserError(f"{where}: a search compares on no seeds that are reported: remove {key} or search.")
    return kind


def as_large_as(baseline: GPTConfig, model: GPTConfig, condition: str) -> GPTConfig:
    """The model with the MLP width that brings its parameters nearest to the baseline's.

    Raises:
        UserError: `mlp_dim` is set, no width does it, or the size of the vocabulary would have to be known.
    """
    if model.mlp_dim != baseline.mlp_dim:
        raise UserError(
            "match_parameters decides mlp_dim: remove it from the changes of conditions, got "
            f"{baseline.mlp_dim} for the baseline and {model.mlp_dim} for {condition}."
        )
    sizes = {(one.vocab_size, one.dim) for one in (baseline, model)}
    if len(sizes) > 1 and None in (baseline.vocab_size, model.vocab_size):
        raise UserError(
            f"match_parameters needs vocab_size where it or dim differs, as for {condition}: set it in train."
        )

    def size(one: GPTConfig, mlp_dim: int) -> int:
        return parameter_count(replace(one, mlp_dim=mlp_dim, vocab_size=one.vocab_size or 1))

    wanted, own, width = size(baseline, baseline.mlp_width), size(model, model.mlp_width), model.mlp_width
    matched = width + round((wanted - own) / (size(model, width + 1) - own))
    if matched < 1:
        raise UserError(f"{condition} has more parameters than the baseline even with an MLP of width 1; shrink it.")
    return model if matched == width else replace(model, mlp_dim=matched)


def named_studies() -> list[str]:
    """The studies that ship with the package."""
    folder = resources.files("deepdelta.lab") / "studies"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def study_questions() -> dict[str, str]:
    """What each named study asks."""
    return {name: _named(name)["question"] for name in named_studies()}


def _named(name: str) -> dict[str, Any]:
    text = (resources.files("deepdelta.lab") / "studies" / f"{name}.toml").read_text(encoding="utf-8")
    return dict(parse(text, name, "install the package anew", toml=True))


def load_study(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """A named study, or the one in a TOML file, with some of its keys replaced.

    Raises:
        UserError: no such study or file, or one that does not hold a valid study.
    """
    if name_or_file.endswith(".toml"):
        file = Path(name_or_file)
        if not file.is_file():
            raise UserError(f"there is no study file {file}; named studies are: {', '.join(named_studies())}.")
        plain = read_object(file, "mend it")
    elif name_or_file in named_studies():
        plain = _named(name_or_file)
    else:
        raise unknown("study", name_or_file, study_questions(), "A file of your own ends in .toml. ")
    where = f"study {name_or_file}"
    check_format(plain, where, missing=FORMAT)
    return from_plain(kind_of(plain, where), merged(plain, overrides or {}), where=where)
