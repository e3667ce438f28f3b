"""The dynamics task: trajectories against closed forms, finer steps against dense formulas, errors, and learning."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from deepdelta import DeltaStream, UserError
from deepdelta.lab.tasks import dynamics, load_task
from deepdelta.lab.tasks.dynamics import DynamicsNet, DynamicsSettings, dynamics_data, rollout
from deepdelta.lab.tasks.refinement import flowed, refined, rewriting, spectrum
from deepdelta.lab.tasks.trajectories import RESTITUTION, SYSTEMS, trajectories
from helpers import near, outer, perturb, randn

TASK = load_task("dynamics")
TINY = {
    "rates": [5e-3],
    "depth": 2,
    "dim": 4,
    "steps": 3,
    "train_trajectories": 3,
    "test_trajectories": 2,
    "length": 4,
    "rollout": 3,
}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


# Trajectories


def height_and_velocity(height: float, velocity: float, time: float) -> tuple[float, float]:
    """The ball by its parabolas, one flight after the other: gravity 1, 0.9 of the speed kept."""
    while True:
        until_floor = velocity + math.sqrt(velocity**2 + 2 * height)
        if time <= until_floor:
            return height + velocity * time - time**2 / 2, velocity - time
        height, velocity, time = 0.0, 0.9 * (until_floor - velocity), time - until_floor


def test_the_ball_flies_in_parabolas():
    found = trajectories("bouncing", 20, 60, seed=1)
    assert found.shape == (20, 61, 2)
    turned = 0
    for path in found.tolist():
        expected = [height_and_velocity(*path[0], 0.1 * i) for i in range(61)]
        np.testing.assert_allclose(path, expected, atol=1e-5)
        turned += sum(b[1] - a[1] > 0.5 for a, b in itertools.pairwise(path))
    assert turned > 20


def test_a_ball_bounces_ever_lower_and_comes_to_rest():
    found = trajectories("bouncing", 4, 500, seed=0)
    assert found.shape == (4, 501, 2) and found.isfinite().all() and found[..., 0].min() > -1e-8
    energy = found[..., 0] + found[..., 1].square() / 2
    assert (energy.diff(dim=1) < 1e-6).all()
    assert found[:, -1].abs().max() == 0 and (energy[:, 0] > 0.5).all()
    # The time of a flight is twice the speed of its start: the last bounce comes after a geometric series of them.
    for path in found.tolist():
        fall = path[0][1] + math.sqrt(path[0][1] ** 2 + 2 * path[0][0])
        speed = RESTITUTION * (fall - path[0][1])
        rest = fall + 2 * speed / (1 - RESTITUTION)
        moving = sum(height > 0 for height, _ in path)
        assert abs(moving * 0.1 - rest) < 0.1 + 1e-2


def test_prey_and_predators_keep_their_integral():
    x, y = trajectories("lotka_volterra", 5, 80, seed=2).unbind(-1)
    integral = x - x.log() + 4 / 3 * y - 2 / 3 * y.log()
    near(integral, integral[:, :1].expand_as(integral), 1e-5)
    assert (x.amax(1) / x.amin(1)).min() > 1.2


def test_the_pendulum_against_small_steps_of_runge_and_kutta():
    found = trajectories("pendulum", 3, 20, seed=3).numpy()

    def flow(y):
        return np.stack([y[:, 1], -np.sin(y[:, 0]) - 0.1 * y[:, 1]], axis=-1)

    y, step = found[:, 0], 0.25 / 50
    for i in range(20):
        np.testing.assert_allclose(found[:, i], y, atol=1e-6)
        for _ in range(50):
            a = flow(y)
            b = flow(y + step / 2 * a)
            c = flow(y + step / 2 * b)
            y = y + step / 6 * (a + 2 * b + 2 * c + flow(y + step * c))


def test_trajectories_are_of_their_seed_and_standardised():
    settings = DynamicsSettings(train_trajectories=7, test_trajectories=5)
    data = dynamics_data(settings, "pendulum", 5)
    assert data.train.shape == (7, 61, 2) and data.choice.shape == data.test.shape == (5, 61, 2)
    states = data.train.flatten(0, 1)
    near(states.mean(0), torch.zeros(2), 1e-5)
    near(states.std(0), torch.ones(2), 1e-5)
    assert data.train.equal(dynamics_data(settings, "pendulum", 5).train)
    assert not data.train.equal(dynamics_data(settings, "pendulum", 6).train)


# Finer steps


def layers(count: int = 3, dim: int = 5, **options) -> tuple[list, torch.Tensor]:
    """Residuals away from their start, in fp64, and states for them."""
    stream = DeltaStream(dim, seed=0, **{"rule": "delta"} | options)
    residuals = []
    for i in range(count):
        branch = nn.Linear(dim, dim)
        nn.init.normal_(branch.weight, generator=torch.Generator().manual_seed(i))
        residuals.append(stream.wrap(branch).double())
        perturb(residuals[-1], seed=i)
    return residuals, randn(4, stream.config.value_channels, dim)


def through(residuals: list, state: torch.Tensor) -> torch.Tensor:
    for residual in residuals:
        state = residual(state)
    return state


RULES = [
    {"rule": "delta", "value_channels": 1},
    {"rule": "delta", "value_channels": 3},
    {"rule": "delta", "value_channels": 2, "gate_per_channel": True},
    {"rule": "write_only", "value_channels": 2},
    {"rule": "erase_only", "value_channels": 2},
    {"rule": "additive", "value_channels": 1},
]


@pytest.mark.parametrize("options", RULES, ids=str)
@torch.no_grad()
def test_one_substep_is_the_layer_itself(options):
    residuals, state = layers(**options)
    expected = through(residuals, state)
    for follow in (False, True):
        near(refined(residuals, state, 1, follow=follow), expected, 1e-12)
    assert (expected - state).abs().max() > 0.1


@pytest.mark.parametrize("gate", [0.0, 0.1, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("substeps", [2, 5])
@torch.no_grad()
def test_held_substeps_shrink_the_error_by_the_power(gate, substeps):
    """(1 - beta / n)^n of the error along k is left; across k nothing moves; the flow leaves exp(-beta)."""
    residuals, state = layers(1, rule="delta", value_channels=2, gate="constant", gate_init=gate)
    now = rewriting(residuals[0], state)
    k = now.direction
    near(k.norm(dim=-1), torch.ones(4, dtype=torch.float64), 1e-8)
    after = refined(residuals, state, substeps)
    flown = flowed(residuals, state)
    across = torch.eye(5, dtype=torch.float64) - outer(k, k)
    for moved, left in ((after, (1 - gate / substeps) ** substeps), (flown, math.exp(-gate))):
        near((moved - state) @ across, torch.zeros_like(state), 1e-9)
        read, before = (torch.einsum("bvd,bd->bv", x, k) for x in (moved, state))
        target = torch.zeros_like(read) if gate == 0 else now.write / gate
        near(read - target, left * (before - target), 1e-8)


@torch.no_grad()
def test_the_flow_is_the_limit_of_held_substeps():
    residuals, state = layers(rule="delta", value_channels=2)
    limit = flowed(residuals, state)
    errors = [(refined(residuals, state, n) - limit).abs().max().item() for n in (1, 8, 64, 512)]
    assert errors[1] > 2 * errors[2] > 4 * errors[3] > 0 and errors[0] > errors[1] and errors[3] < 0.01


@torch.no_grad()
def test_followed_substeps_ask_the_layer_again():
    residuals, state = layers(1, rule="additive", value_channels=1)
    near(refined(residuals, state, 4), residuals[0](state), 1e-12)
    expected = state
    for _ in range(4):
        expected = expected + (residuals[0](expected) - expected) / 4
    near(refined(residuals, state, 4, follow=True), expected, 1e-12)
    assert (expected - residuals[0](state)).abs().max() > 1e-3


@torch.no_grad()
def test_the_spectrum_is_that_of_the_dense_product():
    residuals, state = layers(rule="delta", value_channels=2)
    found = spectrum(residuals, state)
    product, x = torch.eye(5, dtype=torch.float64).expand(4, 5, 5), state
    for i, residual in enumerate(residuals):
        now = rewriting(residual, x)
        beta = now.erase[:, 0]
        near(found.special[:, i], 1 - beta, 1e-8)
        product = (
            torch.eye(5, dtype=torch.float64) - beta[:, None, None] * outer(now.direction, now.direction)
        ) @ product
        x = residual(x)
    expected = np.linalg.eigvals(product.numpy())
    np.testing.assert_allclose(_sorted(found.product.numpy()), _sorted(expected), atol=1e-8)


def _sorted(eigenvalues: np.ndarray) -> np.ndarray:
    return np.sort_complex(np.round(eigenvalues, 9))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "two_gate"},
        {"rule": "additive", "value_channels": 2},
        {"direction_norm": "bounded"},
        {"rank": 2},
        {"rule": "additive", "value_channels": 1, "compression": "token"},
    ],
    ids=str,
)
def test_other_residuals_are_no_step_of_the_equation(options):
    residuals, state = layers(1, **options)
    with pytest.raises(UserError, match="depth equation"):
        rewriting(residuals[0], state.expand(-1, residuals[0].config.value_channels, -1))


# The task


def test_nets_that_are_no_step_of_the_equation_are_measured_without_it():
    settings = TASK.settings_of("delta", TINY | {"systems": ["pendulum"], "residual": {"rank": 2}})
    assert set(TASK.run(settings, 0, quiet)) == {
        "log_rollout", "rollout", "one_step", "rollout_pendulum", "one_step_pendulum", "lr_pendulum"
    }  # fmt: skip


def test_rollouts_feed_on_themselves_and_are_cut_off():
    net = nn.Linear(2, 2, bias=False)
    nn.init.eye_(net.weight)
    net.weight.data *= 3
    found = rollout(net, torch.tensor([[1.0, -0.01]]), 4)
    near(found, torch.tensor([[[3.0, -0.03], [9.0, -0.09], [10.0, -0.27], [10.0, -0.81]]]), 1e-6)


@pytest.mark.parametrize("condition", TASK.conditions)
def test_every_condition_runs_and_says_its_progress(condition):
    steps: list[tuple[int, int]] = []
    metrics = TASK.run(TASK.settings_of(condition, TINY), 3, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 9) for i in range(1, 10)]
    assert all(map(math.isfinite, metrics.values()))
    assert math.isclose(metrics["rollout"] ** 3, math.prod(metrics[f"rollout_{system}"] for system in SYSTEMS))
    assert math.isclose(math.exp(metrics["log_rollout"]), metrics["rollout"])
    erases = TASK.conditions[condition].changes["residual"]["rule"] == "delta"
    assert ("eigenvalue_pendulum" in metrics) == erases
    if condition in ("default-4", "free-write-only"):
        assert not {"flow", "refined_2"} & set(metrics)  # no step of the equation along a unit k
    elif not erases:
        assert math.isclose(metrics["flow"], metrics["one_step"], rel_tol=1e-4)
    elif condition.startswith("gate-"):
        assert abs(metrics["eigenvalue_bouncing"] - (1 - float(condition[5:]))) < 1e-3


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    settings = TASK.settings_of("delta-4", TINY | {"systems": ["bouncing"]})
    before = torch.random.get_rng_state()
    first, again, other = (TASK.run(settings, seed, quiet) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.random.get_rng_state().equal(before)


def test_a_small_net_learns_the_pendulum():
    settings = TASK.settings_of(
        "delta",
        {
            "systems": ["pendulum"],
            "rates": [5e-3],
            "depth": 3,
            "steps": 200,
            "train_trajectories": 16,
            "test_trajectories": 16,
        },
    )
    found = TASK.run(settings, 100, quiet)
    test = dynamics_data(settings, "pendulum", 100).test
    standing_still = (test[:, 1:] - test[:, :-1]).square().mean().sqrt().item()
    assert found["one_step"] < standing_still / 3
    assert found["rollout"] < 0.8


def test_the_rate_is_the_one_with_the_lowest_error_on_trajectories_of_its_own(monkeypatch):
    """Not on those that it is tested on."""
    trained, fit = [], dynamics.fit

    def keeping(net, loss, recipe, progress):
        trained.append((recipe.lr, net))
        fit(net, loss, recipe, progress)

    monkeypatch.setattr(dynamics, "fit", keeping)
    settings = TASK.settings_of("normed", TINY | {"systems": ["bouncing"], "rates": [1e-4, 3e-3, 1e-1]})
    found = TASK.run(settings, 1, quiet)
    data = dynamics_data(settings, "bouncing", 1)

    def error(net, states):
        with torch.no_grad():
            paths = [states[:, 0]]
            for _ in range(3):
                paths.append(net(paths[-1]).clamp(-10, 10))
        return (torch.stack(paths[1:], 1) - states[:, 1:4]).square().mean().sqrt().item()

    assert not data.choice.equal(data.test)
    rate, net = min(trained, key=lambda pair: error(pair[1], data.choice))
    assert [lr for lr, _ in trained][:3] == [1e-4, 3e-3, 1e-1] and found["lr_bouncing"] == rate
    assert found["rollout_bouncing"] == pytest.approx(error(net, data.test))
    # The norm of what a branch returns is there.
    assert isinstance(net.residuals[0].branch[-1], nn.RMSNorm)


def test_nets_of_all_conditions_share_their_start():
    one, other = (DynamicsNet(TASK.settings_of(name, TINY), 5).state_dict() for name in ("additive", "delta-4"))
    assert set(one) < set(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ["pendulum", "double_pendulum"]}, "did you mean 'pendulum'"),
        ({"systems": []}, "at least one"),
        ({"systems": ["bouncing", "bouncing"]}, "systems must be different values"),
        ({"rollout": 61}, "at most length"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"rollouts": 3}, "did you mean 'rollout'"),
        ({"residual": {"direction_norm": "units"}}, "'unit', 'operator', 'bounded' or 'free', got 'units'"),
    ],
    ids=str,
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=message):
        TASK.settings_of("gate-1.0", changes)


def test_an_unknown_system():
    with pytest.raises(UserError, match="did you mean 'bouncing'"):
        trajectories("bounce", 1, 1, 0)
