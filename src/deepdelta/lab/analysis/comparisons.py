"""The comparisons of a study, computed once: each condition with the baseline and its control, at every budget."""

from collections.abc import Iterable, Mapping

from deepdelta.lab.analysis.factorial import effects
from deepdelta.lab.analysis.results import BudgetName, Contrast, Headline, Measurements, StudyResults
from deepdelta.lab.analysis.statistics import family, seeds_needed


def analyse(measured: Measurements) -> StudyResults:
    """The study with everything that its views say of differences."""
    found = tuple(one for budget in measured.budgets for one in _at_budget(measured, budget))
    power = measured.power
    return StudyResults(
        **{name: getattr(measured, name) for name in Measurements.__dataclass_fields__},
        contrasts=found,
        effects=effects(measured),
        headline=_headline(
            [one for one in found if (one.reference, one.budget) == (measured.baseline, measured.budgets[0])]
        ),
        seeds_needed=None if power is None else seeds_needed(power.pilot_sd, power.difference),
    )


def contrasts(
    controls: Mapping[str, str | None],
    baseline: str,
    values: Mapping[str, Mapping[int, float]],
    budget: BudgetName | None = None,
) -> tuple[Contrast, ...]:
    """Every condition against the baseline and against its control, on the seeds that both have: one family of tests.

    Args:
        controls: by condition, in the order of the contrasts.
        values: what is compared, by condition and seed.
    """
    differences = {
        (name, other): {
            seed: value - values[other][seed] for seed, value in values[name].items() if seed in values[other]
        }
        for name, control in controls.items()
        for other in dict.fromkeys((baseline, control))
        if other is not None and other != name
    }
    return tuple(
        Contrast(
            condition=name,
            reference=other,
            budget=budget,
            differences=differences[name, other],
            comparison=comparison,
        )
        for (name, other), comparison in family(differences).items()
    )


def _at_budget(measured: Measurements, budget: BudgetName) -> tuple[Contrast, ...]:
    """Holm's correction runs over all of a budget's comparisons that have a p-value: what holds at equal tokens, at
    equal FLOPs and at equal time are three questions, each answered with at most 5 % chance of any false finding."""
    controls = {condition.name: condition.control for condition in measured.conditions}
    losses = {condition.name: condition.losses(budget) for condition in measured.conditions}
    return contrasts(controls, measured.baseline, losses, budget)


def _headline(with_baseline: Iterable[Contrast]) -> Headline:
    names: dict[str, list[str]] = {"lower": [], "higher": [], "not_separated": [], "without_interval": []}
    most = 0
    for one in with_baseline:
        comparison = one.comparison
        side = "lower" if comparison.mean < 0 else "higher"
        shown = side if comparison.separated else "not_separated"
        names[shown if comparison.t_interval is not None else "without_interval"].append(one.condition)
        most = max(most, comparison.n)
    return Headline(**{key: tuple(own) for key, own in names.items()}, seeds=most)
