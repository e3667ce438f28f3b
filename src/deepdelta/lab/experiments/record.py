"""The record of a finished run, which outlives its run directory; what has one is never run again.

A record belongs to its fingerprint: everything that decides the numbers of a run and nothing that does not. It is
written the moment its run ends, so a study's file of records, committed, is all that a fresh clone needs.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepdelta.config import differences, from_plain, to_plain
from deepdelta.data import Corpus, spread
from deepdelta.errors import UserError
from deepdelta.lab.analysis.results import CurvePoint, RewriteSummary
from deepdelta.lab.experiments.records import RecordFile
from deepdelta.lab.measure.flops import training_flops_per_token
from deepdelta.lab.measure.rewrites import RewriteTotals, rewrite_totals
from deepdelta.provenance import now
from deepdelta.training import RunDirectory, TrainConfig, load
from deepdelta.training.evaluation import contexts
from deepdelta.training.loop import resolve

CURVE_POINTS = 60
"""The most points of a record's curve, unless it was validated more often than that."""

PLACES = {"device", "threads", "checkpoint_every"}
"""Settings that say where and how a run is made, not what comes out of it."""

SOURCES = {"source", "pattern", "tokenizer"}
"""Settings of the data that the hashes of corpus and tokenizer stand for."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run. `validation_loss` is None where it diverged. Times are ISO 8601, losses nats per token.

    Fields:
        name: of the run directory too.
        settings: as `canonical` gives them, the vocabulary filled in.
        start: of the run whose weights it started from, likewise; None: new weights.
        fingerprint: of the settings, the corpus, the tokenizer and the start.
        contexts: how the final validation cut its tokens into contexts, and which.
        seconds: of training steps; tokens: trained on, both up to the last step made.
        commit, versions, machine, threads: of the run's first start.
    """

    name: str
    condition: str
    seed: int
    fingerprint: str
    settings: dict[str, Any]
    corpus_sha256: str
    tokenizer_sha256: str | None
    validation_loss: float | None
    validation_tokens: int
    contexts: str
    seconds: float
    steps: int
    tokens: int
    flops_per_token: float
    curve: tuple[CurvePoint, ...]
    rewrites: tuple[RewriteSummary, ...]
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, str]
    threads: int
    finished: str
    start: dict[str, Any] | None = None


def canonical(settings: TrainConfig) -> dict[str, Any]:
    """What decides a run's numbers besides the ids it reads: every setting but PLACES and SOURCES, as plain data."""
    plain = {key: value for key, value in to_plain(settings).items() if key not in PLACES}
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in SOURCES}
    return plain


def fingerprint(
    settings: TrainConfig, corpus_sha256: str, tokenizer_sha256: str | None, start: TrainConfig | None = None
) -> str:
    """SHA-256 of the canonical settings, of what they are trained on, and of the settings of the run started from."""
    parts = [canonical(settings), corpus_sha256, tokenizer_sha256, *([] if start is None else [canonical(start)])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stored_record(
    records: RecordFile, name: str, settings: TrainConfig, corpus: Corpus, start: TrainConfig | None = None
) -> RunRecord | None:
    """The record of that name, if there is one, for a run with these settings on this corpus, from this start.

    The stored settings are read as a configuration first, so one that gained a field since holds that field's default.

    Raises:
        UserError: the record is damaged, or was made with other settings, on another corpus or from another start.
    """
    if name not in records:
        return None
    where = f"{records.path}: {name}"
    record = from_plain(RunRecord, records.rows()[name], where=where)
    stored = from_plain(TrainConfig, record.settings, where=f"{where}: settings")
    began = None if record.start is None else from_plain(TrainConfig, record.start, where=f"{where}: start")
    wanted, tokenizer = resolve(settings, corpus), tokenizer_hash(corpus)
    begin = None if start is None else resolve(start, corpus)
    there = fingerprint(stored, record.corpus_sha256, record.tokenizer_sha256, began)
    if there == fingerprint(wanted, corpus.sha256, tokenizer, begin):
        return record
    different = differences(
        canonical(stored) | {"start": None if began is None else canonical(began)},
        canonical(wanted) | {"start": None if begin is None else canonical(begin)},
    )
    if record.corpus_sha256 != corpus.sha256:
        different.append(f"corpus: SHA-256 {record.corpus_sha256[:12]} there, {corpus.sha256[:12]} here")
    if record.tokenizer_sha256 != tokenizer:
        different.append(f"tokenizer: SHA-256 {str(record.tokenizer_sha256)[:12]} there, {str(tokenizer)[:12]} here")
    raise UserError(
        f"{records.path} already holds this study with other settings of {record.condition} "
        f"({'; '.join(different)}) in {name}; give another --out."
    )


def make_record(
    name: str,
    condition: str,
    run: Path,
    settings: TrainConfig,
    corpus: Corpus,
    *,
    rewrite_tokens: int,
    start: TrainConfig | None = None,
) -> RunRecord:
    """The record of a run that has ended.

    Args:
        rewrite_tokens: held-out tokens on which gates and discrepancies are collected; 0: none are.
        start: the settings of the run that it started from.

    Raises:
        UserError: the run was trained on another corpus.
    """
    directory = RunDirectory(run)
    environment, rows = directory.environment(), list(directory.metrics())
    if environment["corpus_sha256"] != corpus.sha256:
        raise UserError(
            "the runs of this study were trained on different corpora, which do not compare "
            f"(SHA-256 {corpus.sha256[:12]} now, {environment['corpus_sha256'][:12]} in {run}); give another --out."
        )
    settings, tokenizer = resolve(settings, corpus), tokenizer_hash(corpus)
    start = None if start is None else resolve(start, corpus)
    final = next((row for row in rows if row.get("final")), None)
    steps = max((row["step"] for row in rows if "loss" in row), default=0)
    with_rewrites = final is not None and rewrite_tokens > 0
    return RunRecord(
        name=name,
        condition=condition,
        seed=settings.seed,
        fingerprint=fingerprint(settings, corpus.sha256, tokenizer, start),
        settings=canonical(settings),
        corpus_sha256=corpus.sha256,
        tokenizer_sha256=tokenizer,
        validation_loss=final["validation_loss"] if final else None,
        validation_tokens=final["validation_tokens"] if final else 0,
        contexts=validated(settings, corpus),
        seconds=max((row.get("seconds", 0.0) for row in rows), default=0.0),
        steps=steps,
        tokens=steps * settings.tokens_per_step,
        flops_per_token=float(training_flops_per_token(settings.model).training),
        curve=curve(rows),
        rewrites=_rewrites(run, settings, corpus, rewrite_tokens) if with_rewrites else (),
        commit=environment["commit"],
        versions=environment["versions"],
        machine=environment["machine"],
        threads=environment["threads"],
        finished=now(),
        start=None if start is None else canonical(start),
    )


def validated(settings: TrainConfig, corpus: Corpus) -> str:
    """How the final validation of a run cuts contexts."""
    return contexts(settings.model.context, len(corpus.validation), settings.final_eval_tokens)


def tokenizer_hash(corpus: Corpus) -> str | None:
    return corpus.tokenizer.sha256 if corpus.tokenizer else None


def curve(rows: Sequence[dict[str, Any]]) -> tuple[CurvePoint, ...]:
    """All validations, and steps evenly between them, the first and the last too, up to CURVE_POINTS in all."""
    losses = [row for row in rows if "loss" in row]
    # The final number is on other text, longer for the most part: as a point of the curve it would look like a fall.
    validations = [row for row in rows if "validation_loss" in row and not row["final"]]
    room = max(2, CURVE_POINTS - len(validations))
    kept = {round(i * (len(losses) - 1) / (room - 1)) for i in range(room)} if losses else set()
    chosen = [*(losses[index] for index in sorted(kept)), *validations]
    points = (
        CurvePoint(
            step=row["step"],
            seconds=row["seconds"],
            train_loss=round(row["loss"], 6) if "loss" in row else None,
            validation_loss=round(row["validation_loss"], 6) if "validation_loss" in row else None,
        )
        for row in chosen
    )
    return tuple(sorted(points, key=lambda point: (point.step, point.train_loss is None)))


def merged_rewrites(records: Sequence[RunRecord]) -> tuple[RewriteSummary, ...]:
    """The summaries of several runs of one condition as one: counts added, means averaged, root mean squares too."""
    grouped: dict[tuple[int, str], list[RewriteSummary]] = {}
    for record in records:
        for rewrite in record.rewrites:
            grouped.setdefault((rewrite.layer, rewrite.sublayer), []).append(rewrite)
    return tuple(_merged(group) for group in grouped.values())


def _merged(group: Sequence[RewriteSummary]) -> RewriteSummary:
    def mean(name: str, power: int = 1) -> float | None:
        values = [value for one in group if (value := getattr(one, name)) is not None]
        return (sum(value**power for value in values) / len(values)) ** (1 / power) if values else None

    histograms = [one.gate_histogram for one in group if one.gate_histogram is not None]
    return RewriteSummary(
        layer=group[0].layer,
        sublayer=group[0].sublayer,
        gate_histogram=tuple(map(sum, zip(*histograms, strict=True))) if histograms else None,
        gate_mean=mean("gate_mean"),
        discrepancy_before=mean("discrepancy_before", 2),
        discrepancy_after=mean("discrepancy_after", 2),
        direction_norm=mean("direction_norm"),
        cosine=mean("cosine"),
    )


def _rewrites(run: Path, settings: TrainConfig, corpus: Corpus, tokens: int) -> tuple[RewriteSummary, ...]:
    chosen = spread(corpus.validation, context=settings.model.context, limit=tokens)
    totals: dict[str, RewriteTotals] = {}
    rewrite_totals(load(run).model, (part[:, :-1] for part in torch.split(chosen, settings.batch_size)), into=totals)
    corpus.check_unchanged()
    return tuple(_rewrite(residual, total) for residual, total in totals.items())


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
    )
