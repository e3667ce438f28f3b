"""The outcome of a study in sentences that say no more than its numbers carry."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from deepdelta.lab.analysis.comparison import MINIMUM_SEEDS
from deepdelta.lab.analysis.results import StudyResults
from deepdelta.lab.views.tables import verdict


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`answer` says which condition, how much, how sure, at what cost; `headline` sorts all of them; `verdicts` pairs
    condition and finding; `remarks` are the rest."""

    answer: str
    headline: str
    verdicts: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def summarise(results: StudyResults) -> Summary:
    """What came out, in plain English."""
    return Summary(
        answer=_answer(results),
        headline=" ".join(filter(None, (_primary(results), _headline(results)))),
        verdicts=tuple((one.condition, verdict(one.comparison)) for one in results.against_baseline()),
        remarks=tuple(filter(None, (_runs(results), _costs(results), _gates(results), _uncounted(results)))),
    )


def _answer(results: StudyResults) -> str:
    """One sentence on the primary contrast; without one on the lowest mean, of conditions that are lower if any is."""
    against = results.against_baseline()
    lower = [one for one in against if one.condition in results.headline.lower]
    one = results.answer or min(lower or against, key=lambda own: own.comparison.mean, default=None)
    if one is None:
        return _headline(results)
    chosen = results.answer is not None
    name, other, found = one.condition, one.reference, one.comparison
    size, seeds = f"{abs(found.mean):.4f} nats per token", _count(found.n, "seed")
    if (interval := found.t_interval) is None:
        if found.n >= MINIMUM_SEEDS:
            return _headline(results)
        which = "" if chosen else ", the lowest mean of all others"
        side = "below" if found.mean < 0 else "above"
        said = (
            f"{name} ends {size} {side} {other}{which}, but {seeds} {'is' if found.n == 1 else 'are'} too few to tell"
        )
    elif found.separated and (chosen or found.mean < 0):
        ends = sorted((abs(interval.low), abs(interval.high)))
        side = "lower" if found.mean < 0 else "higher"
        sure = f"95 % interval {ends[0]:.4f} to {ends[1]:.4f}, {seeds}"
        said = f"{name} has a {side} loss than {other}, by {size} ({sure})"
    else:
        begin = f"{name} and {other} are not told apart: the difference is"
        if not chosen:
            begin = f"No condition is sure to have a lower loss than {other}: the lowest, {name}, differs by"
        sure = f"95 % interval {interval.low:+.4f} to {interval.high:+.4f}, {seeds}"
        said = f"{begin} {found.mean:+.4f} nats per token ({sure})"
    return f"{said}, at {_price(results, name)}{_floor(results, name)}."


def _price(results: StudyResults, name: str) -> str:
    condition, baseline = results.condition(name), results.condition(results.baseline)
    flops = f"{condition.flops_per_token / baseline.flops_per_token:.2f} times the FLOPs per token of {baseline.name}"
    return flops if condition.cost is None else f"{condition.cost.speed_ratio:.2f} times the speed and {flops}"


def _floor(results: StudyResults, name: str) -> str:
    """What counted n-grams have."""
    if results.ngram is None or not (losses := results.condition(name).losses()):
        return ""
    counted, own = fmean(results.ngram.losses.values()), fmean(losses.values())
    return f"; counted {results.ngram.order}-grams have {counted:.4f}, {name} {own:.4f}"


def _primary(results: StudyResults) -> str:
    if (one := results.answer) is None:
        return ""
    return f"The primary contrast, {one.condition} against {one.reference}: {verdict(one.comparison)}."


def _headline(results: StudyResults) -> str:
    found, baseline = results.headline, results.baseline
    if not found.seeds:
        return f"Nothing to compare yet: no condition shares a finished seed with {baseline}."
    if not (separated := found.lower + found.higher) and not found.not_separated:
        if found.seeds >= MINIMUM_SEEDS:
            return f"No condition can be compared with {baseline}: the seeds did not vary."
        return (
            f"No condition can be called better or worse than {baseline}: {_count(found.seeds, 'seed')} "
            f"{'is' if found.seeds == 1 else 'are'} too few for intervals, which start at {MINIMUM_SEEDS}."
        )
    parts = [
        f"{side} loss than {baseline}: {_join(names)}."
        for side, names in (("Lower", found.lower), ("Higher", found.higher))
        if names
    ]
    if found.not_separated and separated:
        parts.append(f"Not separated from it: {_join(found.not_separated)}.")
    elif found.not_separated:
        parts.append(f"No condition separates from {baseline}: every interval leaves room for no difference.")
    if found.without_interval:
        parts.append(f"Too few seeds to tell: {_join(found.without_interval)}.")
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
    return f"Trained gates (0 keeps, 1 erases, 2 mirrors) average {_join(parts)}." if parts else ""


def _uncounted(results: StudyResults) -> str:
    return "" if results.ngram is not None else "What counted n-grams have on this text was not measured."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
