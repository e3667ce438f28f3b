"""What the conditions of a study cost, measured once and kept beside its records."""

from dataclasses import dataclass, replace
from pathlib import Path

from deepdelta.config import Plain, from_plain, to_plain
from deepdelta.files import read_object, write_json
from deepdelta.lab.experiments.config import StudyConfig
from deepdelta.lab.measure.cost import Cost, measure_costs
from deepdelta.progress import reporting
from deepdelta.training import TrainConfig

COSTLY = tuple("model batch_size accumulate device precision backend memory recompute compile threads".split())
"""Settings that decide what a training step costs."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What conditions cost, and the settings that each had when that was measured."""

    baseline: str
    made_of: dict[str, Plain]
    costs: dict[str, Cost]


def measure(config: StudyConfig, vocab_size: int, file: Path) -> dict[str, Cost]:
    """The costs of every condition, each measured once in turns with the baseline and then kept in `file`.

    Budgets of equal time rest on these numbers, so what was measured stays as it was when conditions are added; it is
    measured anew where a condition is another one now, and all of it where the baseline is.
    """
    plans = {name: config.train_config(name, config.seeds[0]) for name in config.conditions}
    made_of = {name: _made_of(plan, vocab_size) for name, plan in plans.items()}
    known: dict[str, Cost] = {}
    if file.exists():
        there = from_plain(Costs, read_object(file, "delete it to measure costs again"), where=str(file))
        # A setting that came later has its default there.
        then = {name: _made_of(from_plain(TrainConfig, one), vocab_size) for name, one in there.made_of.items()}
        if there.baseline == config.baseline and then.get(there.baseline) == made_of[config.baseline]:
            made_of = then | made_of
            known = {name: cost for name, cost in there.costs.items() if then.get(name) == made_of.get(name)}
    if missing := [name for name in config.conditions if name not in known]:
        settings = {
            name: replace(plans[name], threads=plans[name].threads or 1)
            for name in dict.fromkeys((config.baseline, *missing))
        }
        with reporting("Costs", config.cost_rounds) as reporter:
            measured = measure_costs(
                settings,
                vocab_size=vocab_size,
                rounds=config.cost_rounds,
                baseline=config.baseline,
                progress=lambda done, total: reporter.update(done, "rounds of training steps, all conditions in turn"),
            )
        known = measured | known
        write_json(file, to_plain(Costs(baseline=config.baseline, made_of=made_of, costs=known)))
    return {name: known[name] for name in config.conditions}


def _made_of(plan: TrainConfig, vocab_size: int) -> Plain:
    """What decides the cost of a training step."""
    plain = {key: value for key, value in to_plain(plan).items() if key in COSTLY}
    plain["model"]["vocab_size"] = plain["model"]["vocab_size"] or vocab_size
    return plain
