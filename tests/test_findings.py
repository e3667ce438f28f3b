"""What the pages say is what the results hold: every interval that they quote, every small table of their own."""

import json
import math
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from deepdelta.config import from_plain
from deepdelta.lab.analysis.comparison import Comparison
from deepdelta.lab.analysis.results import StudyResults, load_results
from deepdelta.lab.analysis.statistics import paired
from deepdelta.lab.analysis.tasks import TaskResults
from deepdelta.lab.experiments.config import load_study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", *(f"docs/{page}.md" for page in ("findings", "sizes", "attribution", "beyond-text")))
}
SENTENCES = {name: " ".join(text.split()) for name, text in PAGES.items()}
SIZED = ("additive", "additive-convolution", "delta-token-random")
TEXTS = ("headline", "headline-tinyshakespeare")
CODE = ("", "-tinyshakespeare")

# Compared after looking, which is why they stand in no study: the condition and what it is compared with.
AFTERWARDS = [
    *(("operators", "plain-start", rival) for rival in ("hyper-connections", "mhc")),
    ("headline", "delta-token-random", "additive-convolution"),
    ("headline-tinyshakespeare", "delta-token-random", "additive-convolution"),
    ("larger", "delta-token-random", "normed-convolution"),
    ("larger", "delta-token-random", "additive-convolution"),
    *((f"code-form{text}", one, "normed-code-quiet") for text in CODE for one in ("code-cc-low-gate", "constant-half")),
    *((f"sizes/{size}", "delta-token-random", "additive-convolution") for size in ("small", "medium", "large")),
]
# Every comparison of a residual with the same without its erase beside a write, at the length of a whole study.
ERASE = [
    ("headline", "delta-token-random", "write-only-token-random"),
    ("headline-tinyshakespeare", "delta-token-random", "write-only-token-random"),
    ("paper-form", "paper-cc", "write-only"),
    ("paper-form-tinyshakespeare", "paper-cc", "write-only"),
    ("erase-on-norm", "normed-convolution-erase", "normed-convolution"),
    ("erase-on-norm-tinyshakespeare", "normed-convolution-erase", "normed-convolution"),
    ("erase-on-norm", "expanded-normed-erase-token-random", "expanded-normed-token-random"),
    ("erase-on-norm-tinyshakespeare", "expanded-normed-erase-token-random", "expanded-normed-token-random"),
    ("larger", "delta-token-random", "write-only-token-random"),
    ("code-form", "code-cc", "code-cc-write-only"),
    ("code-form-tinyshakespeare", "code-cc", "code-cc-write-only"),
    ("operators", "plain-start", "plain-start-write-only"),
    ("operators", "code-low-gate", "code-low-gate-write-only"),
    ("asked", "delta", "write-only"),
    ("asked", "delta-asked", "write-only-asked"),
    ("blocks", "erase", "additive"),
]
# Of tasks, compared after looking: in this number.
TASKS_AFTERWARDS = [
    ("registers", "delta-4", "additive-wide", "accuracy"),
    ("loops", "code", "code-write-only", "loss_6"),
    ("loops", "default", "default-write-only", "loss_6"),
    ("loops", "code-low-gate-1", "code-low-gate", "loss_32"),
    ("loops", "code-low-gate-1", "hyper-connections", "loss_6"),
    ("loops", "code-low-gate-1", "retention", "loss_16"),
    ("loops-fp64", "code-low-gate-1", "retention", "loss_32"),
    ("loops-fp64", "code-low-gate-1", "hyper-connections", "loss_32"),
]


@cache
def study(name: str) -> StudyResults:
    return load_results(RESULTS / name / "results.json")


@cache
def task(name: str) -> TaskResults:
    file = RESULTS / f"task-{name}" / "results.json"
    return from_plain(TaskResults, json.loads(file.read_text(encoding="utf-8")), where=str(file))


def differences(name: str, condition: str, reference: str) -> list[float]:
    results = study(name)
    one, other = results.condition(condition).losses(), results.condition(reference).losses()
    return [one[seed] - other[seed] for seed in results.seeds]


def comparisons() -> Iterator[Comparison]:
    studies = [str(file.parent.relative_to(RESULTS)) for file in RESULTS.glob("**/results.json")]
    for name in studies:
        if name.startswith("task-"):
            yield from (one.comparison for one in task(name.removeprefix("task-")).contrasts)
        elif not name.startswith(("bench-", "triton-")):
            yield from (one.comparison for one in study(name).contrasts)
            yield from (one.comparison for one in study(name).effects)
    yield from (paired(differences(*one)) for one in AFTERWARDS)
    for name, condition, reference, metric in TASKS_AFTERWARDS:
        one, other = (
            {seed: run[metric] for seed, run in found.metrics.items()}
            for asked in (condition, reference)
            for found in task(name).conditions
            if found.name == asked
        )
        yield paired([one[seed] - other[seed] for seed in one])


def quoted(mean: float, low: float, high: float, digits: int) -> str:
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}"


@cache
def known() -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for one in comparisons():
        if one.t_interval is not None:
            for digits in (3, 4):
                text = quoted(one.mean, one.t_interval.low, one.t_interval.high, digits)
                found.setdefault(text, []).append(one.adjusted_p)
    return found | {pooled()[0]: [None]}


def pooled() -> tuple[str, float, int]:
    """The mean of all erases weighted by precision with its normal interval, Cochran's Q and the number of pairs."""
    found = [paired(differences(*one)) for one in ERASE]
    weights = [one.n / one.sd**2 for one in found if one.sd]
    mean = sum(weight * one.mean for weight, one in zip(weights, found, strict=True)) / sum(weights)
    reach = float(stats.norm.ppf(0.975)) / math.sqrt(sum(weights))
    spread = sum(weight * (one.mean - mean) ** 2 for weight, one in zip(weights, found, strict=True))
    return quoted(mean, mean - reach, mean + reach, 4), spread, sum(one.n for one in found)


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_belongs_to_a_committed_comparison(page: str) -> None:
    found = re.findall(r"([+-]\d\.\d+ \([+-]\d\.\d+ to [+-]\d\.\d+)(?:, p = (\d\.\d+))?(?:\)|,)", SENTENCES[page])
    assert found
    for text, p in found:
        assert text in known(), text
        if p:
            digits = len(p.partition(".")[2])
            assert float(p) in [round(one, digits) for one in known()[text] if one is not None], (text, p)


def test_the_erase() -> None:
    _, spread, runs = pooled()
    page = SENTENCES["docs/findings.md"]
    assert f"sixteen comparisons, {runs} pairs of runs" in page
    assert f"(Q = {spread:.1f} on {len(ERASE) - 1} degrees of freedom)" in page


@pytest.mark.parametrize("page", ["README.md", "docs/findings.md"])
def test_the_table_of_the_headline(page: str) -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([+-].*) \| ([+-].*) \|$", PAGES[page], re.MULTILINE)
    assert len(rows) >= 4 and ("paper-cc" in dict((row[0], row) for row in rows))
    for condition, *cells in rows:
        for name, cell in zip(TEXTS, cells, strict=True):
            (found,) = (
                one.comparison
                for one in study(name).contrasts
                if (one.condition, one.reference, one.budget) == (condition, "additive", "flops")
            )
            assert found.t_interval is not None
            assert cell == quoted(found.mean, found.t_interval.low, found.t_interval.high, 3) + ")"


def test_the_readme_has_the_five_sentences_of_the_findings() -> None:
    def sentences(page: str) -> list[str]:
        text = PAGES[page].partition("\n1. ")[2].partition("\n\n")[0]
        return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split())).split("**")

    assert sentences("README.md") == sentences("docs/findings.md")
    assert len(sentences("README.md")) == 11


def test_what_a_step_costs() -> None:
    text = (RESULTS / "bench-bar" / "table.md").read_text(encoding="utf-8")
    row = r"^\| {}[^|]*\| paper-cc, fused / additive \| {} \| [^|]*\| (\d\.\d+)"
    ratios = [
        float(ratio) for ratio in re.findall(row.format("training, ", r"forward \+ backward"), text, re.MULTILINE)
    ]
    (memory,) = re.findall(row.format("memory, 24 layers", "peak memory"), text, re.MULTILINE)
    assert len(ratios) == 3
    for page in ("README.md", "docs/findings.md"):
        assert f"at {min(ratios):.2f} to {max(ratios):.2f} of the plain speed" in SENTENCES[page]
        assert f"{float(memory):.2f} times the memory" in SENTENCES[page]


def test_the_means_of_a_control_matrix() -> None:
    results = study("control-matrix")
    states = ("", "-4-repeat-channel", "-4-repeat-token", "-4-conv-channel", "-4-conv-token")
    for rule in ("additive", "additive-erase", "write-only", "delta", "erase-only"):
        losses = [list(results.condition(rule + state).losses().values()) for state in states]
        cells = [f"{statistics.fmean(own):.3f} ± {statistics.stdev(own):.3f}" for own in losses]
        assert all(len(own) == 5 for own in losses)
        assert f"| {rule} | {' | '.join(cells)} |" in PAGES["docs/attribution.md"]


def test_what_audited_runs_lose() -> None:
    audits: list[list[dict[str, Any]]] = [
        json.loads((RESULTS / name / "audit.json").read_text(encoding="utf-8"))["findings"]["everywhere"]
        for name in ("audit-delta-token-random", "audit-delta-token-random-tinyshakespeare", "audit-paper-cc")
    ]

    def changes(intervention: str, digits: int) -> str:
        found = [one["change"]["mean"] for audit in audits for one in audit if one["intervention"] == intervention]
        return "{}, {} and {}".format(*(f"{one:+.{digits}f}" for one in found))

    page = SENTENCES["docs/attribution.md"]
    assert f"the loss of the three runs rises by {changes('erase cut', 3)}; without any write by" in page
    assert f"without any write by {changes('write cut', 3)}" in page
    assert f"Holding all of them at 1 costs {changes('gate 1', 3)}" in page


def test_the_headline_rests_on_what_its_search_chose() -> None:
    search = json.loads((RESULTS / "parameterization" / "search.json").read_text(encoding="utf-8"))
    headline, candidates = load_study("headline"), load_study("parameterization")
    (winner,) = search["winners"]
    residual = candidates.conditions[winner].changes["model"]["residual"]
    assert headline.conditions[winner].changes["model"]["residual"] == residual
    for tuned in search["tuned"].values():
        finished = [(loss, rate) for rate, loss in zip(tuned["grid"], tuned["losses"], strict=True) if loss is not None]
        assert tuned["lr"] == min(finished)[1] and not set(tuned["seeds"]) & set(headline.seeds)
    assert candidates.search is not None
    assert not set(headline.seeds) & {seed for rung in candidates.search.rungs for seed in rung.seeds}


def test_what_the_first_rung_of_the_search_hints_at() -> None:
    search = json.loads((RESULTS / "parameterization" / "search.json").read_text(encoding="utf-8"))
    ranking = search["rungs"][0]["ranking"]
    change = {one["condition"]: f"{one['change']['mean']:+.3f}" for one in ranking}
    page = SENTENCES["docs/attribution.md"]
    assert f"{change['delta-token-random']} for `delta`, against {change['delta-token']} with the start" in page
    targets = f"({change['delta-constant-target']} and {change['delta-sigmoid-target']}) were ahead of the linear one"
    assert f"{targets} with the same gate ({change['delta-low-gate']})" in page
    assert f"({change['paper-cc']} against {change['delta-low-gate']})" in page
    assert [one["condition"] for one in ranking].index("paper-cc") == 39 and len(ranking) == 41
    (last,) = [one for one in search["rungs"][-1]["ranking"] if one["condition"] == search["winners"][0]]
    assert f"`{search['winners'][0]}`: {last['change']['mean']:+.3f} in the last rung" in page


def test_the_sizes() -> None:
    for size, of in (("small", "d 32, 2 layers"), ("medium", "d 64, 4 layers"), ("large", "d 96, 6 layers")):
        results = study(f"sizes/{size}")
        plain, convolution, delta = (results.condition(one).losses() for one in SIZED)
        changes = []
        for one, other in ((convolution, plain), (delta, plain), (delta, convolution)):
            found = paired([one[seed] - other[seed] for seed in results.seeds])
            assert found.n == 5 and found.t_interval is not None
            changes.append(quoted(found.mean, found.t_interval.low, found.t_interval.high, 3) + ")")
        cells = (f"{of}, {results.budget.steps} steps", f"{statistics.fmean(plain.values()):.3f}", *changes)
        assert f"| {' | '.join(cells)} |" in PAGES["docs/sizes.md"]


def test_the_table_of_the_groups() -> None:
    for name, group in (("Z2 (parity)", "z2"), ("S3", "s3"), ("D4", "d4"), ("A5", "a5")):
        cells = []
        for condition in ("gate-0-1", "gate-0-2", "state-target"):
            (found,) = (one.metrics for one in task(f"words-{group}").conditions if one.name == condition)
            solved, accuracy = (statistics.fmean(run[key] for run in found.values()) for key in ("solved", "accuracy"))
            cells.append(f"{round(solved * len(found))} of {len(found)}, {accuracy:.3f}")
        assert f"| {name} | {' | '.join(cells)} |" in PAGES["docs/beyond-text.md"]


def test_the_registers() -> None:
    found = {one.name: one for one in task("registers").conditions}

    def mean(condition: str, metric: str = "accuracy") -> float:
        return statistics.fmean(run[metric] for run in found[condition].metrics.values())

    told = mean("delta-4"), mean("additive-wide"), mean("write-only-4"), mean("default-4")
    for page in ("README.md", "docs/findings.md"):
        text = " ".join(PAGES[page].split())
        said = "({:.3f} right), x + F(x) with as large a state {:.3f}, the same rule without its erase {:.3f}, the"
        assert f"{said} default {{:.3f}}.".format(*told) in text
    page = " ".join(PAGES["docs/beyond-text.md"].split())
    twin = mean("write-only-4", "accuracy_trained"), mean("write-only-4", "growth")
    assert (
        "only writes has {:.3f} at the trained depth, with a state {:.1f} times as large at 128".format(*twin) in page
    )
    wide = mean("additive-wide", "accuracy_trained"), mean("additive-wide")
    assert "({:.3f}) and drifts: {:.3f} at 128".format(*wide) in page
    assert "not enough**: {:.3f} at the trained depth".format(mean("delta", "accuracy_trained")) in page
    default = mean("default-4", "accuracy_trained"), mean("default-4")
    assert "does not learn it**: {:.3f} at the trained depth, {:.3f} at 128.".format(*default) in page
    rates = {name: [run["lr"] for run in found[name].metrics.values()] for name in found}
    assert all(rate == 0.06 for name in ("delta", "gru") for rate in rates[name])
    assert [rates[name].count(0.006) for name in ("additive-wide", "write-only-4")] == [6, 4]
    assert all(run["accuracy"] > 0.9995 for name in ("delta-4", "gru-wide") for run in found[name].metrics.values())


def test_the_repetitions() -> None:
    found = {one.name: one.metrics.values() for one in task("loops").conditions}

    def mean(condition: str, metric: str) -> float:
        return statistics.fmean(run[metric] for run in found[condition])

    def rise(condition: str) -> float:
        return mean(condition, "loss_32") - mean(condition, "loss_6")

    page = " ".join(PAGES["docs/beyond-text.md"].split())
    assert f"the code form rises by {rise('code'):.3f}, the plain residual's by {rise('additive'):.3f}." in page
    others = [mean(one, metric) for one in ("hyper-connections", "retention") for metric in ("loss_6", "loss_8")]
    assert "have {:.3f} and {:.3f} at 6 and at 8, retention {:.3f} and {:.3f}".format(*others) in page
    gone = [run["loss_32"] > 5.5 for name in ("hyper-connections", "retention") for run in found[name]]
    wide = {one.name: [run["loss_32"] for run in one.metrics.values()] for one in task("loops-fp64").conditions}
    assert (
        max(wide["hyper-connections"] + wide["retention"]) < 2
        and min(wide, key=lambda name: sum(wide[name])) != "retention"
    )
    assert 0.015 < statistics.fmean(wide["retention"]) - statistics.fmean(wide["code-low-gate-1"]) < 0.025
    assert gone.count(True) == 9 and "in all six seeds of the former and in three of the latter" in page


def rollout_ratio(condition: str, reference: str) -> str:
    found = {one.name: one.metrics for one in task("dynamics").conditions}
    logs = [
        float(found[condition][seed]["log_rollout"] - found[reference][seed]["log_rollout"]) for seed in range(100, 112)
    ]
    one = paired(logs)
    assert one.t_interval is not None
    ratio, low, high = (math.exp(x) for x in (one.mean, one.t_interval.low, one.t_interval.high))
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def test_the_rollout_error_as_a_ratio() -> None:
    page = SENTENCES["docs/beyond-text.md"]
    for said, condition, reference in (
        ("`gate-0.05` has {}", "gate-0.05", "additive"),
        ("`delta-4` {}", "delta-4", "additive"),
        ("the default {}", "default-4", "additive"),
        ("to its write-only twin {}", "gate-0.05", "held-write-only"),
        ("`delta-4` {}", "delta-4", "write-only-4"),
        ("starts at 0.05 has {}", "normed-0.05", "additive"),
        ("without a norm {}", "free-write-only", "additive"),
        ("To the former `gate-0.05` is {}", "gate-0.05", "normed-0.05"),
        ("to the latter {}", "gate-0.05", "free-write-only"),
    ):
        assert said.format(rollout_ratio(condition, reference)) in page
    for other in ("README.md", "docs/findings.md"):
        assert rollout_ratio("gate-0.05", "additive") in SENTENCES[other]


def test_what_refinement_does() -> None:
    def mean(condition: str, metric: str) -> float:
        (found,) = (one.metrics for one in task("dynamics-one-rate").conditions if one.name == condition)
        return statistics.fmean(float(run[metric]) for run in found.values())

    small, quarter, one, large = (
        mean(f"gate-{gate}", "flow") / mean(f"gate-{gate}", "one_step") for gate in ("0.05", "0.25", "1.0", "1.75")
    )
    text = f"{small:.1f} times with gates at 0.05, {quarter:.1f} times at 0.25, {one:.0f} times at 1, {large:.0f} times"
    assert text in SENTENCES["docs/beyond-text.md"]


def test_the_headline_made_again_overlaps_the_committed_one() -> None:
    first, again = study("headline"), study("headline-again")
    assert first.commit != again.commit and first.corpus == again.corpus
    one, other = first.contrasts, again.contrasts
    assert len(one) == len(other) == 20
    for a, b in zip(one, other, strict=True):
        assert (a.condition, a.reference, a.budget) == (b.condition, b.reference, b.budget)
        own, new = a.comparison.t_interval, b.comparison.t_interval
        assert own is not None and new is not None and own.low <= new.high and new.low <= own.high
        assert abs(a.comparison.mean - b.comparison.mean) < 0.0095
    assert [c.tuned and c.tuned.lr for c in first.conditions] == [c.tuned and c.tuned.lr for c in again.conditions]
