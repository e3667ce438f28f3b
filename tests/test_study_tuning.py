"""What a study plans before it runs: budgets, the rates that are tried, and plans that are refused."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deepdelta import UserError
from deepdelta.data import load_corpus, train_tail
from deepdelta.lab import runner
from deepdelta.lab.analysis.results import Tuned
from deepdelta.lab.experiments.config import Tune
from deepdelta.lab.experiments.places import LOCAL
from deepdelta.lab.experiments.plan import at_rates
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.tuning import beyond, choose
from deepdelta.lab.views.study import tuning_table
from deepdelta.lab.views.tables import ABSENT
from deepdelta.training import RunDirectory, TrainConfig
from deepdelta.training.optimizer import learning_rate
from test_study_records import costs, plan_of, study
from tiny_runs import quietly, text_file


def test_budgets_spend_what_the_baseline_spends(tmp_path: Path) -> None:
    config = study(tmp_path)
    planner = plan_of(config, tmp_path)
    ratio = planner.flops_per_token("plain") / planner.flops_per_token("delta")
    assert 0.3 < ratio < 1
    assert [planner.steps("delta", budget, costs(0.4)) for budget in config.budgets] == [
        24,
        round(24 * ratio),
        round(24 * 0.4),
    ]
    assert [planner.steps("plain", budget, costs(0.4)) for budget in config.budgets] == [24, 24, 24]
    tuned = Tuned(lr=0.5, edge=False, grid=(0.5, 1.0), losses=(1.0, 2.0), seeds=(7,))
    runs = at_rates(planner.runs(config, costs(0.4)), {"delta": tuned})
    assert {runs["plain", 1, budget].name for budget in config.budgets} == {"plain-seed1"}
    timed = runs["delta", 1, "time"].settings
    assert (timed.steps, timed.lr, timed.seed, timed.warmup) == (10, 0.5, 1, 2)


def test_a_stretched_schedule_goes_through_the_same_rates() -> None:
    short = TrainConfig(steps=101, warmup=20)
    long = short.stretched(202)
    assert (long.steps, long.warmup) == (202, 40)
    for step in (20, 60, 100):
        assert learning_rate(long, 40 + (step - 20) * 161 // 80) == pytest.approx(learning_rate(short, step), rel=0.01)
    assert TrainConfig(steps=1000, warmup=0).stretched(10).warmup == 0
    assert TrainConfig(steps=1000, warmup=10).stretched(10).warmup == 1


def test_tuning_sees_no_byte_of_the_validation_part(tmp_path: Path) -> None:
    """Two texts that differ in their validation part alone give the same tuning runs, bit for bit."""
    text = text_file(tmp_path / "one.txt").read_bytes()
    cut = len(load_corpus(study(tmp_path, source=tmp_path / "one.txt").train_config("plain", 0).data).train)
    (tmp_path / "two.txt").write_bytes(text[:cut] + bytes(reversed(text[cut:])))
    losses = []
    for name in ("one", "two"):
        config = study(tmp_path, source=tmp_path / f"{name}.txt")
        corpus = load_corpus(config.train_config("plain", 0).data)
        tail = train_tail(corpus)
        assert tail.train.tobytes() + tail.validation.tobytes() == text[:cut]
        assert len(tail.validation) == -(-cut // 10)
        asked = load_corpus(dataclasses.replace(config.train_config("plain", 0).data, held_out="train_tail"))
        assert (asked.sha256, asked.train.tobytes()) == (tail.sha256, tail.train.tobytes())
        assert asked.validation.tobytes() == tail.validation.tobytes() and asked.validation_bytes is None
        run = plan_of(config, tmp_path / name).tuning()["delta", 1e-2, 7]
        quietly(run.settings, run.path)
        losses.append(
            [(row["step"], row.get("loss"), row.get("validation_loss")) for row in RunDirectory(run.path).metrics()]
        )
    assert losses[0] == losses[1] and losses[0][-1][2] is not None


def test_a_grid_grows_where_its_end_is_best_at_most_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"plain": 4e-3, "delta": 1.0, "write": 2e-2}

    class Loss:
        @contextmanager
        def running(self, *_: Any) -> Iterator[Any]:
            yield self

        def make(self, claimed: Any, phase: str) -> dict[str, Any]:
            found = {}
            for run in claimed.missing:
                made.append(run.name)
                where: dict[str, Any] = {"kind": "training", "experiment": "e", "condition": run.condition, "seed": 7}
                what: dict[str, Any] = {"commit": None, "versions": {}, "machine": {}, "threads": 1, "finished": "now"}
                loss = abs(math.log(run.settings.lr / best[run.condition]))
                found[run.name] = RunRecord(
                    name=run.name, settings={}, metrics={"validation_loss": loss}, seconds=1.0, **where, **what
                )
            return found

    made: list[str] = []
    monkeypatch.setattr(runner, "measure", lambda *_: costs())
    monkeypatch.setattr(runner, "_running", Loss().running)
    config = dataclasses.replace(study(tmp_path), tune=Tune(lr=(1e-2, 2e-2), seeds=(7,)))
    found = runner._tuned(plan_of(config, tmp_path / "out"), tmp_path / "out", LOCAL)[1]
    assert {name: (one.lr, one.grid, one.edge) for name, one in found.items()} == {
        "plain": (5e-3, (2.5e-3, 5e-3, 1e-2, 2e-2), False),
        "delta": (8e-2, (1e-2, 2e-2, 4e-2, 8e-2), True),
        "write": (2e-2, (1e-2, 2e-2, 4e-2), False),
    }
    assert len(made) == len(set(made)) == 3 * 2 + 3 + 2
    shown = [row[:3] for row in tuning_table(found).rows]  # type: ignore[union-attr]
    assert shown == [("plain", "0.005", "0.4700"), ("delta", "0.08 (edge)", ABSENT), ("write", "0.02", ABSENT)]


def test_the_lowest_mean_loss_is_chosen_and_edges_are_flagged() -> None:
    tune = Tune(lr=(4.0, 1.0, 2.0), seeds=(5, 6))
    inner = choose(tune, {1.0: [1.0, 3.0], 2.0: [2.0, 1.5], 4.0: [0.1, None]}, "c")
    assert (inner.lr, inner.edge, inner.grid, inner.losses) == (2.0, False, (1.0, 2.0, 4.0), (2.0, 1.75, None))
    assert choose(tune, {1.0: [1.0, 1.0], 2.0: [2.0, 1.5], 4.0: [3.0, 3.0]}, "c").edge
    assert choose(tune, {1.0: [2.0, 2.0], 2.0: [2.0, 1.5], 4.0: [1.0, 1.0]}, "c").edge
    assert beyond(inner.lr, inner.grid) is None and beyond(1.0, (1.0,)) is None
    low = choose(tune, {1.0: [1.0, 1.0], 2.0: [2.0, 1.5], 4.0: [3.0, 3.0]}, "c")
    assert beyond(low.lr, low.grid) == 0.5 and beyond(4.0, (1.0, 3.0, 4.0)) == 5.33
    with pytest.raises(UserError, match=r"c diverged at every learning rate of tune.lr \[1.0, 2.0, 4.0\]"):
        choose(tune, {1.0: [None, 1.0], 2.0: [None, None], 4.0: [None, None]}, "c")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [7]", "seeds = [1]", r"tuning must not see the seeds that are reported, both have \[1\]"),
        ("lr = [1e-2, 1e-5]", "lr = [1e-2]", "lr must be a grid of at least two different rates"),
        (
            'control = "write"',
            'control = "wirte"',
            "the control of delta must be another condition, got 'wirte'; did you",
        ),
        ('control = "write"', 'control = "delta"', "the control of delta must be another condition, got 'delta'"),
        ('"flops", "time"', '"flop"', "budgets"),
        ('"flops", "time"', '"tokens"', "budgets must be different"),
        ('summary = "a rewrite"', 'summary = "x"\nchanges.steps = 3', "'steps' is decided by the study's budgets"),
        ('summary = "a rewrite"', 'summary = "x"\nchanges.lr = 3.0', "'lr' is decided by the study's tune"),
        ("[tune]", "[power]\npilot_sd = 0.05\ndifference = 0.02\n[tune]", "takes 52 seeds, the study has 2: add seeds"),
        ("[tune]", "[factorials.f]\nfactors = ['x']\n[tune]", "factorials.f: no condition has a factor 'x'"),
    ],
)
def test_plans_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(tmp_path, (old, new))
