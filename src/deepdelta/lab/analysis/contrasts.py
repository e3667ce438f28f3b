"""A study's comparisons: every condition with the baseline and with its control, at every budget."""

from dataclasses import dataclass

from deepdelta.lab.analysis.results import BudgetName, StudyResults
from deepdelta.lab.statistics import Comparison, corrected, paired


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`condition` compared with `reference`, the baseline or its control, at one budget."""

    condition: str
    reference: str
    budget: BudgetName
    comparison: Comparison


def contrasts(results: StudyResults) -> tuple[Contrast, ...]:
    """At every budget, every condition against the baseline and against its control, on the seeds that both finished.

    Holm's correction runs over all of a budget's comparisons that have a p-value: what holds at equal tokens, at equal
    FLOPs and at equal time are three questions, each answered with at most 5 % chance of any false finding.
    """
    found: list[Contrast] = []
    for budget in results.budgets:
        pairs = [
            (condition, results.condition(name))
            for condition in results.conditions
            for name in dict.fromkeys((results.baseline, condition.control))
            if name is not None and name != condition.name
        ]
        names, comparisons = [], []
        for condition, reference in pairs:
            one, other = condition.losses(budget), reference.losses(budget)
            if shared := [seed for seed in results.seeds if seed in one and seed in other]:
                names.append((condition.name, reference.name))
                comparisons.append(paired([one[seed] - other[seed] for seed in shared]))
        found += [
            Contrast(condition=condition, reference=reference, budget=budget, comparison=comparison)
            for (condition, reference), comparison in zip(names, corrected(comparisons), strict=True)
        ]
    return tuple(found)


def compare(results: StudyResults) -> dict[str, Comparison]:
    """Those of the `contrasts` that compare with the baseline at the study's first budget, by condition."""
    return {
        one.condition: one.comparison
        for one in contrasts(results)
        if one.reference == results.baseline and one.budget == results.budgets[0]
    }
