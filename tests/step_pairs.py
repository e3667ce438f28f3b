"""Cases of the fused step among which any two settings stand together in one."""

from allpairspy import AllPairs

from step_cases import Case


def _possible(values: list[object]) -> bool:
    case = Case(*values)  # type: ignore[arg-type]
    return len(values) < 7 or case.opening != "alone" or case.channels == 1


CASES = [
    Case(),
    Case(tiled=True),
    Case(tokens=11, channels=2, width=100, gates="each", offset=33.0, power=2, tiled=True),
    *(
        Case(*values)
        for values in AllPairs(
            [
                [1, 7],
                [1, 2, 3, 5],
                [1, 5, 33, 100],
                ["none", "one", "each"],
                [1e-6, None, 33.0],
                [0, 1, 2],
                ["norm", "closed", "open", "alone"],
                ["random", "zero", "tiny"],
                [False, True],
            ],
            filter_func=_possible,
        )
    ),
]
"""Among them every pair of two settings."""

GATED = [
    Case(channels=channels, gates=gates, power=power, opening=opening, tiled=tiled, made=made)
    for made, gates, channels, power, opening, tiled in AllPairs(
        [
            ["both", "erase", "write", "added", "one"],
            ["one", "each"],
            [1, 3],
            [0, 1, 2],
            ["norm", "closed"],
            [False, True],
        ]
    )
]
"""The same with the gate and the target made in the kernel."""
