"""Which part of a model does what: main effects and two-way interactions of factors over a study's conditions.

Legend of shapes: C conditions, P coefficients.
"""

from collections.abc import Mapping
from functools import partial
from itertools import combinations, product

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
    pairs = list(combinations(factorial.factors, 2)) if factorial.interactions else []
    row = partial(_row, {factor: _codes(values) for factor, values in seen.items()}, pairs)
    columns_C_P = np.array([row(own) for own in chosen.values()])
    # Each effect as c. What a row does not name is averaged over: its coefficients add up to 0.
    wanted = {
        f"{factor}: {level} - {first}": row({factor: level}) - row({factor: first})
        for factor, (first, *levels_after) in seen.items()
        for level in levels_after
    }
    for one, other in pairs:
        (a, *later), (b, *others) = seen[one], seen[other]
        for x, y in product(later, others):
            change_at_y = row({one: x, other: y}) - row({one: a, other: y})
            change_at_b = row({one: x, other: b}) - row({one: a, other: b})
            wanted[f"{one}: {x} - {a} x {other}: {y} - {b}"] = change_at_y - change_at_b
    inverse_P_C = np.linalg.pinv(columns_C_P)
    weights = {name: wanted_P @ inverse_P_C for name, wanted_P in wanted.items()}
    confounded = [name for name in wanted if not np.allclose(weights[name] @ columns_C_P, wanted[name], atol=1e-9)]
    if confounded:
        raise UserError(
            f"factorials.{title}: the {len(chosen)} conditions do not tell these effects from others: "
            f"{'; '.join(confounded)}. Add conditions, name fewer factors, or set interactions = false."
        )
    return {name: dict(zip(chosen, weights_C.tolist(), strict=True)) for name, weights_C in weights.items()}


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


def _row(codes: Mapping[str, dict[str, Vector]], pairs: list[tuple[str, str]], own: Mapping[str, str]) -> Vector:
    """The model's row of a condition with these levels; a factor without one has the code 0."""
    given = {factor: of[own[factor]] if factor in own else 0 * next(iter(of.values())) for factor, of in codes.items()}
    return np.concatenate([[1.0], *given.values(), *(np.kron(given[one], given[other]) for one, other in pairs)])
