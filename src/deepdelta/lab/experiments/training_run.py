"""A study's run: trained by `deepdelta train` in a process, then made a record.

It is an ordinary run directory, so what was interrupted goes on from its checkpoint. A record outlives that directory
and belongs to the settings, the corpus and the tokenizer that it names, so a study's records are all that a fresh clone
needs.
"""

import shutil
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.data import Corpus, spread
from deepdelta.decoding import generate
from deepdelta.errors import UserError
from deepdelta.files import read_object, write_json
from deepdelta.lab.analysis.results import CurvePoint, RewriteSummary, Sample
from deepdelta.lab.experiments.pool import Claimed
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.run import Run
from deepdelta.lab.measure.rewrites import RewriteTotals, rewrite_totals
from deepdelta.provenance import now
from deepdelta.training import Loaded, RunDirectory, TrainConfig, load
from deepdelta.training.checkpoints import CHECKPOINT
from deepdelta.training.evaluation import contexts
from deepdelta.training.loop import resolve

CURVE_POINTS = 60
"""The most points of a record's curve, unless it was validated more often than that."""

PROMPT, TEMPERATURE = 32, 0.8
"""Of samples: ids of the validation part that one begins with, half a context at most, and how freely it goes on."""

PLACES = {"device", "threads", "checkpoint_every", "keep_last", "keep_best", "async_save"}
"""Settings that say where and how a run is made, not what comes out of it."""

SOURCES = {"source", "pattern", "tokenizer", "mixture"}
"""Settings of the data that the hashes of corpus and tokenizer stand for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRun(Run):
    """A run of a study; its process trains in `path`."""

    settings: TrainConfig
    corpus: Corpus
    rewrite_tokens: int = 0
    """Held-out tokens on which gates and discrepancies are collected; 0: none are."""
    keep_weights: bool = True
    """Keep them once there is a record."""
    start: "TrainingRun | None" = None
    """The run whose weights it starts from."""
    begins_others: bool = False
    """Others start from its weights."""

    refusal: ClassVar[str] = (
        "{file} already holds this study with other settings of {condition} ({different}) in {name}; "
        "give another --out."
    )
    interrupted: ClassVar[str] = "Every run has saved its step; the same command continues the study."

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.path)

    @property
    def launched(self) -> Path:
        """The configuration that the run was launched with."""
        return self.folder / f"{self.name}.json"

    @property
    def weights(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def threads(self) -> int:
        return self.settings.threads or 1

    @property
    def resolved(self) -> TrainConfig:
        return resolve(self.settings, self.corpus)

    @property
    def start_settings(self) -> dict[str, Any] | None:
        """Those of the run that it starts from, as its record holds them."""
        return None if self.start is None else canonical(self.start.resolved)

    @property
    def contexts(self) -> str:
        """How its final validation cuts contexts."""
        settings = self.settings
        return contexts(settings.model.context, len(self.corpus.validation), settings.final_eval_tokens)

    @property
    def finished(self) -> bool:
        """To its last step, or to one whose loss was no longer finite, which is a result too."""
        return any(row.get("final") or row.get("diverged") for row in self.directory.metrics())

    @property
    def ended(self) -> bool:
        return self.finished and (self.weights.exists() or not self.begins_others)

    @property
    def share(self) -> float:
        return self.directory.last_recorded_step() / self.settings.steps

    @property
    def state(self) -> str:
        row = self.directory.last_row()
        loss = row.get("loss", row.get("validation_loss"))
        at = f"{self.name} {row.get('step', 0)}/{self.settings.steps}"
        return at if loss is None else f"{at} loss {loss:.3f}"

    def waits(self, unfinished: Container[str]) -> bool:
        """Whether a process of a study that was killed has yet to end here, or the run that this one starts from."""
        if self.directory.busy:
            return True
        return self.start is not None and not self.directory.started and self.start.name in unfinished

    def command(self) -> list[str]:
        """What trains it; the settings are written beside it.

        Raises:
            UserError: the run that it starts from diverged.
        """
        if self.finished and not self.ended:
            shutil.rmtree(self.path)  # of a start whose weights are gone
        begin: list[str] = []
        if self.start is not None and not self.directory.started:
            record = self.start.stored()
            if record is None or record.validation_loss is None:
                raise UserError(
                    f"{self.start.path} diverged, and no run can start from it: lower lr in the study's start."
                )
            begin = ["--init-from", str(self.start.path)]
        write_json(self.launched, to_plain(self.settings))
        return ["deepdelta", "train", str(self.path), "--config", str(self.launched), *begin]

    def differences(self, record: RunRecord) -> list[str]:
        """Stored settings are read as a configuration first: where it gained a field since, they hold its default."""
        where, inputs = f"{self.records.path}: {self.name}", record.inputs
        there = canonical(from_plain(TrainConfig, record.settings, where=f"{where}: settings"))
        begun = inputs.get("start")
        begun = None if begun is None else canonical(from_plain(TrainConfig, begun, where=f"{where}: start"))
        here = canonical(self.resolved) | {"start": self.start_settings}
        found = differences(there | {"start": begun}, here)
        for name, own in (("corpus", self.corpus.sha256), ("tokenizer", tokenizer_hash(self.corpus))):
            if (other := inputs.get(f"{name}_sha256")) != own:
                found.append(f"{name}: SHA-256 {str(other)[:12]} there, {str(own)[:12]} here")
        return found

    def check_begun(self) -> None:
        """Refuse what lies in the way of a run without a record.

        Raises:
            UserError: an unfinished run of another configuration, or from another start.
        """
        if not self.launched.exists():
            return
        there = read_object(self.launched, "delete it and its run to run it again")
        there = to_plain(from_plain(TrainConfig, there, where=str(self.launched)))
        different = differences(there, to_plain(self.settings))
        if self.directory.started:
            began = self.directory.environment().get("init_config")
            began = None if began is None else canonical(from_plain(TrainConfig, began, where=str(self.path)))
            different += differences({"start": began}, {"start": self.start_settings})
        if different:
            raise UserError(
                f"{self.folder.parent} already holds this study with other settings of {self.condition} "
                f"({'; '.join(different)}) in {self.path}; give another --out, or delete that run."
            )

    def finish(self) -> RunRecord:
        record = super().finish()
        if not (self.keep_weights or self.begins_others):
            self.weights.unlink(missing_ok=True)
        return record

    def make_record(self) -> RunRecord:
        """The record of the run directory.

        Raises:
            UserError: the run was trained on another corpus.
        """
        environment, rows = self.directory.environment(), list(self.directory.metrics())
        if environment["corpus_sha256"] != self.corpus.sha256:
            raise UserError(
                "the runs of this study were trained on different corpora, which do not compare "
                f"(SHA-256 {self.corpus.sha256[:12]} now, {environment['corpus_sha256'][:12]} in {self.path}); "
                "give another --out."
            )
        final = next((row for row in rows if row.get("final")), None)
        steps = max((row["step"] for row in rows if "loss" in row), default=0)
        rewrites, sample = self._looked_at() if final is not None and self._rewrites_wanted else ((), None)
        measured = {} if final is None else {key: float(final[key]) for key in ("validation_loss", "validation_tokens")}
        return RunRecord(
            name=self.name,
            kind="training",
            experiment=self.experiment,
            condition=self.condition,
            seed=self.seed,
            settings=canonical(self.resolved),
            inputs={
                "corpus_sha256": self.corpus.sha256,
                "tokenizer_sha256": tokenizer_hash(self.corpus),
                "contexts": self.contexts,
                "start": self.start_settings,
            },
            metrics={"steps": float(steps), **measured},
            diverged=None if final else f"the loss was no longer finite at step {steps + 1}",
            seconds=max((row.get("seconds", 0.0) for row in rows), default=0.0),
            curve=curve(rows),
            rewrites=rewrites,
            sample=sample,
            commit=environment["commit"],
            versions=environment["versions"],
            machine=environment["machine"],
            threads=environment["threads"],
            finished=now(),
        )

    @property
    def _rewrites_wanted(self) -> bool:
        return self.rewrite_tokens > 0 and self.settings.model.rival is None

    def _looked_at(self) -> tuple[tuple[RewriteSummary, ...], Sample | None]:
        """What the trained model's rewrites do, and a text of its own."""
        chosen = spread(self.corpus.validation, context=self.settings.model.context, limit=self.rewrite_tokens)
        batches = (part[:, :-1] for part in torch.split(chosen, self.settings.batch_size))
        with _threads(self.threads):
            trained = load(self.path)
            totals = rewrite_totals(trained.model, batches)
            sample = self._sample(trained)
        self.corpus.check_unchanged()
        return tuple(_rewrite(residual, total) for residual, total in totals.items()), sample

    def _sample(self, trained: Loaded) -> Sample | None:
        """As long as the context, so that every id comes from the cache; the same for the same weights."""
        model, tokenizer = trained
        if tokenizer is None:
            return None
        context = self.settings.model.context
        prompt = [int(one) for one in self.corpus.validation[: min(PROMPT, context // 2)]]
        left, known = context - len(prompt), tokenizer.vocab_size
        text = generate(model, prompt, tokens=left, temperature=TEMPERATURE, vocab_size=known)
        return Sample(prompt=tokenizer.decode(prompt), text=tokenizer.decode(list(text)))


def claim(runs: Iterable[TrainingRun]) -> Claimed:
    """What is there of these runs and of those that they start from, after a look at all that must not be there.

    A start whose record is there is trained again where its weights are gone and an unfinished run needs them.

    Raises:
        UserError: a record or an unfinished run of another configuration or corpus is in the way, or those that are
            missing would be validated on other tokens than those that are there.
    """
    runs = list({run.name: run for run in runs}.values())
    first, records = starts(runs), {}
    for run in (*first, *runs):
        if (record := run.stored()) is not None:
            records[run.name] = record
        else:
            run.check_begun()
    needed = starts(run for run in runs if not (run.name in records or run.directory.started))
    again = [run for run in needed if not (run.name in records and run.ended)]
    missing = [*again, *(run for run in runs if run.name not in records)]
    here, there = {run.contexts for run in missing}, {record.contexts for record in records.values()}
    if here and there and here != there:
        raise UserError(
            f"the runs that are there were validated on {' and '.join(sorted(there))}, those that are missing would be "
            f"validated on {' and '.join(sorted(here))}, which does not compare: give another --out."
        )
    return Claimed(missing, records)


def starts(runs: Iterable[TrainingRun]) -> list[TrainingRun]:
    """The runs that these start from, each once."""
    return list({run.start.name: run.start for run in runs if run.start is not None}.values())


def canonical(settings: TrainConfig) -> dict[str, Any]:
    """What decides a run's numbers besides the ids it reads: every setting but PLACES and SOURCES, as plain data."""
    plain = {key: value for key, value in to_plain(settings).items() if key not in PLACES}
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in SOURCES}
    return plain


def tokenizer_hash(corpus: Corpus) -> str | None:
    return corpus.tokenizer.sha256 if corpus.tokenizer else None


def curve(rows: Sequence[dict[str, Any]]) -> tuple[CurvePoint, ...]:
    """All validations, and steps evenly between them, the first and the last too, up to CURVE_POINTS in all."""
    losses = [row for row in rows if "loss" in row]
    # The final number is on other text, longer for the most part: as a point of the curve it would look like a fall.
    validations = [row for row in rows if "validation_loss" in row and not row["final"]]
    count = max(2, CURVE_POINTS - len(validations))
    kept = {round(i * (len(losses) - 1) / (count - 1)) for i in range(count)} if losses else set()
    points = (
        CurvePoint(
            step=row["step"],
            seconds=row["seconds"],
            train_loss=round(row["loss"], 6) if "loss" in row else None,
            validation_loss=round(row["validation_loss"], 6) if "validation_loss" in row else None,
        )
        for row in (*(losses[index] for index in sorted(kept)), *validations)
    )
    return tuple(sorted(points, key=lambda point: (point.step, point.train_loss is None)))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rewrite(residual: str, total: RewriteTotals) -> RewriteSummary:
    """The totals of the residual named 'layers.<number>.<sublayer>'."""
    _, layer, sublayer = residual.split(".")
    before, after = total.mean("before"), total.mean("after")
    gated = "gate" in total.sums
    return RewriteSummary(
        layer=int(layer),
        sublayer=sublayer,
        gate_histogram=tuple(int(count) for count in total.gates) if gated else None,
        gate_mean=total.mean("gate"),
        discrepancy_before=None if before is None else before**0.5,
        discrepancy_after=None if after is None else after**0.5,
        direction_norm=total.mean("norm"),
        cosine=total.mean("cosine"),
        state_norm=total.mean("state_norm"),
    )
