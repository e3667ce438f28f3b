"""Settings: what is refused, by name and with the reason, and that the table of illegal combinations is exact."""

import dataclasses
import inspect
import itertools
from typing import Any, get_args, get_type_hints

import pytest
import torch

from deepdelta import PRESETS, DeltaStream, GPTConfig, ResidualConfig, UserError
from deepdelta.config import from_plain, to_plain
from deepdelta.nn.config import ILLEGAL, NEEDED, Rule

# For every entry of the table, settings that break this rule and no other.
TRIGGERS: dict[str, list[dict[str, Any]]] = {
    "value_channels=1 with expansion='embedding_conv'": [{"value_channels": 1, "expansion": "embedding_conv"}],
    "value_channels=1 with compression='channel_conv'": [
        {"value_channels": 1, "compression": "channel_conv", "compression_kernel": 1},
    ],
    "compression='channel_conv' with compression_kernel > value_channels": [
        {"compression": "channel_conv", "value_channels": 3},
        {"compression": "channel_conv", "compression_kernel": 5},
    ],
    "compression_causal=True with a compression other than 'channel_conv'": [
        {"compression_causal": True},
        {"compression_causal": True, "compression": "token"},
    ],
    "compression='channel' with compression_init='random'": [{"compression_init": "random"}],
    "rank > 1 with a rule that writes the branch output": [
        {"rank": 2, "rule": rule} for rule in ("additive", "additive_erase", "two_gate")
    ],
    "direction='pooled' with a rule that writes the branch output": [
        {"direction": "pooled", "rule": rule} for rule in ("additive", "additive_erase", "two_gate")
    ],
    "direction='pooled' with a target other than 'branch'": [
        {"direction": "pooled", "target": target}
        for target in ("linear", "affine", "scaled_sigmoid", "linear_input", "constant", "magnitude")
    ],
    "direction='pooled' with rule='erase_only'": [{"direction": "pooled", "rule": "erase_only"}],
    "direction_norm other than 'unit' with a rule that writes the branch output": [
        {"direction_norm": norm, "rule": rule}
        for norm in ("operator", "bounded", "free")
        for rule in ("additive", "additive_erase", "two_gate")
    ],
    "gate_per_channel=True with rule='additive'": [{"gate_per_channel": True, "rule": "additive"}],
    "erase_blocks > 1 with a rule other than 'additive_erase'": [
        {"erase_blocks": 2, "rule": rule} for rule in get_args(Rule) if rule != "additive_erase"
    ],
    "erase_blocks > 1 with gate_per_channel=True": [
        {"erase_blocks": 2, "rule": "additive_erase", "gate_per_channel": True}
    ],
    "plain_start=True with a rule other than 'additive_erase'": [
        {"plain_start": True, "rule": rule} for rule in ("delta", "write_only", "erase_only", "additive", "two_gate")
    ],
    "plain_start=True with compression_init='random'": [
        {"plain_start": True, "rule": "additive_erase", "compression_init": "random", "compression": kind}
        for kind in ("channel_conv", "token")
    ],
    "value_channels=1 with rule='channels'": [{"rule": "channels", "value_channels": 1}],
    "rule='channels' with rank > 1, direction='pooled', direction_norm other than 'unit' or gate_per_channel=True": [
        {"rule": "channels", **options}
        for options in (
            {"rank": 2},
            {"direction": "pooled"},
            {"direction": "pooled", "target": "branch"},
            {"direction_norm": "free"},
            {"gate_per_channel": True},
        )
    ],
    "gate_per_channel=True with gate='constant'": [{"gate_per_channel": True, "gate": "constant"}],
}


def test_the_table_is_the_one_tested_here():
    assert {illegal.settings for illegal in ILLEGAL} == TRIGGERS.keys()


@pytest.mark.parametrize("illegal", ILLEGAL, ids=lambda illegal: illegal.settings)
def test_every_illegal_combination_is_refused_with_its_reason(illegal):
    for settings in TRIGGERS[illegal.settings]:
        for build in (
            lambda s=settings: ResidualConfig(**s),
            lambda s=settings: DeltaStream(8, **{"rule": "delta"} | s),
        ):
            with pytest.raises(UserError) as caught:
                build()
            assert f"{illegal.settings}: {illegal.reason}" in str(caught.value)


@pytest.mark.parametrize("illegal", ILLEGAL, ids=lambda illegal: illegal.settings)
def test_what_it_advises_is_legal(illegal):
    """Each setting of a refused combination is legal with the others at their defaults, but for what it names."""
    for settings in TRIGGERS[illegal.settings]:
        base = dataclasses.asdict(ResidualConfig())
        assert any(_legal({**base, **settings, name: base[name]}) for name in settings)


def _legal(settings: dict[str, Any]) -> bool:
    try:
        ResidualConfig(**settings)
    except UserError:
        return False
    return True


RANGES = [
    (name, bounds.ge, bounds.le)
    for name, hint in get_type_hints(ResidualConfig, include_extras=True).items()
    for bounds in getattr(hint, "__metadata__", ())
]


def test_every_number_has_a_range():
    numbers = {name for name, kind in get_type_hints(ResidualConfig).items() if kind in (int, float)}
    assert {name for name, _, _ in RANGES} == numbers


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
def test_ranges(name, low, high):
    kind = get_type_hints(ResidualConfig)[name]
    assert kind in (int, float)
    for value in (low - 1, high + 1, low - 1e9, high * 2 + 1):
        with pytest.raises(UserError, match=rf"{name} must lie in \[.*\], got {kind(value)!r}".replace("+", r"\+")):
            ResidualConfig(**{name: kind(value)})
    # Learned gates have a narrower range, below.
    extra = {"compression_kernel": 4} if name != "compression_kernel" else {}
    extra |= {"rule": "additive_erase"} if name == "erase_blocks" else {"gate": "constant"}
    for value in (kind(low), kind(high)):
        assert getattr(ResidualConfig(**{name: value, **extra}), name) == value
    if kind is float:
        with pytest.raises(UserError, match=f"{name} must lie in"):
            ResidualConfig(**{name: float("nan")})


USED_BY = {
    "gate_init": ("delta", "write_only", "erase_only", "two_gate", "channels"),
    "erase_init": ("additive_erase", "two_gate"),
}


@pytest.mark.parametrize("name", USED_BY)
@pytest.mark.parametrize("rule", get_args(get_type_hints(ResidualConfig)["rule"]))
@pytest.mark.parametrize("gate", get_args(get_type_hints(ResidualConfig)["gate"]))
def test_a_learned_gate_that_could_not_learn_is_refused(name, rule, gate):
    """Where the rule has that gate and it is no constant; the value that the message names is taken."""
    used = rule in USED_BY[name] and gate != "constant"
    for start, mended in ((0.0, "0.001"), (1e-6, "0.001"), (2.0, "1.999"), (1.9995, "1.999")):
        settings = {"rule": rule, "gate": gate, name: start}
        if not used:
            assert getattr(ResidualConfig(**settings), name) == start
            continue
        message = f"{name} must lie in .* got {start}: .*learns is {mended}; gate='constant'"
        with pytest.raises(UserError, match=message):
            ResidualConfig(**settings)
        assert getattr(ResidualConfig(**{**settings, name: float(mended)}), name) == float(mended)


def test_a_gate_starts_within_its_own_range(unchecked):
    for name, rule in (("gate_init", "delta"), ("erase_init", "additive_erase")):
        with pytest.raises(UserError, match=rf"{name} must lie in \[0\.001, 0\.999\] .* got 1\.0: at 0 and 1 its"):
            ResidualConfig(**{"rule": rule, "gate_range": 1, name: 1.0})
        assert ResidualConfig(**{"rule": rule, "gate_range": 1, name: 0.999}).gate_range == 1
    with pytest.raises(UserError, match="gate_range must be one of 1, 2, got 3"):
        ResidualConfig(gate_range=3)  # type: ignore[arg-type]


def test_the_width_is_a_multiple_of_the_blocks(unchecked):
    message = "erase_blocks must divide the width 8, got 3; 2 does"
    for make in (
        lambda: DeltaStream(8, erase_blocks=3),
        lambda: GPTConfig(dim=8, heads=2, residual=ResidualConfig(rule="additive_erase", erase_blocks=3)),
    ):
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.parametrize("options", [{"plain_start": True}, {"gate_per_channel": True}], ids=str)
def test_erase_gates_that_could_not_learn_are_refused_in_every_form(options):
    with pytest.raises(UserError, match="erase_init must lie in"):
        ResidualConfig(rule="additive_erase", erase_init=0.0, **options)


CHOICES = {name: get_args(kind) for name, kind in get_type_hints(ResidualConfig).items() if get_args(kind)}


@pytest.mark.parametrize("name", CHOICES)
def test_misspelt_choices_name_the_valid_ones(unchecked, name):
    misspelt = f"{CHOICES[name][0]}"[:-1] + "_"
    with pytest.raises(UserError) as caught:
        ResidualConfig(**{name: misspelt})
    assert name in str(caught.value) and repr(misspelt) in str(caught.value)
    assert all(str(choice) in str(caught.value) for choice in CHOICES[name])
    with pytest.raises(UserError) as caught:
        DeltaStream(8, **{name: misspelt})
    assert all(part in str(caught.value) for part in (name, repr(misspelt), *map(str, CHOICES[name])))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ResidualConfig)])
def test_misspelt_options_name_the_nearest(name):
    misspelt = name[:2] + name[3:]
    with pytest.raises(UserError, match=f"unknown key '{misspelt}'; did you mean '{name}'"):
        DeltaStream(8, **{misspelt: 1})


OPTIONAL = [name for name in inspect.signature(DeltaStream).parameters if name not in ("dim", "options")]


@pytest.mark.parametrize("name", OPTIONAL)
def test_misspelt_options_of_the_stream_alone_name_the_nearest(name):
    misspelt = name[:2] + name[3:]
    with pytest.raises(UserError, match=f"unknown key '{misspelt}'; did you mean '{name}'"):
        DeltaStream(8, **{misspelt: 1})


def test_an_option_like_none_names_them_all():
    with pytest.raises(UserError, match=r"unknown key 'zzz'; known are: channel_first, compression, .*value_channels"):
        DeltaStream(8, zzz=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_channels": 2.5}, "value_channels: .*integer"),
        ({"value_channels": "4"}, "value_channels: .*integer.*'4'"),
        ({"gate_init": "high"}, "gate_init: .*number.*'high'"),
        ({"gate_per_channel": "yes"}, "gate_per_channel: .*boolean.*'yes'"),
    ],
)
def test_wrong_types(unchecked, settings, message):
    with pytest.raises(UserError, match=message):
        DeltaStream(8, **settings)


def test_dim():
    with pytest.raises(UserError, match="dim must be at least 1, got 0"):
        DeltaStream(0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal_and_survive_plain_data(name):
    preset = PRESETS[name]
    assert from_plain(ResidualConfig, to_plain(preset)) == preset
    stream = DeltaStream(8, **dataclasses.asdict(preset))
    assert stream.config == preset


def test_the_library_s_defaults():
    """Without a rule and a preset: what starts as the plain residual. The text's form as published: branch direction,
    linear target, linear gate, beta0 = 1, V = 4, embedding convolution, channel compression starting as the mean."""
    bare = PRESETS["plain-start"]
    assert (bare.rule, bare.plain_start, bare.value_channels, bare.expansion) == ("additive_erase", True, 4, "repeat")
    assert DeltaStream(8).config == bare
    assert GPTConfig().residual == PRESETS["ddl"] == dataclasses.replace(bare, expansion="embedding_conv")
    assert DeltaStream(8, 1, erase_init=0.5).config == dataclasses.replace(bare, value_channels=1, erase_init=0.5)
    assert not DeltaStream(8).config.needs_tokens
    paper = PRESETS["paper-cc"]
    assert (paper.rule, paper.direction, paper.target) == ("delta", "branch", "linear")
    assert (paper.gate, paper.gate_init, paper.direction_eps) == ("linear", 1, 1e-5)
    assert (paper.value_channels, paper.expansion, paper.expansion_kernel) == (4, "embedding_conv", 4)
    assert (paper.compression, paper.compression_init) == ("channel", "identity")
    assert DeltaStream(8, rule="delta").config == dataclasses.replace(paper, expansion="repeat")
    assert (PRESETS["additive"].rule, PRESETS["additive"].value_channels) == ("additive", 1)
    assert dataclasses.replace(PRESETS["paper-scalar"], value_channels=4) == DeltaStream(8, rule="delta").config


UNUSED = [
    ({"gate_init": 0.5}, {"rule": "delta"}),
    ({"target": "constant"}, {"rule": "delta"}),
    ({"target_value": 1.0}, {"rule": "delta", "target": "constant"}),
    ({"target_init": 1.0}, {"preset": "paper-cc", "target": "affine"}),
    ({"direction_pool": "flatten"}, {"preset": "paper-v1"}),
    ({"gate_hidden": 8}, {"gate": "two_layer"}),
    ({"compression_kernel": 2}, {"preset": "code-cc"}),
    ({"expansion_kernel": 2}, {"preset": "ddl"}),
    ({"norm_eps": 1e-6}, {"norm": "rms"}),
]


@pytest.mark.parametrize(("setting", "having"), UNUSED[:-1], ids=str)
def test_what_a_residual_does_not_have_is_refused_by_name(setting, having):
    with pytest.raises(UserError, match=f"DeltaStream: {next(iter(setting))} has no effect on this residual"):
        DeltaStream(8, **setting)
    assert DeltaStream(8, **having, **setting).config is not None


def test_every_setting_without_effect_is_one_that_changes_nothing():
    """Held against the parts that streams have: a stream and its residual, made with another value, are the same."""
    kinds = [{"rule": rule} for rule in get_args(Rule)] + [{"preset": name} for name in PRESETS]
    values = {"gate_init": 0.3, "erase_init": 0.3, "direction_pool": "attention", "target": "constant"}
    values |= {"gate": "constant", "target_init": 3.0, "target_scale": 2.0, "target_value": 1.0, "norm_eps": 1e-2}
    values |= {"gate_range": 1, "gate_hidden_bias": True, "expansion_kernel": 2, "compression_kernel": 3}
    x, refused = torch.randn(2, 5, 8), set()
    for kind, (name, (_, used)) in itertools.product(kinds, NEEDED.items()):
        stream = DeltaStream(8, **kind, seed=1)
        if used(stream.config):
            continue
        refused.add(name)
        outputs = []
        for config in (stream.config, dataclasses.replace(stream.config, **{name: values.get(name, 7)})):
            made = DeltaStream(8, **dataclasses.asdict(config), seed=1)
            residual = made.wrap(torch.nn.Tanh())
            outputs.append(made.reduce(residual(made.expand(x))))
        assert torch.equal(*outputs), (kind, name)
    assert refused == NEEDED.keys() - {"norm_eps"}  # every one of these has a norm


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ResidualConfig().rule = "additive"  # type: ignore[misc]
