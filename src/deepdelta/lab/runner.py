"""Run a study: costs, then the runs that tune, then those that are reported, then results and report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deepdelta.config import to_plain
from deepdelta.data import Corpus, check_context, load_corpus, train_tail
from deepdelta.device import choose_device, usable_cores
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, locked, read_object, write_json, write_text
from deepdelta.lab.analysis.results import Corpus as CorpusResult
from deepdelta.lab.analysis.results import StudyResults, Tuned, save_results
from deepdelta.lab.analysis.scaling import Scaling, save_scaling, scaling
from deepdelta.lab.experiments.collection import collect, measure
from deepdelta.lab.experiments.config import StudyConfig
from deepdelta.lab.experiments.plan import Planner
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.runs import StudyRuns, claim, study_runs
from deepdelta.lab.experiments.search import RungResult, SearchResults, rank, save_search
from deepdelta.lab.experiments.tuning import chosen
from deepdelta.lab.measure.cost import Cost
from deepdelta.lab.views import (
    detail_tables,
    plot,
    render_study,
    scaling_markdown,
    scaling_table,
    search_markdown,
    search_table,
    study_markdown,
    summarise,
    write_report,
)
from deepdelta.lab.views.tables import render
from deepdelta.progress import show
from deepdelta.provenance import now, provenance


@dataclass(frozen=True)
class Prepared:
    """A study that may start: `out` is its own, the corpus is there, costs are measured."""

    config: StudyConfig
    corpus: Corpus
    tail: Corpus
    costs: Mapping[str, Cost]
    planner: Planner
    workers: int
    console: Console


def run(config: StudyConfig, out: AnyPath, *, workers: int | None = None, command: str) -> None:
    """Run what is missing of a study in `out`, of whatever kind its file makes it: see docs/studies.md.

    Args:
        workers: runs side by side; None: as many as the cores have room for at the study's threads per run.
        command: the command that was typed, kept with the results.

    Raises:
        UserError: `out` holds another study, another process is at work there, a run failed (its own message is passed
            on), the extra `study` is absent, or workers < 1.
        KeyboardInterrupt: interrupted; every run has saved its step and the same command continues.
    """
    kind = run_search if config.search is not None else run_sizes if config.sizes else run_study
    out = Path(out)
    with locked(out):
        kind(config, out, workers=workers, command=command)


def run_study(config: StudyConfig, out: AnyPath, *, workers: int | None = None, command: str) -> StudyResults:
    """All conditions and seeds; writes results.json and report.html and prints the tables."""
    out = Path(out)
    started = now()
    study = _prepare(config, out, workers)
    planner = study.planner
    tuning, planned = planner.tuning(study.tail), planner.runs({})
    known = claim(tuning.values())
    if len(known) == len(tuning):
        claim(planner.runs(_rates(_chosen(study, known))).values())
    write_json(out / "study.json", to_plain(config))
    with study_runs(config, study.workers, [*tuning.values(), *planned.values()]) as runs:
        tuned = _tune(study, runs)
        planned = planner.runs(_rates(tuned))
        records = runs.train(planned.values(), "runs")
    results = collect(
        config,
        {key: records[one.name] for key, one in planned.items()},
        study.costs,
        tuned,
        study.corpus,
        command=command,
        started=started,
    )
    planner.records.compact()
    save_results(results, out / "results.json")
    write_text(out / "table.md", study_markdown(results))
    write_text(out / "plot.svg", plot(results))
    write_report(results, out / "report.html")
    for table in (render_study(results), *map(render, detail_tables(results))):
        study.console.print(table)
    show(summarise(results).headline)
    show(f"Results: {out / 'results.json'}\nReport:  {out / 'report.html'}")
    return results


def run_sizes(config: StudyConfig, out: AnyPath, *, workers: int | None = None, command: str) -> Scaling:
    """The study at every size, each in a folder of its own; then scaling.json and its table."""
    out = Path(out)
    assert config.extrapolate is not None
    studies = {}
    for size in config.sizes:
        with locked(out / size):
            studies[size] = run_study(config.sized(size), out / size, workers=workers, command=command)
    found = scaling(studies, config.name, config.extrapolate, command=command)
    save_scaling(found, out / "scaling.json")
    write_text(out / "table.md", scaling_markdown(found, studies))
    console = Console()
    console.print(render(scaling_table(found)))
    show(f"Scaling: {out / 'scaling.json'}")
    return found


def run_search(config: StudyConfig, out: AnyPath, *, workers: int | None = None, command: str) -> SearchResults:
    """Rung after rung on the training part's tail; then search.json and its table."""
    out = Path(out)
    assert config.search is not None
    study = _prepare(config, out, workers)
    tuning = study.planner.tuning(study.tail)
    write_json(out / "study.json", to_plain(config))
    with study_runs(config, study.workers, tuning.values()) as runs:
        tuned = _tune(study, runs)
    rates = _rates(tuned)
    left, rungs = config.candidates(), list[RungResult]()
    for number in range(len(config.search.rungs)):
        planned = study.planner.rung(number, (config.baseline, *left), rates, study.tail)
        with study_runs(config, study.workers, planned.values()) as runs:
            records = runs.train(planned.values(), f"rung {number + 1} of {len(config.search.rungs)}")
        rungs.append(rank(config, number, left, {key: records[one.name] for key, one in planned.items()}))
        left = tuple(one.condition for one in rungs[-1].ranking if one.kept)
        if not left:
            raise UserError(f"every candidate diverged in rung {number + 1}: lower lr, or tune it per condition.")
    found = SearchResults(
        name=config.name,
        baseline=config.baseline,
        **provenance(command),
        finished=now(),
        corpus=CorpusResult(description=study.tail.description, sha256=study.tail.sha256),
        tuned=dict(tuned),
        rungs=tuple(rungs),
        winners=left,
    )
    study.planner.records.compact()
    save_search(found, out / "search.json")
    write_text(out / "table.md", search_markdown(found))
    study.console.print(render(search_table(found)))
    show(f"Search: {out / 'search.json'}")
    return found


def _prepare(config: StudyConfig, out: Path, workers: int | None) -> Prepared:
    """Refuse what can be refused before there are files, then measure costs."""
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    require("studies", "study", "scipy", "jinja2", "plotly", "matplotlib")
    console = Console()
    settings = config.train_config(config.baseline, config.seeds[0])
    corpus = load_corpus(replace(settings.data, held_out="validation"), progress=show)
    tail = train_tail(corpus)
    choose_device(settings.device, settings.precision)
    for name in config.conditions:
        for text in (corpus, tail) if config.tune or config.search else (corpus,):
            check_context(text, config.train_config(name, config.seeds[0]).model.context)
    file = out / "study.json"
    mend = "give another --out"
    if file.exists() and (there := read_object(file, mend).get("name")) != config.name:
        raise UserError(f"{out} already holds the study '{there}'; {mend}.")
    claim(Planner(config, corpus, {}, out).tuning(tail).values())
    costs = measure(config, settings.model.vocab_size or corpus.vocab_size, out / "costs.json")
    return Prepared(
        config,
        corpus,
        tail,
        costs,
        Planner(config, corpus, costs, out),
        workers or max(1, usable_cores() // (settings.threads or 1)),
        console,
    )


def _tune(study: Prepared, runs: StudyRuns) -> dict[str, Tuned]:
    return _chosen(study, runs.train(study.planner.tuning(study.tail).values(), "tuning"))


def _chosen(study: Prepared, records: Mapping[str, RunRecord]) -> dict[str, Tuned]:
    """The choice for every condition; none without tuning."""
    if study.config.tune is None:
        return {}
    names = {key: one.name for key, one in study.planner.tuning(study.tail).items()}
    return chosen(study.config.tune, names, records)


def _rates(tuned: Mapping[str, Tuned]) -> dict[str, float]:
    return {name: choice.lr for name, choice in tuned.items()}
