"""Run a study: plan, claim, costs, the runs that tune, those that are reported; then results, tables and pages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deepdelta.device import choose_device
from deepdelta.errors import UserError, require
from deepdelta.files import AnyPath, locked, write_text
from deepdelta.lab.analysis.results import Corpus, StudyResults, Tuned
from deepdelta.lab.analysis.scaling import Scaling, scaling
from deepdelta.lab.experiments.cluster import require_ray
from deepdelta.lab.experiments.collection import collect
from deepdelta.lab.experiments.config import Comparison, Search, Sizes, StudyConfig
from deepdelta.lab.experiments.costs import measure
from deepdelta.lab.experiments.places import LOCAL, Places
from deepdelta.lab.experiments.plan import Plan, at_rates, plan_of
from deepdelta.lab.experiments.pool import Runner, running
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.records import take_over
from deepdelta.lab.experiments.search import RungResult, SearchResults, rank
from deepdelta.lab.experiments.training_run import TrainingRun, claim, starts
from deepdelta.lab.experiments.tuning import EXTENSIONS, beyond, chosen
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


def run(
    study: StudyConfig,
    out: AnyPath,
    *,
    places: Places = LOCAL,
    merge: Sequence[AnyPath] = (),
    command: str,
    self_contained: bool = False,
) -> None:
    """Run what is missing of a study in `out`, of whatever kind: see docs/studies.md.

    Args:
        places: where runs are made, and how many side by side.
        merge: folders of the same study on other machines, whose records are taken over first.
        command: the command that was typed, kept with the results.
        self_contained: report.html holds the script that draws its pictures.

    Raises:
        UserError: `out` holds another study, another process is at work there, a run failed (its own message is passed
            on), the extra `lab` is absent, or records of the folders contradict each other.
        KeyboardInterrupt: interrupted; every run has saved its step and the same command continues.
    """
    out = Path(out)
    if places.on == "ray":
        require_ray()
    with locked(out):
        for part in study.sizes if isinstance(study, Sizes) else ("",):
            take_over(out / part, [Path(folder) / part for folder in merge])
        if isinstance(study, Search):
            run_search(study, out, places=places, command=command)
        elif isinstance(study, Sizes):
            run_sizes(study, out, places=places, command=command, self_contained=self_contained)
        elif isinstance(study, Comparison):
            run_study(study, out, places=places, command=command, self_contained=self_contained)


def run_study(
    study: Comparison, out: AnyPath, *, places: Places = LOCAL, command: str, self_contained: bool = False
) -> StudyResults:
    """All conditions and seeds; writes results.json and report.html and prints the tables."""
    out, started = Path(out), now()
    plan = _plan(study, out)
    costs, tuned = _tuned(plan, out, places)
    planned = at_rates(plan.runs(study, costs), tuned)
    page = out / "report.html"
    names = {run.name for run in planned.values()}
    ended: dict[str, RunRecord] = {}

    def write_so_far(what: str, reloads: bool) -> None:
        if 0 < len(ended) < len(names):
            there = {key: ended[run.name] for key, run in planned.items() if run.name in ended}
            so_far = collect(study, there, costs, tuned, plan.corpus, command=command, started=started, ngram=False)
            done = f"{what}: {len(ended)} of {len(names)} runs have ended."
            write_report(so_far, page, self_contained=self_contained, so_far=done, reloads=reloads)

    def each(records: Mapping[str, RunRecord]) -> None:
        before = len(ended)
        ended.update((name, records[name]) for name in names & records.keys())
        if len(ended) > before:
            write_so_far("At work", True)

    claimed = claim(planned.values())
    try:
        each(claimed.records)
        with _running(plan, costs, planned.values(), places) as runner:
            records = runner.make(claimed, "runs", each)
    except BaseException:
        write_so_far("Stopped", False)
        raise
    if not study.keep_checkpoints:
        for run in starts(planned.values()):
            run.weights.unlink(missing_ok=True)
    plan.records.compact()
    by_key = {key: records[run.name] for key, run in planned.items()}
    results = collect(study, by_key, costs, tuned, plan.corpus, command=command, started=started)
    results.save(out / "results.json")
    write_text(out / "table.md", study_markdown(results))
    write_text(out / "plot.svg", plot(results))
    write_report(results, page, self_contained=self_contained)
    console = Console()
    for table in (render_study(results), *map(render, detail_tables(results))):
        console.print(table)
    show(summarise(results).headline)
    show(f"Results: {out / 'results.json'}\nReport:  {out / 'report.html'}")
    return results


def run_sizes(
    study: Sizes, out: AnyPath, *, places: Places = LOCAL, command: str, self_contained: bool = False
) -> Scaling:
    """The comparison at every size, each in a folder of its own; then scaling.json and its table."""
    out, studies = Path(out), {}
    for size in study.sizes:
        with locked(out / size):
            studies[size] = run_study(
                study.sized(size), out / size, places=places, command=command, self_contained=self_contained
            )
    found = scaling(studies, study.name, study.extrapolate, command=command)
    found.save(out / "scaling.json")
    write_text(out / "table.md", scaling_markdown(found, studies))
    Console().print(render(scaling_table(found)))
    show(f"Scaling: {out / 'scaling.json'}")
    return found


def run_search(study: Search, out: AnyPath, *, places: Places = LOCAL, command: str) -> SearchResults:
    """Rung after rung on the training part's tail; then search.json and its table."""
    out = Path(out)
    plan = _plan(study, out)
    costs, tuned = _tuned(plan, out, places)
    left, rungs = study.candidates, list[RungResult]()
    for number in range(len(study.search.rungs)):
        planned = plan.rung(study, number, (study.baseline, *left), tuned)
        with _running(plan, costs, plan.rungs(study, number, left, tuned), places) as runner:
            records = runner.make(claim(planned.values()), f"rung {number + 1} of {len(study.search.rungs)}")
        rungs.append(rank(study, number, left, {key: records[run.name] for key, run in planned.items()}))
        left = tuple(one.condition for one in rungs[-1].ranking if one.kept)
        if not left:
            raise UserError(f"every candidate diverged in rung {number + 1}: lower lr, or tune it per condition.")
    plan.records.compact()
    found = SearchResults(
        name=study.name,
        baseline=study.baseline,
        **provenance(command),
        finished=now(),
        corpus=Corpus(description=plan.tail.description, sha256=plan.tail.sha256),
        tuned=tuned,
        rungs=tuple(rungs),
        winners=left,
    )
    found.save(out / "search.json")
    write_text(out / "table.md", search_markdown(found))
    Console().print(render(search_table(found)))
    show(f"Search: {out / 'search.json'}")
    return found


def _plan(study: StudyConfig, out: Path) -> Plan:
    """Refuse what can be refused before there are files."""
    require("studies", "lab", "scipy", "jinja2", "plotly", "matplotlib")
    settings = study.train_config(study.baseline, study.seeds[0])
    plan = plan_of(study, out)
    choose_device(settings.device, settings.precision)
    return plan


def _tuned(plan: Plan, out: Path, places: Places) -> tuple[dict[str, Cost], dict[str, Tuned]]:
    """What conditions cost, and every condition's rate; where it is at an end of its grid, that grows by a step."""
    tuning, tune = plan.tuning(), plan.study.tune
    claimed = claim(tuning.values())
    model = plan.study.train_config(plan.study.baseline, plan.study.seeds[0]).model
    costs = measure(plan.study, model.vocab_size or plan.corpus.vocab_size, out / "costs.json")
    if tune is None:
        return costs, {}
    study = plan.study
    if isinstance(study, Search):
        later = plan.rungs(study, 0, study.candidates, {})
    else:
        later = list(plan.runs(study, costs).values()) if isinstance(study, Comparison) else []
    records = dict[str, RunRecord]()
    for extension in range(EXTENSIONS + 1):
        with _running(plan, costs, (*tuning.values(), *later), places) as runner:
            records |= runner.make(claimed, "tuning")
        tuned = chosen(tune, tuning, records)
        further = {name: rate for name, one in tuned.items() if (rate := beyond(one.lr, one.grid)) is not None}
        if not further or extension == EXTENSIONS:
            break
        show("At the end of its grid, which grows by a step: " + ", ".join(f"{n} to {r:g}" for n, r in further.items()))
        new = plan.tuning(further)
        tuning |= new
        claimed = claim(new.values())
    return costs, tuned


@contextmanager
def _running(plan: Plan, costs: Mapping[str, Cost], runs: Iterable[TrainingRun], places: Places) -> Iterator[Runner]:
    """What makes these runs and those that they start from; `runs` are all that are still to come, of later phases too,
    so that progress says when the study ends."""
    runs = list(runs)
    settings = plan.study.train_config(plan.study.baseline, plan.study.seeds[0])
    chosen = places.settled(choose_device(settings.device, settings.precision).device.type, settings.threads or 1)
    work = [(run, plan.seconds(run, costs)) for run in (*starts(runs), *runs)]
    with running(f"Study {plan.study.name}", work, "s of work", chosen) as runner:
        yield runner
