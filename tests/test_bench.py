"""Benchmarks: the arithmetic on known times, what the suites hold, what is checked before timing, and the command."""

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepdelta import PRESETS, UserError
from deepdelta.cli import main
from deepdelta.device import choose_device
from deepdelta.lab.bench import SUITES, checks, load_results, load_suite, run_suite, runner, subjects, suites, tables
from deepdelta.lab.bench.config import ADDED, MEASURES, Bar, Case, Group, Suite, quick
from deepdelta.lab.bench.results import bars_of, ratio_of
from deepdelta.lab.measure import cost
from deepdelta.lab.measure.agreement import agreement

CPU = choose_device("cpu", "fp32")
ADDITIVE, DDL, FUSED = suites.ADDITIVE, *suites.DDL
SIZES: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "batch": 2, "context": 12, "vocab_size": 31}
TRAINING = Group(
    name="small training",
    work="training",
    cases=(ADDITIVE, DDL, FUSED, suites.HYPER),
    baseline="additive",
    bars=(
        Bar(case="paper-cc, fused", against="paper-cc", at_least=1e-6),
        Bar(case="paper-cc", against="additive", measure="peak", at_most=0.01),
    ),
    **SIZES,
)
TINY = Suite(
    name="tiny",
    question="Does <all> of it run & fit?",
    rounds=2,
    groups=(
        TRAINING,
        Group(name="small memory", work="memory", cases=(ADDITIVE, FUSED), baseline="additive", **SIZES),
        Group(name="small prefill", work="prefill", cases=(ADDITIVE, FUSED), baseline="additive", **SIZES),
        Group(name="small decoding", work="decoding", cases=(ADDITIVE, FUSED), baseline="additive", **SIZES),
        *(
            replace(TRAINING, name=f"layers {n}", layers=n, axis="layers", value=n, cases=(ADDITIVE, DDL), bars=())
            for n in (1, 2)
        ),
        *(replace(one, dim=8, layers=2, batch=3, cases=one.cases[-2:], bars=()) for one in suites.NETWORKS.groups),
        replace(suites.operator(24, PRESETS["paper-cc-repeat"]), batch=40),
    ),
)


WRITTEN = ["operator.html", "plot.html", "plot.svg", "results.json", "table.md"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SUITES", {**SUITES, "tiny": TINY})


def test_ratios_of_known_times() -> None:
    """Within a round, never between rounds: 1/2, 4/4, 2/5, 3/3, 8/1."""
    ratio = ratio_of([1.0, 4.0, 2.0, 3.0, 8.0], [2.0, 4.0, 5.0, 3.0, 1.0])
    assert (ratio.minimum, ratio.median, ratio.maximum) == (0.4, 1.0, 8.0)
    assert ratio.low is not None and ratio.high is not None
    # Of 5 values a bootstrap median is the least with probability P(Bin(5, 1/5) >= 3) = 0.058 > 0.025.
    assert (ratio.low, ratio.high) == (0.4, 8.0)
    few = ratio_of([1.0, 1.0], [2.0, 4.0])
    assert (few.median, few.low, few.high, few.minimum) == (0.375, None, None, 0.25)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = np.random.default_rng(7)
    covered = 0
    for _ in range(60):
        interval = ratio_of(np.exp(draw.normal(0, 0.1, 30)).tolist(), [1.0] * 30)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 1 <= interval.high
    assert 0.87 <= covered / 60 < 1


def test_interleaved_times_of_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that the stages move: every run once a round, to the end of each stage, in changing order."""
    now, order = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def stage(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    runs = {name: (stage(name, size), stage(name, 2 * size)) for name, size in (("a", 1.0), ("b", 10.0), ("c", 0.5))}
    times = cost.interleaved(runs, rounds=6, device=torch.device("cpu"))
    assert times == {"a": [(1, 3)] * 6, "b": [(10, 30)] * 6, "c": [(0.5, 1.5)] * 6}
    rounds = [tuple(order[i : i + 6 : 2]) for i in range(0, 36, 6)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1


def test_bars_from_known_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way from fake times and peaks to `reached`."""
    fake = {"additive": 1.0, "paper-cc": 4.0, "paper-cc, fused": 2.0}
    peaks = iter((100, 300, 150))
    group = replace(
        TRAINING,
        cases=(ADDITIVE, DDL, FUSED),
        bars=(
            Bar(case="paper-cc, fused", against="additive", at_least=0.5),
            Bar(case="paper-cc, fused", against="paper-cc", measure="step", at_least=2.01),
            Bar(case="paper-cc, fused", against="additive", measure="peak", at_most=1.5),
            Bar(case="paper-cc", against="additive", measure="peak", at_most=2.99),
        ),
    )
    monkeypatch.setattr(
        runner, "interleaved", lambda runs, **_: {name: [(fake[name], 2 * fake[name])] * 3 for name in runs}
    )
    monkeypatch.setattr(cost, "peak_bytes", lambda step, held: next(peaks))
    results = run_suite(replace(TINY, groups=(group,)), tmp_path, threads=1, command="typed")
    (found,) = results.groups
    assert [one.ratio.median for one in found.bars] == [0.5, 2.0, 1.5, 3.0]
    assert [one.reached for one in found.bars] == [True, False, True, False]
    assert found.row("paper-cc").timings["step"].tokens_per_second == 2 * 12 / 8
    assert found.row("paper-cc").peak_ratio == 3
    bar = tables.bench_tables(results)[0]
    assert [row[-1] for row in bar.rows] == ["yes", "no", "yes", "no"]
    assert bars_of(group, [row for row in found.rows if row.case != "paper-cc"]) == (found.bars[0], found.bars[2])


def test_named_suites_hold_what_the_bar_asks() -> None:
    assert set(SUITES) == {"bar", "peers", "growth", "operator", "networks", "gpu"}
    bars = {(g.name, b.case, b.against, b.measure): b.at_least or b.at_most for g in suites.BAR.groups for b in g.bars}
    # The code that `auto` takes: plain PyTorch at V = 1 where it is compiled for the CPU.
    assert bars["training, d 256, compiled", "paper-scalar", "additive", "forward_backward"] == 0.985
    assert bars["training, d 768, compiled", "paper-scalar", "additive", "forward_backward"] == 0.99
    assert bars["training, d 256, eager", "paper-scalar, fused", "additive", "forward_backward"] == 0.97
    assert bars["training, d 256, eager", "default V=1, fused", "additive", "forward_backward"] == 0.97
    assert bars["training, d 256, eager", "default, fused", "additive", "forward_backward"] == 0.90
    assert bars["training, d 256, compiled", "default V=1", "additive", "forward_backward"] == 0.985
    assert bars["training, d 256, compiled", "paper-cc, fused", "additive", "forward_backward"] == 0.94
    assert bars["training, d 768, compiled", "paper-cc, fused", "additive", "forward_backward"] == 0.97
    assert bars["training, d 256, eager", "paper-cc, fused", "additive", "forward_backward"] == 0.90
    assert bars["training, d 256, eager", "paper-cc, fused", "hyper-connections", "forward_backward"] == 1.0
    assert bars["training, d 256, compiled", "paper-cc, fused", "hyper-connections", "forward_backward"] == 1.0
    assert bars["training, d 256, compiled", "paper-cc V=16, fused", "paper-cc, fused", "forward_backward"] == 0.88
    for batch in (1, 8):
        assert bars[f"decoding, d 256, batch {batch}", "paper-cc, fused", "additive", "decoding"] == 1.0
    assert bars["prefill, d 256, eager", "paper-scalar, fused", "additive", "forward"] == 1.0
    for layers in (24, 96):
        assert bars[f"memory, {layers} layers", "paper-cc, fused", "additive", "peak"] == 1.02
    assert suites.BAR.rounds >= 30
    for suite in SUITES.values():
        for group in suite.groups:
            if group.work not in ADDED:
                baseline = next(case for case in group.cases if case.name == group.baseline)
                assert (baseline.residual, baseline.backend) == (PRESETS["additive"], "reference")
    axes = [group.axis for group in SUITES["growth"].groups]
    counts = {"V": 5, "d": 4, "layers": 4, "tokens": 4, "batch": 3, "threads": 2}
    assert {axis: axes.count(axis) for axis in axes} == counts
    small = quick(suites.BAR)
    assert small.rounds == 5 and not any(group.compiled or group.bars or group.layers > 2 for group in small.groups)


def test_bad_suites_are_named() -> None:
    with pytest.raises(UserError, match="there is no suite 'opertor'; did you mean 'operator'"):
        load_suite("opertor")
    with pytest.raises(UserError, match="there is no case 'aditive'; did you mean 'additive'"):
        replace(TRAINING, baseline="aditive")
    with pytest.raises(UserError, match="nothing measures 'forward'; did you mean"):
        replace(TRAINING, bars=(Bar(case="paper-cc", against="additive", measure="forward", at_least=1.0),))
    with pytest.raises(UserError, match="layers must be at least 1, got 0"):
        replace(TRAINING, layers=0)
    with pytest.raises(UserError, match="give either residual or rival"):
        Case(name="both", residual=PRESETS["paper-cc"], rival="hyper-connections")
    with pytest.raises(UserError, match="rivals have no decoding to time"):
        replace(TRAINING, work="decoding", bars=())
    with pytest.raises(UserError, match="peak memory has at_most"):
        Bar(case="paper-cc", against="additive", measure="peak", at_least=1.0)
    with pytest.raises(UserError, match="different names"):
        replace(TRAINING, cases=(ADDITIVE, ADDITIVE))
    with pytest.raises(UserError, match="rounds must be at least 1, got 0"):
        run_suite(TINY, Path("never"), rounds=0, command="")


@pytest.mark.parametrize("broken", ["training", "operator"])
def test_a_wrong_backend_is_refused_before_anything_is_timed(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A backward pass whose gradient of h is a hundredth too large in the model, a millionth in fp64."""
    from deepdelta.ops.backends.cpu import launch

    plain, size = launch.backward, 1e-2 if broken == "training" else 1e-6

    def wrong(*given: Any) -> Any:
        gradients = plain(*given)
        gradients.d_h.mul_(1 + size)
        return gradients

    monkeypatch.setattr(launch, "backward", wrong)
    monkeypatch.setattr(runner, "interleaved", lambda *_, **__: pytest.fail("timed"))
    suite = replace(TINY, groups=tuple(group for group in TINY.groups if group.work == broken))
    with pytest.raises(UserError, match=r"must agree with its reference within .* nothing was timed"):
        run_suite(suite, tmp_path / "out", threads=1, command="")
    assert not (tmp_path / "out").exists()


def test_wrong_decoding_and_rivals_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = next(group for group in TINY.groups if group.work == "decoding")
    assert len(list(checks.check(group, group.cases, CPU))) == 2
    plain = checks.DecodingCache.decode
    monkeypatch.setattr(checks.DecodingCache, "decode", lambda cache, ids: plain(cache, ids) * 1.01)
    with pytest.raises(UserError, match="small decoding: additive: must agree"):
        list(checks.check(group, group.cases, CPU))
    monkeypatch.setattr(checks, "loss_and_gradients", lambda *_: {"loss": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match="hyper-connections: must be finite before it is timed, but loss is not"):
        list(checks.check(TRAINING, (suites.HYPER,), CPU))


def test_agreement_is_relative_and_never_hides_a_nan() -> None:
    one = {"big": torch.tensor([3.0, 4.0]), "rounding": torch.tensor([1e-9])}
    assert agreement(one, one) == 0
    assert agreement({**one, "big": torch.tensor([3.0, 4.5])}, one) == pytest.approx(0.1)
    # Far below the largest: compared with a hundred-thousandth of it.
    assert agreement({**one, "rounding": torch.tensor([2e-9])}, one) == pytest.approx(1e-9 / 5e-5)
    assert agreement({**one, "rounding": torch.tensor([float("nan")])}, one) == float("inf")
    assert agreement({**one, "big": torch.tensor([float("inf"), 4.0])}, one) == float("inf")


def test_bytes_and_flops_by_hand() -> None:
    # V = 4, D = 8, fp32: X and h in, X' and c' out; then X, h, dX', dc' in and dX, dh out.
    forward, backward = 4 * (32 + 8 + 32 + 8), 4 * (32 + 8 + 32 + 8 + 32 + 8)
    assert subjects.step_bytes(4, 8, 4) == (forward, forward + backward)
    operator = TINY.groups[-1]
    bound = subjects.triad(operator, CPU)
    given = subjects.build(operator, operator.cases[0], CPU)
    assert bound.bytes_per_token == given.bytes_per_token
    for stage in bound.stages:
        a, (b, c) = stage.keywords["out"], stage.args  # type: ignore[attr-defined]
        assert a.nbytes == b.nbytes == c.nbytes
    moved = [3 * stage.keywords["out"].nbytes for stage in bound.stages]  # type: ignore[attr-defined]
    first, both = given.bytes_per_token
    assert moved == pytest.approx([40 * first, 40 * (both - first)], abs=12)
    # |h|^2 and scale, read and outer product, sum over V, norm; each product with its addition.
    residual, v, d = PRESETS["paper-cc-repeat"], 4, 24
    by_hand = (2 * d + 3) + (4 * v * d + 2 + 4 * v) + 2 * v * d + (4 * d + 3)
    assert subjects.step_flops(residual, d) == by_hand == given.flops_per_token[0]


def test_what_cannot_run_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subjects, "fused_problem", lambda *_: "numba is <absent>")
    monkeypatch.setattr(subjects, "compiler_problem", lambda device: "no C++ compiler")
    compiled = replace(TRAINING, name="compiled", compiled=True)
    results = run_suite(replace(TINY, groups=(TRAINING, compiled)), tmp_path, threads=1, command="")
    plain, absent = results.groups
    assert plain.skipped == {"paper-cc, fused": "numba is <absent>"}
    assert [row.case for row in plain.rows] == ["additive", "paper-cc", "hyper-connections"]
    assert [one.bar.case for one in plain.bars] == ["paper-cc"]
    assert absent.rows == () and set(absent.skipped.values()) == {"no C++ compiler"}
    page = (tmp_path / "plot.html").read_text()
    assert "skipped, numba is &lt;absent&gt;." in page and "skipped, no C++ compiler." in page
    assert "3 of 4 bars were not measured" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="small prefill: the baseline cannot run here: numba is <absent>"):
        prefill = next(group for group in TINY.groups if group.work == "prefill")
        run_suite(replace(TINY, groups=(replace(prefill, baseline="paper-cc, fused"),)), tmp_path, command="")


def test_no_compiler_is_reported_by_name() -> None:
    import torch._inductor.config as inductor
    from torch._inductor import cpp_builder

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        for cached in ("get_cpp_compiler", "cpp_compiler_search"):
            getattr(getattr(cpp_builder, cached, None), "cache_clear", lambda: None)()
        assert "needs a C++ compiler" in (subjects.compiler_problem("cpu") or "")


@pytest.mark.usefixtures("tiny", "unchecked")
def test_the_command_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    main(["bench", "tiny", "--threads", "1"])
    assert torch.get_num_threads() == threads
    out = tmp_path / "runs" / "bench-tiny"
    assert sorted(path.name for path in out.iterdir()) == WRITTEN
    results = load_results(out / "results.json")
    assert (results.suite, results.rounds, results.threads, results.quick) == ("tiny", 2, 1, False)
    assert {"torch", "numpy", "python", "deepdelta", "numba", "hyper-connections", "x-transformers"} <= set(
        results.versions
    )
    assert results.commit is None or re.match(r"[0-9a-f]{40}", results.commit)
    assert len(results.checks) == 2 + 1 + 1 + 2 + 1 + 3 * 2
    assert [found.group for found in results.groups] == list(TINY.groups)
    for found in results.groups:
        names = [*(case.name for case in found.group.cases)]
        own = [ADDED[found.group.work]] if found.group.work in ADDED else []
        assert [row.case for row in found.rows] == own + names
        for row in found.rows:
            assert tuple(row.timings) == MEASURES[found.group.work]
            for timing in row.timings.values():
                assert len(timing.seconds) == 2 and min(timing.seconds) > 0
            assert (row.peak_bytes is not None) == (found.group.work in ("training", "memory"))
            if found.group.work == "training":
                assert row.timings["forward_backward"].seconds < row.timings["step"].seconds
    assert results.groups[0].bars[0].reached and not results.groups[0].bars[1].reached
    said = capsys.readouterr().out
    assert "The bar" in said and max(map(len, said.splitlines())) <= 80
    ElementTree.fromstring((out / "plot.svg").read_text())
    page = (out / "plot.html").read_text()
    for one in tables.bench_tables(results):
        assert all(f'<th scope="col">{column.title}</th>' in page for column in one.columns)
    assert "Does &lt;all&gt; of it run &amp; fit?" in page and "<all>" not in page
    assert "throughput against layers, additive = 1" in page and "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="([^#"]*)"', page) == ["operator.html"]
    assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink))", page)
    table = (out / "table.md").read_text()
    assert "Does &lt;all> of it" in table
    assert "| paper-cc, fused / paper-cc | forward + backward | fused (numba) |" in table


@pytest.mark.usefixtures("tiny", "unchecked")
def test_without_what_draws_there_are_no_plots_until_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = next(group for group in TINY.groups if group.work == "operator")
    monkeypatch.setattr(suites, "SUITES", {"tiny": replace(TINY, groups=(group,), rounds=5)})
    for absent in ("matplotlib", "jinja2", "scipy", "plotly"):
        monkeypatch.setitem(sys.modules, absent, None)
    main(["bench", "tiny", "--out", str(tmp_path)])
    assert "No plot.svg and plot.html: matplotlib and jinja2 are absent" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]
    assert load_results(tmp_path / "results.json").groups[0].rows[1].timings["forward"].ratio.low is not None
    with pytest.raises(SystemExit):
        main(["bench", "--redraw", str(tmp_path)])
    assert "plots need the extra 'lab'" in capsys.readouterr().err
    monkeypatch.undo()
    table = (tmp_path / "table.md").read_text()
    main(["bench", "--redraw", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == WRITTEN
    assert (tmp_path / "table.md").read_text() == table


def test_the_suite_for_a_gpu_goes_through_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = quick(SUITES["gpu"])
    assert small.device == "cpu" and not any(group.captured or group.compiled for group in small.groups)
    assert {group.work for group in small.groups} == {"operator", "memory", "decoding"}
    sizes = [(group.dim, group.cases[0].residual.value_channels, group.precision) for group in small.groups[:18]]  # type: ignore[union-attr]
    assert sorted(sizes) == sorted(itertools.product((768, 2048, 4096), (1, 4, 16), ("bf16", "fp32")))
    with pytest.raises(
        UserError, match=r"small prefill: decoding alone is captured, got prefill; set captured=False\."
    ):
        replace(next(group for group in TINY.groups if group.work == "prefill"), captured=True)


def test_make_gpu_names_all_that_is_absent(tmp_path: Path) -> None:
    """Of a Python that has nothing installed."""
    suite = Path(__file__).parent / "gpu" / "suite.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(suite), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout.startswith("absent, and needed: torch, triton, pytest, numpy, ")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unchecked")
def test_the_command_names_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["bench", "bars"], "there is no suite 'bars'; did you mean 'bar'?"),
        (["bench", "bar", "--rounds", "0"], "rounds must be at least 1, got 0."),
        (["bench", "bar", "--threads", "-1"], "threads must be at least 1, got -1."),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2 and f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(UserError, match="must hold results that deepdelta bench wrote, but there is no such file"):
        load_results(file)
    for text, message in (
        ("{", "must hold a JSON object, but is damaged"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "has format 1, and this version reads 2"),
        (json.dumps({"format": 3}), "has format 3, and this version reads 2"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_results(file)
