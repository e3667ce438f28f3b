"""The outcome of a study in sentences that say no more than its numbers carry."""

from dataclasses import dataclass

from deepdelta.lab.analysis.contrasts import compare
from deepdelta.lab.analysis.results import StudyResults
from deepdelta.lab.statistics import MINIMUM_SEEDS, Comparison, separated, verdict


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`headline` answers the study's question; `verdicts` pairs condition and finding; `remarks` are the rest."""

    headline: str
    verdicts: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def summarise(results: StudyResults) -> Summary:
    """What came out, in plain English."""
    comparisons = compare(results)
    return Summary(
        headline=_headline(results, comparisons),
        verdicts=tuple((name, verdict(comparison)) for name, comparison in comparisons.items()),
        remarks=tuple(filter(None, (_runs(results), _costs(results), _gates(results)))),
    )


def _headline(results: StudyResults, comparisons: dict[str, Comparison]) -> str:
    if not comparisons:
        return f"Nothing to compare yet: no condition shares a finished seed with {results.baseline}."
    tested = {name: c for name, c in comparisons.items() if c.t_interval is not None}
    if not tested:
        most = max(c.n for c in comparisons.values())
        if most >= MINIMUM_SEEDS:
            return f"No condition can be compared with {results.baseline}: the seeds did not vary."
        return (
            f"No condition can be called better or worse than {results.baseline}: "
            f"{_count(most, 'seed')} {'is' if most == 1 else 'are'} too few for intervals, "
            f"which start at {MINIMUM_SEEDS}."
        )
    found = {name: c for name, c in tested.items() if separated(c)}
    parts = []
    for side, names in (
        ("Lower", [name for name, c in found.items() if c.mean < 0]),
        ("Higher", [name for name, c in found.items() if c.mean > 0]),
    ):
        if names:
            parts.append(f"{side} loss than {results.baseline}: {_join(names)}.")
    unseparated = [name for name in tested if name not in found]
    if unseparated and found:
        parts.append(f"Not separated from it: {_join(unseparated)}.")
    elif unseparated:
        parts.append(f"No condition separates from {results.baseline}: every interval leaves room for no difference.")
    untested = [name for name in comparisons if name not in tested]
    if untested:
        parts.append(f"Too few seeds to tell: {_join(untested)}.")
    return " ".join(parts)


def _runs(results: StudyResults) -> str:
    runs = [run for condition in results.conditions for run in condition.runs]
    diverged = sum(run.validation_loss is None for run in runs)
    return f"{_count(diverged, 'run')} diverged; comparisons rest on the seeds that remain." if diverged else ""


def _costs(results: StudyResults) -> str:
    costs = {c.name: c.cost for c in results.conditions if c.cost is not None and c.name != results.baseline}
    if not costs:
        return "What the conditions cost in speed and memory was not measured."
    slowest = min(costs, key=lambda name: costs[name].speed_ratio)
    fastest = max(costs, key=lambda name: costs[name].speed_ratio)
    largest = max(costs, key=lambda name: costs[name].peak_ratio)
    span = f"{costs[slowest].speed_ratio:.2f}x ({slowest})"
    if fastest != slowest:
        span = f"between {span} and {costs[fastest].speed_ratio:.2f}x ({fastest})"
    return (
        f"Cost here: the others train at {span} of {results.baseline}'s tokens/s and take up to "
        f"{costs[largest].peak_ratio:.2f}x its peak memory ({largest})."
    )


def _gates(results: StudyResults) -> str:
    parts = []
    for condition in results.conditions:
        means = [rewrite.gate_mean for rewrite in condition.rewrites if rewrite.gate_mean is not None]
        if means:
            parts.append(
                f"{sum(means) / len(means):.2f} in {condition.name} (sublayers {min(means):.2f} to {max(means):.2f})"
            )
    return f"Trained gates, which may lie between 0 and 2, average {_join(parts)}." if parts else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
