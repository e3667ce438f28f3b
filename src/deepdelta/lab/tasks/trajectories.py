"""Trajectories of a damped, an oscillating and a reflecting system, by scipy's adaptive integrator.

Shapes: N trajectories, T times that are `interval` apart, 2 numbers of the system's state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from deepdelta.errors import UserError, nearest

Floats = NDArray[np.float64]

DAMPING = 0.1
"""Of the pendulum, per unit of time."""
RESTITUTION = 0.9
"""Share of its speed that the ball keeps at the floor."""
REST = 1e-4
"""Speed at the floor below which the ball stays there: its bounces, ever shorter, would have no end."""
TOLERANCE = 1e-8
"""Relative and absolute, of the integrator."""


@dataclass(frozen=True)
class System:
    """dy/dt = flow(y) from a start between `low` and `high`; what falls to the floor y[0] = 0 bounces if `bounces`."""

    summary: str
    interval: float
    low: tuple[float, float]
    high: tuple[float, float]
    flow: Callable[[Floats], list[float]]
    bounces: bool = False


SYSTEMS = {
    "pendulum": System(
        f"damped: angle'' = -sin(angle) - {DAMPING} angle'; (angle, angular velocity)",
        0.25,
        (-2.0, -0.8),
        (2.0, 0.8),
        lambda y: [y[1], -np.sin(y[0]) - DAMPING * y[1]],
    ),
    "lotka_volterra": System(
        "oscillating: prey' = 2/3 prey - 4/3 prey pred, pred' = prey pred - pred; (prey, predators)",
        0.25,
        (0.5, 0.2),
        (1.8, 0.9),
        lambda y: [2 / 3 * y[0] - 4 / 3 * y[0] * y[1], y[0] * y[1] - y[1]],
    ),
    "bouncing": System(
        f"reflecting: height'' = -1, and at the floor velocity becomes -{RESTITUTION} velocity; (height, velocity)",
        0.1,
        (0.5, -0.5),
        (1.5, 0.5),
        lambda y: [y[1], -1.0],
        bounces=True,
    ),
}


def trajectories(system: str, count: int, steps: int, seed: int) -> Float[Tensor, "N T 2"]:
    """`count` trajectories of `steps` intervals from starts drawn uniformly, fp64.

    Raises:
        UserError: an unknown system, or the integrator gave up.
    """
    if system not in SYSTEMS:
        raise UserError(f"there is no system '{system}'; {nearest(system, SYSTEMS)}")
    parts = SYSTEMS[system]
    starts = np.random.default_rng(seed).uniform(parts.low, parts.high, size=(count, 2))
    times = np.arange(steps + 1, dtype=np.float64) * parts.interval
    return torch.from_numpy(np.stack([_trajectory(parts, start, times) for start in starts]))


def _trajectory(system: System, start: Floats, times: Floats) -> Floats:
    """The states at `times`; each flight of a ball ends at the floor, found as a root, and the next begins there."""
    found: list[Floats] = []
    state, now = start, 0.0
    while True:
        ahead = times[times >= now] if now == 0 else times[times > now]
        solved = solve_ivp(
            lambda _, y: system.flow(y),
            (now, float(times[-1])),
            state,
            t_eval=ahead,
            events=_floor if system.bounces else None,
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
        if not solved.success:
            raise UserError(f"the integrator gave up at time {solved.t[-1]}: {solved.message}")
        if len(solved.t):
            found.append(solved.y.T)
        if solved.status == 0:
            return np.concatenate(found)
        now, speed = float(solved.t_events[0][0]), -RESTITUTION * solved.y_events[0][0][1]
        if speed < REST:
            return np.concatenate((*found, np.zeros(((times > now).sum(), 2))))
        # A hair above the floor: from height 0 itself the next fall would not be seen as a crossing.
        state = np.array([1e-12, speed])


def _floor(time: float, y: Floats) -> Any:
    return y[0]


_floor.terminal, _floor.direction = True, -1  # type: ignore[attr-defined]
