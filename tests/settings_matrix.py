"""The settings of a residual as a matrix: its legal combinations, all of them or enough to hold every legal pair."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, get_args

from allpairspy import AllPairs

from deepdelta import ResidualConfig
from deepdelta.nn import config as settings

Combination = dict[str, Any]

AXES: dict[str, tuple[Any, ...]] = {
    "rule": get_args(settings.Rule),
    "direction": get_args(settings.Direction),
    "target": get_args(settings.Target),
    "gate": get_args(settings.Gate),
    "expansion": get_args(settings.Expansion),
    "compression": get_args(settings.Compression),
    "value_channels": (1, 3),
    "rank": (1, 2),
}
"""The parts of the method."""

EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "direction_pool": get_args(settings.Pool),
    "direction_norm": get_args(settings.DirectionNorm),
    "gate_per_channel": (False, True),
    "erase_blocks": (1, 2),
    "compression_causal": (False, True),
    "compression_sharing": get_args(settings.CompressionSharing),
    "norm": get_args(settings.Norm),
    "query": (False, True),
}
"""Finer choices within the parts."""

STARTS: dict[str, tuple[Any, ...]] = {
    "compression_init": get_args(settings.CompressionInit),
    "gate_hidden_bias": (False, True),
    "plain_start": (False, True),
    "gate_range": get_args(settings.GateRange),
}
"""What changes where a part starts or one vector of it: in pairs only."""

SMALL = {"compression_kernel": 2, "expansion_kernel": 3, "gate_hidden": 3, "direction_hidden": 3, "gate_init": 0.7}
"""Sizes, the same in every combination; two taps fit three value channels."""


class Undecided(Exception):
    """A question to a setting that is not chosen yet."""


class Partial:
    """Stands for a configuration of which only some settings are chosen."""

    def __init__(self, chosen: Mapping[str, Any]) -> None:
        self._chosen = SMALL | dict(chosen)

    def __getattr__(self, name: str) -> Any:
        if name in self._chosen:
            return self._chosen[name]
        derived = getattr(ResidualConfig, name, None)
        if isinstance(derived, property):
            return derived.fget(self)
        raise Undecided(name)


def illegal(chosen: Mapping[str, Any]) -> list[settings.Illegal]:
    """The entries of the table that hold whatever the settings still open become."""
    found = []
    for entry in settings.ILLEGAL:
        try:
            if entry.holds(Partial(chosen)):
                found.append(entry)
        except Undecided:
            pass
    return found


def combinations(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[Combination]:
    """The whole product, legal or not."""
    return (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def legal(axes: Mapping[str, tuple[Any, ...]], chosen: Combination | None = None) -> Iterator[Combination]:
    """Every legal combination that holds what is chosen, found without walking the illegal ones."""
    chosen = chosen or {}
    if illegal(chosen):
        return
    name = next((name for name in axes if name not in chosen), None)
    if name is None:
        yield {name: chosen[name] for name in axes}
        return
    for value in axes[name]:
        yield from legal(axes, chosen | {name: value})


def pairs(combination: Combination) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    items = sorted(combination.items())
    return {(one, other) for i, one in enumerate(items) for other in items[i + 1 :]}


def pairwise(axes: Mapping[str, tuple[Any, ...]]) -> list[Combination]:
    """Legal combinations that together hold every pair of values that any legal combination holds."""
    names = list(axes)
    chosen = [
        dict(zip(names, row, strict=True))
        for row in AllPairs(
            [list(values) for values in axes.values()],
            filter_func=lambda row: not illegal(dict(zip(names, row, strict=False))),
        )
    ]
    held = set().union(*map(pairs, chosen))
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            for pair in product(axes[one], axes[other]):
                both = dict(zip((one, other), pair, strict=True))
                # A greedy search under constraints may leave a pair out, or there may be nothing legal that holds it.
                if not pairs(both) <= held and (found := next(legal(axes, both), None)):
                    chosen.append(found)
                    held |= pairs(found)
    return chosen


def effective(combination: Combination) -> Combination:
    """The combination with every setting that its other settings make irrelevant at the default: the same model."""
    config, default = ResidualConfig(**SMALL, **combination), ResidualConfig()
    irrelevant = set()
    if not config.uses_target:
        irrelevant |= {"target"}
    if config.rule == "additive":
        irrelevant |= {"gate", "gate_hidden_bias"}
    if config.direction == "branch":
        irrelevant |= {"direction_pool"}
    if config.value_channels == 1 and config.compression == "channel":
        irrelevant |= {"compression_sharing"}
    if config.rule == "additive" or config.gate == "constant":
        irrelevant |= {"gate_range"}
    if config.gate != "two_layer":
        irrelevant |= {"gate_hidden_bias"}
    return {name: getattr(default, name) if name in irrelevant else value for name, value in combination.items()}
