"""Learning rates chosen before the reported seeds run, on text and seeds that no result rests on."""

import math
from collections.abc import Mapping, Sequence

from deepdelta.errors import UserError
from deepdelta.lab.analysis.results import Tuned
from deepdelta.lab.experiments.config import Tune
from deepdelta.lab.experiments.record import RunRecord
from deepdelta.lab.experiments.run import Run

EXTENSIONS = 2
"""Steps by which a grid grows where its best rate is at an end."""


def choose(tune: Tune, losses: Mapping[float, list[float | None]], condition: str) -> Tuned:
    """The rate with the lowest mean loss over the tuning seeds; a rate at which any seed diverged is out.

    Args:
        losses: by rate, one per seed, None where the run diverged.

    Raises:
        UserError: every rate diverged.
    """
    grid = tuple(sorted(losses))
    means = [
        math.fsum(math.inf if loss is None else loss for loss in losses[rate]) / len(losses[rate]) for rate in grid
    ]
    best = min(range(len(grid)), key=means.__getitem__)
    if not math.isfinite(means[best]):
        raise UserError(f"{condition} diverged at every learning rate of tune.lr {list(grid)}: add lower ones.")
    return Tuned(
        lr=grid[best],
        edge=best in (0, len(grid) - 1),
        grid=grid,
        losses=tuple(mean if math.isfinite(mean) else None for mean in means),
        seeds=tune.seeds,
    )


def beyond(best: float, grid: Sequence[float]) -> float | None:
    """The rate that follows the best one where that is at an end of the sorted grid, at its neighbour's ratio; else
    None, and of a single rate."""
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    neighbour = grid[1] if best == grid[0] else grid[-2]
    return float(f"{best * best / neighbour:.3g}")


def chosen(
    tune: Tune | None, runs: Mapping[tuple[str, float, int], Run], records: Mapping[str, RunRecord]
) -> dict[str, Tuned]:
    """The choice for every condition, from the records of its tuning runs; none without tuning."""
    if tune is None:
        return {}
    losses: dict[str, dict[float, list[float | None]]] = {}
    for (condition, rate, _), run in runs.items():
        losses.setdefault(condition, {}).setdefault(rate, []).append(records[run.name].validation_loss)
    return {condition: choose(tune, by_rate, condition) for condition, by_rate in losses.items()}
