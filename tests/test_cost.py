"""Peak memory against hand computation and the profiler's record; speeds and ratios of real training steps."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deepdelta import GPT, PRESETS, GPTConfig, TrainConfig, UserError
from deepdelta.config import merged
from deepdelta.files import write_text
from deepdelta.lab.experiments import costs
from deepdelta.lab.experiments.config import load_study
from deepdelta.lab.measure import cost as cost_module
from deepdelta.lab.measure.cost import Trial, measure_costs, trial
from deepdelta.lab.measure.memory import peak_bytes
from test_study_runs import study_file

pytestmark = pytest.mark.usefixtures("unchecked_file")

FLOAT = 4


def chain_step(
    rows: int, widths: tuple[int, int, int], *, keep_gradients: bool
) -> tuple[Callable[[], None], list[Tensor]]:
    """Forward and backward of (x W_1) W_2, and the tensors that exist before."""
    a, b, c = widths
    x, gradient = torch.randn(rows, a), torch.randn(rows, c)
    first, second = torch.randn(a, b, requires_grad=True), torch.randn(b, c, requires_grad=True)

    def step() -> None:
        z = x @ first @ second
        z.backward(gradient)
        if not keep_gradients:
            first.grad = second.grad = None

    return step, [x, gradient, first, second]


@pytest.mark.parametrize(("rows", "a", "b", "c"), [(40, 3, 5, 7), (2, 50, 30, 3), (9, 8, 7, 60)])
def test_a_chain_of_products_by_hand(rows: int, a: int, b: int, c: int) -> None:
    step, held = chain_step(rows, (a, b, c), keep_gradients=False)
    before = rows * a + rows * c + a * b + b * c
    # While W_2's product is differentiated: x W_1 (saved), z, and the gradients of both operands; then x W_1 is freed
    # and W_1's gradient made.
    at_second = rows * b + rows * c + rows * b + b * c
    at_first = rows * c + rows * b + b * c + a * b
    assert peak_bytes(step, held) == FLOAT * (before + max(at_second, at_first))


def test_gradients_that_stay_are_counted_when_they_are_held() -> None:
    step, held = chain_step(40, (3, 5, 7), keep_gradients=True)
    step()
    kept = [tensor.grad for tensor in held if tensor.grad is not None]
    assert len(kept) == 2
    fresh_step, fresh_held = chain_step(40, (3, 5, 7), keep_gradients=False)
    assert peak_bytes(step, [*held, *kept]) == peak_bytes(fresh_step, fresh_held) + FLOAT * (3 * 5 + 5 * 7)


def test_what_is_saved_for_backward_counts() -> None:
    x = torch.randn(100, requires_grad=True)

    def depth(layers: int) -> int:
        def step() -> None:
            y = x
            for _ in range(layers):
                y = y.sigmoid()
            torch.autograd.grad(y, x, x.detach())

        return peak_bytes(step, [x])

    # Every further layer saves one output more.
    assert depth(9) - depth(4) == 5 * 100 * FLOAT
    with torch.no_grad():
        assert peak_bytes(lambda: x.sigmoid().sigmoid().sigmoid(), [x]) == 3 * 100 * FLOAT


def test_views_in_place_work_and_reuse_allocate_nothing() -> None:
    x, other = torch.zeros(64), torch.zeros(1000)

    def step() -> None:
        x.view(8, 8).t().mul_(2)
        other[:500].add_(1)
        for _ in range(5):
            x + 1

    assert peak_bytes(step, [x]) == 2 * 64 * FLOAT
    assert peak_bytes(step, [x, x.view(8, 8)[0]]) == 2 * 64 * FLOAT


def test_memory_freed_in_the_step_makes_room() -> None:
    box = [torch.zeros(1000)]

    def step() -> None:
        box[0] = box[0][:10].clone()
        box.append(torch.ones(900))

    # Beside what others hold: 10 new, then 1000 freed, then 900 new.
    assert peak_bytes(step, []) == FLOAT * 10


def training_step(residual: str) -> tuple[Trial, Callable[[], None]]:
    sizes = GPTConfig(context=32, layers=2, heads=2, dim=32, residual=PRESETS[residual])
    made = trial(
        TrainConfig(model=sizes, batch_size=4, accumulate=2, device="cpu"), 64, cost_module.choose_device("cpu", "fp32")
    )
    return made, lambda: made.step(made.model)


def profiled_peak(step: Callable[[], None], path: Path) -> int:
    """The peak of what torch's allocator hands out during `step`, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    record.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = [
        event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"
    ]
    first = min(events, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - before


@pytest.mark.parametrize("residual", ["additive", "paper-cc", "code-tc"])
def test_a_training_step_agrees_with_the_profiler(residual: str, tmp_path: Path) -> None:
    made, step = training_step(residual)
    for _ in range(2):
        step()
    peak = made.peak_bytes()
    parameters = sum(parameter.nbytes for parameter in made.model.parameters())
    held = sum(tensor.nbytes for tensor in made.held)
    assert held > 3 * parameters
    # Within the small temporaries that operators make inside themselves.
    assert profiled_peak(step, tmp_path / "trace.json") == pytest.approx(peak - held, abs=8192)
    assert peak - held > parameters
    assert made.peak_bytes() == peak


def configs(**changes: Any) -> dict[str, TrainConfig]:
    return {
        name: TrainConfig(
            model=GPTConfig(context=16, layers=1, heads=2, dim=16, residual=PRESETS[name]),
            **({"batch_size": 2, "device": "cpu", "threads": 1} | changes),
        )
        for name in ("additive", "paper-scalar", "paper-cc")
    }


def test_costs_of_three_conditions() -> None:
    seen: list[tuple[int, int]] = []
    alike = configs(backend="reference", memory="save")
    threads = torch.get_num_threads()
    costs = measure_costs(
        alike,
        vocab_size=31,
        rounds=7,
        baseline="paper-scalar",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 7) for done in range(1, 8)]
    assert torch.get_num_threads() == threads
    assert list(costs) == ["additive", "paper-scalar", "paper-cc"]
    own = costs["paper-scalar"]
    assert (own.speed_ratio, own.speed_ratio_low, own.speed_ratio_high, own.peak_ratio) == (1, 1, 1, 1)
    for one in costs.values():
        assert one.rounds == 7
        assert 0 < one.speed_ratio_low <= one.speed_ratio <= one.speed_ratio_high
        assert one.peak_ratio == one.peak_bytes / own.peak_bytes
    assert costs["additive"].peak_bytes < own.peak_bytes < costs["paper-cc"].peak_bytes
    again = measure_costs(alike, vocab_size=31, rounds=1, baseline="paper-scalar")
    assert [one.peak_bytes for one in again.values()] == [one.peak_bytes for one in costs.values()]


def test_times_become_speeds_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """With known times: ratios are taken within a round, the median over rounds, never between rounds."""
    times = {"additive": [1.0, 4.0, 2.0], "paper-scalar": [2.0, 4.0, 5.0], "paper-cc": [1.0, 1.0, 1.0]}
    monkeypatch.setattr(cost_module, "_timed", lambda trials, rounds, progress: times)
    costs = measure_costs(configs(accumulate=3), vocab_size=31, rounds=3, baseline="additive")
    scalar, tokens = costs["paper-scalar"], 2 * 3 * 16
    assert scalar.tokens_per_second == tokens / 4
    assert (scalar.speed_ratio_low, scalar.speed_ratio, scalar.speed_ratio_high) == pytest.approx((0.4, 0.5, 1.0))
    assert (costs["paper-cc"].speed_ratio_low, costs["paper-cc"].speed_ratio, costs["paper-cc"].speed_ratio_high) == (
        1.0,
        2.0,
        4.0,
    )


def test_every_round_makes_every_condition_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def record(made: Trial, forward: Any) -> None:
        order.append(made.config.model.residual.rule + str(made.config.model.residual.value_channels))

    plain = Trial.step
    monkeypatch.setattr(Trial, "step", lambda made, forward: (record(made, forward), plain(made, forward)))
    measure_costs(configs(), vocab_size=31, rounds=8, baseline="additive")
    timed = order[-24:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(one) == ["additive1", "delta1", "delta4"] for one in rounds)
    assert len(set(rounds)) > 2


def test_the_step_trains() -> None:
    made, step = training_step("paper-cc")
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    losses = []
    for _ in range(12):
        step()
        with torch.no_grad():
            loss = made.model(made.ids[:, :-1], made.ids[:, 1:]).loss
        assert loss is not None
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 1.5 * math.log(64)
    changed = [name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])]
    assert set(changed) == set(before)
    assert isinstance(made.model, GPT) and all(parameter.grad is None for parameter in made.model.parameters())


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'additive'"):
        measure_costs(configs(), vocab_size=31, rounds=1, baseline="aditive")
    with pytest.raises(UserError, match="rounds must be at least 1, got 0"):
        measure_costs(configs(), vocab_size=31, rounds=0, baseline="additive")
    mixed = configs()
    mixed["paper-cc"] = replace(mixed["paper-cc"], threads=2)
    with pytest.raises(UserError, match="threads must be the same"):
        measure_costs(mixed, vocab_size=31, rounds=1, baseline="additive")


def test_costs_belong_to_their_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_study(str(study_file(tmp_path, "additive", "ddl-1.5")))
    asked: list[str] = []
    original = costs.measure_costs

    def measure(*arguments: Any, baseline: str, **options: Any) -> Any:
        asked.append(baseline)
        return original(*arguments, baseline=baseline, **options)

    monkeypatch.setattr(costs, "measure_costs", measure)
    first = costs.measure(config, 256, tmp_path / "costs.json")
    assert costs.measure(config, 256, tmp_path / "costs.json") == first and asked == ["additive"]
    text = (tmp_path / "study.toml").read_text().replace('baseline = "additive"', 'baseline = "ddl-1.5"')
    write_text(tmp_path / "study.toml", text)
    second = costs.measure(load_study(str(tmp_path / "study.toml")), 256, tmp_path / "costs.json")
    assert asked == ["additive", "ddl-1.5"]
    assert first["additive"].speed_ratio == second["ddl-1.5"].speed_ratio == 1.0
    assert json.loads((tmp_path / "costs.json").read_text())["baseline"] == "ddl-1.5"
    # Another baseline, another vocabulary, another model of one condition: what rests on them is measured again.
    costs.measure(load_study(str(tmp_path / "study.toml")), 300, tmp_path / "costs.json")
    config = load_study(str(tmp_path / "study.toml"))
    deeper = merged(config.conditions["additive"].changes, {"model": {"layers": 2}})
    changed = replace(config.conditions["additive"], changes=deeper)
    wider = replace(config, conditions=config.conditions | {"additive": changed})
    before = costs.measure(config, 256, tmp_path / "costs.json")
    after = costs.measure(wider, 256, tmp_path / "costs.json")
    assert after["ddl-1.5"] == before["ddl-1.5"] and after["additive"] != before["additive"] and len(asked) == 5
    # One that is left out for a while keeps what it had.
    alone = replace(wider, conditions={"ddl-1.5": wider.conditions["ddl-1.5"]})
    assert costs.measure(alone, 256, tmp_path / "costs.json") == {"ddl-1.5": after["ddl-1.5"]}
    assert costs.measure(wider, 256, tmp_path / "costs.json") == after and len(asked) == 5
