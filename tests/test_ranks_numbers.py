"""1, 2 and 4 processes train what one trains, and go on with what others saved."""

from pathlib import Path
from typing import Any

import pytest

from rank_runs import Case, assert_close, by_ranks, halves, run_cases, small, text_and_documents
from tiny_runs import rows

pytestmark = [pytest.mark.scale, pytest.mark.usefixtures("unchecked_file")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return text_and_documents(tmp_path)


PRESETS = {
    "default": ("ddl", {}),
    "delta": ("paper-cc", {}),
    "delta-token": ("paper-tc", {}),
    "write-only": ("paper-cc", {"rule": "write_only"}),
}


# One value channel has nothing to expand.
ONE_CHANNEL = {"expansion": "repeat", "value_channels": 1}


def matrix(source: Path) -> dict[str, dict[str, Any]]:
    return {
        f"{name}-{channels}-{backend}": small(
            source, preset, residual=changes | (ONE_CHANNEL if channels == 1 else {}), backend=backend, steps=2
        )
        for name, (preset, changes) in PRESETS.items()
        for channels in (1, 4)
        for backend in ("reference", "fused")
    }


SHARED = {
    # Of one process the ways differ in nothing but the group.
    1: {"fsdp": "4-fused"},
    2: {"ddp": "reference", "fsdp": "", "tensor": "fused"},
    # tests/test_tensor_parallel.py has gradients of four.
    4: {"ddp": "fused", "fsdp": "reference", "tensor": "4-fused"},
}
"""By number of processes and way of sharing, how the names of the cases end that are trained so."""


def test_every_number_trains_as_one(source: Path, tmp_path: Path) -> None:
    """Each case in one way with two and with four processes, and by FSDP with two."""
    cases = matrix(source)
    assert not run_cases(tmp_path / "one", [(name, plain, {}) for name, plain in cases.items()])
    for size, ways in SHARED.items():
        pairs = [(name, way) for way, end in ways.items() for name in cases if name.endswith(end)]
        shared: list[Case] = [(f"{name}-{way}", cases[name] | {"parallel": way}, {}) for name, way in pairs]
        assert by_ranks(size, tmp_path / f"{size}", run_cases, shared) == [{}] * size
        for name, way in pairs:
            assert_close(tmp_path / f"{size}" / f"{name}-{way}", tmp_path / "one" / name)


def test_layers_that_are_repeated_are_shared_too(source: Path, tmp_path: Path) -> None:
    plain = {
        "drawn": small(source, "plain-start", model={"repeats": 3}, draw_repeats=True),
        "again": small(source, "paper-tc", model={"repeats": 2}, recompute=True),
    }
    assert not run_cases(tmp_path / "one", [(name, settings, {}) for name, settings in plain.items()])
    pairs = [(name, way) for name in plain for way in ("ddp", "fsdp")]
    shared: list[Case] = [(f"{name}-{way}", plain[name] | {"parallel": way}, {}) for name, way in pairs]
    assert by_ranks(2, tmp_path / "two", run_cases, shared) == [{}] * 2
    for name, way in pairs:
        assert_close(tmp_path / "two" / f"{name}-{way}", tmp_path / "one" / name)


def test_saved_by_some_resumed_by_others(source: Path, tmp_path: Path) -> None:
    every = [(a, b) for a in (1, 2, 4) for b in (1, 2, 4) if a != b]
    plain = {way: small(source, parallel=way, average="ema") for way in ("ddp", "fsdp", "tensor")}
    pairs = {
        f"{way}-{a}-{b}": (way, (a, b))
        for way in plain
        for a, b in (every if way == "fsdp" else [(1, 4), (4, 2), (2, 1)])
    }
    assert not run_cases(tmp_path / "one", [*((way, settings, {}) for way, settings in plain.items())])
    for part in range(2):
        for size in (1, 2, 4):
            cases = [halves(name, plain[way])[part] for name, (way, sizes) in pairs.items() if sizes[part] == size]
            assert by_ranks(size, tmp_path / "shared", run_cases, cases) == [{}] * size
    for name, (way, _) in pairs.items():
        assert_close(tmp_path / "shared" / name, tmp_path / "one" / way)


# torch's own, as it imports its compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_in_bf16(source: Path, tmp_path: Path) -> None:
    """As one process: compiled within rounding, in bf16 as far as its digits go."""
    half = {"precision": "bf16", "recompute": True}
    cases = {"compiled": small(source, compile=True, steps=2), "half": small(source, **half, steps=3)}
    assert not run_cases(tmp_path / "one", [(name, plain, {}) for name, plain in cases.items()])
    pairs = [("compiled", "ddp"), ("compiled", "fsdp"), ("half", "fsdp")]
    shared: list[Case] = [(f"{name}-{way}", cases[name] | {"parallel": way}, {}) for name, way in pairs]
    assert by_ranks(2, tmp_path / "two", run_cases, shared) == [{}] * 2
    for way in ("ddp", "fsdp"):
        assert_close(tmp_path / "two" / f"compiled-{way}", tmp_path / "one" / "compiled")
    for row, other in zip(rows(tmp_path / "two" / "half-fsdp"), rows(tmp_path / "one" / "half"), strict=True):
        for name in {"loss", "validation_loss"} & other.keys():
            assert row[name] == pytest.approx(other[name], rel=2e-3), (row, other)
