"""Configurations as plain data: round trips, strict reading, and what the user may not say."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepdelta import PRESETS, TrainConfig
from deepdelta.config import differences, from_plain, merged, to_plain
from deepdelta.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 1
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = field(default_factory=Part)
    named: dict[str, Part] = field(default_factory=dict)
    many: tuple[Part, ...] = ()
    name: str = "x"


def refused(message: str, plain: dict[str, Any], cls: type = TrainConfig, where: str = "") -> None:
    with pytest.raises(UserError, match=message):
        from_plain(cls, plain, where=where)


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 1e3),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    threads=st.none() | st.integers(1, 64),
    preset=st.sampled_from(sorted(PRESETS)),
    dim=st.integers(1, 64).map(lambda n: 4 * n),
)
def test_round_trip_through_json_text(
    steps: int, lr: float, betas: tuple[float, float], threads: int | None, preset: str, dim: int
) -> None:
    config = TrainConfig(steps=steps, lr=lr, betas=betas, threads=threads)
    model = dataclasses.replace(config.model, dim=dim, residual=PRESETS[preset])
    config = dataclasses.replace(config, model=model)
    assert from_plain(TrainConfig, json.loads(json.dumps(to_plain(config)))) == config


def test_missing_keys_take_the_defaults() -> None:
    assert from_plain(TrainConfig, {}) == TrainConfig()
    assert from_plain(Whole, {"named": {"a": {"size": 3}}, "many": [{}, {"ratio": 1}]}) == Whole(
        named={"a": Part(size=3)}, many=(Part(), Part(ratio=1.0))
    )


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"step": 3}, r"^here: unknown key 'step'; did you mean 'steps'\?$"),
        ({"model": {"dimm": 3}}, r"^here.model: unknown key 'dimm'; did you mean 'dim'\?$"),
        ({"model": {"residual": {"rul": "x"}}}, r"^here.model.residual: unknown key 'rul'; did you mean 'rule'\?$"),
        ({"data": {"sauce": "x"}}, r"^here.data: unknown key 'sauce'; did you mean 'source'\?$"),
        ({"data": {"xyzzy": 1}}, r"unknown key 'xyzzy'; known are: .*bin_vocab_size.*validation_fraction"),
    ],
)
def test_unknown_keys_at_every_level(plain: dict[str, Any], message: str) -> None:
    refused(message, plain, where="here")


def test_unknown_keys_inside_dictionaries_and_tuples() -> None:
    refused(r"^w.named.a: unknown key 'sise'; did you mean 'size'", {"named": {"a": {"sise": 1}}}, Whole, "w")
    refused(r"^many.1: unknown key 'sise'; did you mean 'size'", {"many": [{}, {"sise": 1}]}, Whole)
    refused(r"^Whole: unknown key 'nam'; did you mean 'name'", {"nam": 1}, Whole)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"steps": "3"}, "^steps: .*valid integer, got '3'"),
        ({"steps": 2.5}, "^steps: .*integer, got 2.5"),
        ({"steps": True}, "^steps: .*valid integer, got True"),
        ({"compile": 1}, "^compile: .*valid boolean, got 1"),
        ({"lr": "fast"}, "^lr: .*valid number, got 'fast'"),
        ({"device": "gpu"}, "^device: .*'auto', 'cpu', 'cuda' or 'mps', got 'gpu'"),
        ({"model": {"residual": {"gate": "lineer"}}}, "gate: .*got 'lineer'; did you mean 'linear'?"),
        ({"betas": [0.9]}, "^betas.1: .*required"),
        ({"model": 3}, "^model: .*object, got 3"),
        ({"model": {"residual": {"rule": "delt"}}}, "^model.residual.rule: .*'delta'.*got 'delt'"),
        ({"steps": 0}, "^steps must be at least 1, got 0"),
        ({"data": {"validation_fraction": 2}}, "^data: validation_fraction must lie between 0 and 1, got 2"),
    ],
)
def test_wrong_values_are_named(plain: dict[str, Any], message: str) -> None:
    refused(message, plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((n, 0, f"{n} must be at least 1, got 0") for n in ("batch_size", "accumulate", "eval_every", "eval_tokens")),
        *((n, -1, f"{n} must be at least 1, got -1") for n in ("final_eval_tokens", "checkpoint_every", "threads")),
        *((n, float("inf"), f"{n} must be finite, got inf") for n in ("lr", "clip")),
        *((n, 0.0, f"{n} must be greater than 0, got 0") for n in ("lr", "clip")),
        ("lr", float("nan"), "lr must be finite, got nan"),
        ("final_lr", 1.5, r"final_lr must lie in \[0, 1\], got 1.5"),
        ("weight_decay", -0.1, "weight_decay must lie in .*got -0.1"),
        ("weight_decay", float("nan"), "weight_decay must be finite, got nan"),
        ("warmup", -1, "warmup must lie in .*got -1"),
        ("seed", -1, "seed must lie in .*got -1"),
        ("betas", (0.9, 1.0), r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_ranges(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_cannot_hold_are_refused_at_every_level(value: float) -> None:
    for plain, name in (
        ({"weight_decay": value}, "weight_decay"),
        ({"model": {"rope_base": value}}, r"model\.rope_base"),
        ({"model": {"residual": {"target_scale": value}}}, r"model\.residual\.target_scale"),
    ):
        refused(f"{name.rpartition('.')[2]} must (be finite|be greater than 0|lie in .*), got {value}", plain)


def test_a_date_in_a_toml_file_is_a_wrong_type_like_any_other() -> None:
    refused("^f: lr: .*valid number, got '1979-05-27'", tomllib.loads("lr = 1979-05-27"), where="f")


def test_merged_lays_dictionaries_over_each_other_and_changes_neither() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merged(base, {"a": {"c": {"f": 3}}, "e": [2]}) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [2]}
    assert merged(base, {"a": 5}) == {"a": 5, "e": [1]}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}


def test_differences_name_every_key_with_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "e": 1}) == [
        "a.c: 2 there, 3 here",
        "d: 1 there, None here",
        "e: None there, 1 here",
    ]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_nearest() -> None:
    assert nearest("tain", ["train", "study"]) == "did you mean 'train'?"
    assert nearest("zzz", ["train", "study"]) == "known are: study, train."


def test_of_a_long_value_the_beginning_is_shown() -> None:
    with pytest.raises(UserError, match=r"steps: Input should be a valid integer, got 'a{199}\.\.\.$"):
        from_plain(TrainConfig, {"steps": "a" * 100_000})
