"""Which part of a model does what: main effects and two-way interactions of factors over a study's conditions.

Legend of shapes: C conditions, P coefficients.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from deepdelta.errors import UserError, nearest
from deepdelta.lab.analysis.results import Effect, Factorial, Measurements
from deepdelta.lab.analysis.statistics import family

Vector = NDArray[np.float64]


def design(title: str, factorial: Factorial, levels: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """The weights with which the losses of the conditions add up to each effect, by effect and condition.

    The loss of a condition is modelled as y = m + sum_f a_f + sum_{f<g} a_fg with effect coding: the a_f of a factor's
    levels add up to 0, and so do the a_fg over either factor. With the model y = X p, least squares gives p = X^+ y. A
    factor's levels are compared with the one that the first condition has: the main effect of level x over level a is
    a_f(x) - a_f(a), the interaction with y over b of another factor is the difference of the differences
    a_fg(x, y) - a_fg(a, y) - a_fg(x, b) + a_fg(a, b). Either is c p for some c, so its weights are c X^+. In a full
    factorial without repeats these are differences of plain means over conditions.

    Args:
        levels: by condition, its level of each factor. Conditions that lack a factor, or a level in `where`, are out.

    Raises:
        UserError: an unknown factor, one with a single level, or effects that the conditions do not tell from others.
    """
    known = sorted({factor for own in levels.values() for factor in own})
    for factor in (*factorial.factors, *factorial.where):
        if factor not in known:
            raise UserError(f"factorials.{title}: no condition has a factor '{factor}'; {nearest(factor, known)}")
    chosen = {
        name: own
        for name, own in levels.items()
        if set(factorial.factors) <= set(own) and all(own.get(key) == value for key, value in factorial.where.items())
    }
    seen = {factor: list(dict.fromkeys(own[factor] for own in chosen.values())) for factor in factorial.factors}
    for factor, values in seen.items():
        if len(values) < 2:
            raise UserError(
                f"factorials.{title}: '{factor}' must have at least two levels among its conditions "
                f"{list(chosen)}, got {values}."
            )
    codes = {factor: _codes(values) for factor, values in seen.items()}
    pairs = list(combinations(factorial.factors, 2)) if factorial.interactions else []
    columns_C_P = np.array(
        [
            np.concatenate(
                [
                    [1.0],
                    *(codes[factor][own[factor]] for factor in factorial.factors),
                    *(np.kron(codes[one][own[one]], codes[other][own[other]]) for one, other in pairs),
                ]
            )
            for own in chosen.values()
        ]
    )
    inverse_P_C = np.linalg.pinv(columns_C_P)
    effects: dict[str, dict[str, float]] = {}
    confounded = []
    for name, wanted_P in _wanted(factorial.factors, pairs, seen, codes, columns_C_P.shape[1]):
        weights_C = wanted_P @ inverse_P_C
        if not np.allclose(weights_C @ columns_C_P, wanted_P, atol=1e-9):
            confounded.append(name)
        effects[name] = dict(zip(chosen, weights_C.tolist(), strict=True))
    if confounded:
        raise UserError(
            f"factorials.{title}: the {len(chosen)} conditions do not tell these effects from others: "
            f"{'; '.join(confounded)}. Add conditions, name fewer factors, or set interactions = false."
        )
    return effects


def effects(measured: Measurements) -> tuple[Effect, ...]:
    """Every effect of every factorial at every budget, one value per seed that all its conditions finished.

    The values of the seeds give a t-interval as any paired difference does. Holm's correction runs over the effects of
    a budget.
    """
    levels = {condition.name: condition.factors for condition in measured.conditions}
    designs = {
        (title, name): weights
        for title, factorial in measured.factorials.items()
        for name, weights in design(title, factorial, levels).items()
    }
    found: list[Effect] = []
    for budget in measured.budgets:
        losses = {condition.name: condition.losses(budget) for condition in measured.conditions}
        values = {
            key: {
                seed: sum(weight * losses[condition][seed] for condition, weight in weights.items())
                for seed in measured.seeds
                if all(seed in losses[condition] for condition in weights)
            }
            for key, weights in designs.items()
        }
        found += [
            Effect(factorial=title, name=name, budget=budget, values=values[title, name], comparison=comparison)
            for (title, name), comparison in family(values).items()
        ]
    return tuple(found)


def _codes(levels: list[str]) -> dict[str, Vector]:
    """Effect codes: a unit vector for each level but the last, -1 everywhere for that."""
    units = np.eye(len(levels) - 1)
    return dict(zip(levels, [*units, -np.ones(len(levels) - 1)], strict=True))


def _wanted(
    factors: tuple[str, ...],
    pairs: list[tuple[str, str]],
    seen: Mapping[str, list[str]],
    codes: Mapping[str, dict[str, Vector]],
    size: int,
) -> list[tuple[str, Vector]]:
    """Names of effects and what of the coefficients each is: vectors c with effect = c p."""
    differences = {
        factor: [
            (f"{factor}: {level} - {seen[factor][0]}", codes[factor][level] - codes[factor][seen[factor][0]])
            for level in seen[factor][1:]
        ]
        for factor in factors
    }
    terms = [differences[factor] for factor in factors]
    terms += [
        [(f"{a} x {b}", np.kron(x, y)) for a, x in differences[one] for b, y in differences[other]]
        for one, other in pairs
    ]
    wanted, start = [], 1
    for term in terms:
        for name, part in term:
            vector = np.zeros(size)
            vector[start : start + len(part)] = part
            wanted.append((name, vector))
        start += len(term[0][1])
    return wanted
