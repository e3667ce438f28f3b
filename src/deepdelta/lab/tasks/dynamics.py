"""Next-state prediction of mechanical systems by a deep residual net, its rollouts, its spectrum and its finer steps.

Shapes: N trajectories, T + 1 times, 2 numbers of a system's state, B points, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Len
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.config import Count, Distinct
from deepdelta.errors import UserError, nearest
from deepdelta.lab.tasks.fitting import (
    CONDITIONS,
    DEFAULT_4,
    NORMED,
    AdamW,
    at_best_rate,
    fit,
    part_of,
    seeded,
    stream_of,
    with_norm,
)
from deepdelta.lab.tasks.refinement import can_refine, flowed, refined, spectrum
from deepdelta.lab.tasks.task import Progress, Task, Variant
from deepdelta.lab.tasks.trajectories import SYSTEMS, trajectories
from deepdelta.nn import DeltaResidual, ResidualConfig
from deepdelta.training.config import Positive

SUBSTEPS = (2, 4, 16)
BOUND = 10.0
"""Rollouts are cut off at so many standard deviations, so that one that runs away is far off and not infinite."""
GATES = (0.05, 0.25, 1.0, 1.75)


@dataclass(frozen=True, kw_only=True)
class DynamicsSettings(AdamW):
    """The systems, the sizes of the net and the recipe; a condition changes `residual` and `out_norm` alone.

    One net is trained per system and rate.
    """

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    out_norm: Positive | None = None
    """RMSNorm of what each branch returns, its weight starting at this number; None: no norm."""
    rates: Annotated[tuple[Positive, ...], Distinct, Len(1)] = (2e-3, 5e-3, 1.25e-2)
    """Each net is trained at each of these, in place of `lr`, and the one with the lowest rollout error on trajectories
    of its own counts; where it is at an end of them, one further is tried, at most twice."""
    systems: Annotated[tuple[str, ...], Distinct] = tuple(SYSTEMS)
    """Of pendulum, lotka_volterra and bouncing."""
    depth: Count = 8
    """Residuals."""
    dim: Count = 16
    train_trajectories: Count = 64
    test_trajectories: Count = 64
    length: Count = 60
    """Steps of a trajectory."""
    rollout: Count = 40
    """Steps predicted from a test trajectory's start by the net's own predictions."""
    steps: Count = 1000
    batch_size: Count = 128
    lr: Positive = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for system in self.systems:
            if system not in SYSTEMS:
                raise UserError(f"there is no system '{system}'; {nearest(system, SYSTEMS)}")
        if self.rollout > self.length:
            raise UserError(f"rollout must be at most length, got {self.rollout} and {self.length}.")


class DynamicsNet(nn.Module):
    """From a state to the next: linear map in, `depth` residuals with a hidden layer each, linear map out.

    Nothing but the residual stream carries the state to the end.
    """

    def __init__(self, settings: DynamicsSettings, seed: int) -> None:
        super().__init__()
        dim = settings.dim
        self.inward = nn.Linear(2, dim)
        self.stream = stream_of(settings.residual, dim, seed)
        branches = (
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(settings.depth)
        )
        self.residuals = nn.ModuleList(
            self.stream.wrap(with_norm(branch, nn.RMSNorm(dim), settings.out_norm)) for branch in branches
        )
        self.outward = nn.Linear(dim, 2)

    def forward(self, y: Float[Tensor, "B 2"]) -> Float[Tensor, "B 2"]:
        return self.through(y, _as_trained)

    def through(
        self, y: Float[Tensor, "B 2"], layers: Callable[[list[DeltaResidual], Tensor], Tensor]
    ) -> Float[Tensor, "B 2"]:
        """The prediction, `layers` taking the state through the residuals."""
        state = layers(list(self.residuals), self.stream.expand(self.inward(y)))  # type: ignore[arg-type]
        predicted: Tensor = self.outward(self.stream.reduce(state))
        return predicted


def _as_trained(residuals: list[DeltaResidual], state: Tensor) -> Tensor:
    for residual in residuals:
        state = residual(state)
    return state


class Data(NamedTuple):
    """Standardised by the mean and the standard deviation of the training states."""

    train: Float[Tensor, "N T 2"]
    choice: Float[Tensor, "M T 2"]
    test: Float[Tensor, "M T 2"]


def dynamics_data(settings: DynamicsSettings, system: str, seed: int) -> Data:
    """Trajectories to train on, others to choose a rate by, and others to test on."""
    train, test = settings.train_trajectories, settings.test_trajectories
    every = trajectories(system, train + 2 * test, settings.length, seed)
    states = every[:train].flatten(0, 1)
    every = ((every - states.mean(0)) / states.std(0)).float()
    return Data(*torch.split(every, [train, test, test]))


def run(settings: DynamicsSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Train a net per system, at the rate that does best there, and test it.

    Returns:
        log_rollout: mean over the systems of ln(rollout error).
        Per system, errors being root mean squares in standard deviations of the system's states:
        rollout_SYSTEM: of the net's own predictions over `rollout` steps; one_step_SYSTEM: of the next state;
        eigenvalue_SYSTEM: mean over layers and test states of the shortcuts' special eigenvalue 1 - b;
        negative_SYSTEM: the share of these below 0; complex_SYSTEM: the share of test states at which the product of
        all shortcuts has complex eigenvalues; lr_SYSTEM: the rate that was taken.
        Geometric means over the systems: rollout and one_step; refined_n: the one-step error with every layer in n
        steps of gate / n with k, v and beta held; flow: in infinitely many; followed_n: with k, v and beta asked for
        again at every step.
        Spectra and finer steps where every layer is one rewrite along its branch's unit direction.

    Raises:
        Diverged: at every rate.
    """
    metrics: dict[str, float] = {}
    means: dict[str, list[float]] = {}
    for number, system in enumerate(settings.systems):
        data = dynamics_data(settings, system, seed)
        net, metrics[f"lr_{system}"] = at_best_rate(
            settings.rates,
            partial(_trained, settings, data, seed),
            partial(rollout_error, data.choice, settings.rollout),
            part_of(progress, number, len(settings.systems)),
        )
        found = _tested(settings, net, data)
        for name, value in found.items():
            if name in PER_SYSTEM:
                metrics[f"{name}_{system}"] = value
            if name not in SPECTRAL:
                means.setdefault(name, []).append(value)
    logs = {name: sum(map(math.log, values)) / len(values) for name, values in means.items()}
    return {"log_rollout": logs["rollout"]} | {name: math.exp(value) for name, value in logs.items()} | metrics


SPECTRAL = ("eigenvalue", "negative", "complex")
PER_SYSTEM = ("rollout", "one_step", *SPECTRAL)


def _trained(settings: DynamicsSettings, data: Data, seed: int, rate: float, progress: Progress) -> DynamicsNet:
    generator = Generator().manual_seed(seed)
    now, following = data.train[:, :-1].flatten(0, 1), data.train[:, 1:].flatten(0, 1)
    with seeded(seed):
        net = DynamicsNet(settings, seed)

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(now), (settings.batch_size,), generator=generator)
        return F.mse_loss(net(now[rows]), following[rows])

    fit(net, loss_of, replace(settings, lr=rate), progress)
    return net


@torch.no_grad()
def rollout(net: nn.Module, start: Float[Tensor, "N 2"], steps: int) -> Float[Tensor, "N T 2"]:
    """The net's own predictions, one from the other, cut off at BOUND."""
    states = [start]
    for _ in range(steps):
        states.append(net(states[-1]).clamp(-BOUND, BOUND))
    return torch.stack(states[1:], dim=1)


def rollout_error(states: Float[Tensor, "N T 2"], steps: int, net: nn.Module) -> float:
    """Root mean square error of the net's own predictions from the first of these states on."""
    return _rms(rollout(net, states[:, 0], steps) - states[:, 1 : steps + 1])


@torch.no_grad()
def _tested(settings: DynamicsSettings, net: DynamicsNet, data: Data) -> dict[str, float]:
    now, following = data.test[:, :-1].flatten(0, 1), data.test[:, 1:].flatten(0, 1)

    def error(layers: Callable[[list[DeltaResidual], Tensor], Tensor]) -> float:
        return _rms(net.through(now, layers) - following)

    found = {
        "rollout": rollout_error(data.test, settings.rollout, net),
        "one_step": error(_as_trained),
    }
    config = settings.residual
    if not can_refine(config):
        return found
    for substeps in SUBSTEPS:
        found[f"refined_{substeps}"] = error(_in(substeps, follow=False))
    found["flow"] = error(flowed)
    for substeps in SUBSTEPS:
        found[f"followed_{substeps}"] = error(_in(substeps, follow=True))
    if config.rule == "delta":
        special, product = spectrum(list(net.residuals), net.stream.expand(net.inward(now[::16])))  # type: ignore[arg-type]
        found["eigenvalue"] = special.mean().item()
        found["negative"] = (special < -1e-3).float().mean().item()
        found["complex"] = (product.imag.abs() > 1e-4).any(-1).float().mean().item()
    return found


def _in(substeps: int, *, follow: bool) -> Callable[[list[DeltaResidual], Tensor], Tensor]:
    return lambda residuals, state: refined(residuals, state, substeps, follow=follow)


def _rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


def _gated(gate: float, rule: str = "delta") -> dict[str, Any]:
    return {"residual": {"rule": rule, "value_channels": 1, "gate": "constant", "gate_init": gate}}


TASK = Task(
    settings=DynamicsSettings(),
    conditions=CONDITIONS
    | {
        "normed": NORMED,
        "default-4": DEFAULT_4,
        "held-write-only": Variant(
            summary=f"writes along k and never erases, V = 1, every gate held at {GATES[0]}",
            changes=_gated(GATES[0], "write_only"),
            control=f"gate-{GATES[0]}",
        ),
        # What either half of `held-write-only` gives alone: a norm of the same size at the start, and the product.
        "normed-0.05": Variant(
            summary="h is added after a norm whose weight starts at 0.05", changes={**NORMED.changes, "out_norm": 0.05}
        ),
        "free-write-only": Variant(
            summary="adds h (W c) / sqrt(d), without a norm, V = 1",
            changes={"residual": _gated(1.0, "write_only")["residual"] | {"direction_norm": "free"}},
        ),
    }
    | {
        f"gate-{gate}": Variant(
            summary=f"the delta rule, V = 1, every gate held at {gate}", changes=_gated(gate), control="delta"
        )
        for gate in GATES
    },
    baseline="additive",
    primary="log_rollout",
    unit="ln of the rollout error in standard deviations of the states; a difference d is a ratio exp(d)",
    higher_is_better=False,
    run=run,
    refuted="the interval of gate-0.05 to the plain residual, or of held-write-only to it, holds 0",
    replaced={"lr": "rates"},
)
