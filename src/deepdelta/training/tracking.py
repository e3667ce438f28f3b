"""Rows of metrics.jsonl as they are written, for TensorBoard and Weights & Biases too."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from deepdelta.config import to_plain
from deepdelta.errors import UserError, nearest, require
from deepdelta.files import AnyPath
from deepdelta.training.config import TrainConfig

Kind = Literal["tensorboard", "wandb"]
Take = Callable[[Mapping[str, Any]], None]


@contextmanager
def tracking(kinds: Sequence[Kind], run: AnyPath, config: TrainConfig) -> Iterator[Take | None]:
    """What `train(..., on_row=...)` takes, so that these kinds of trackers get every row; None for no kinds.

        with tracking(["tensorboard"], "runs/first", config) as on_row:
            train(config, "runs/first", on_row=on_row)

    Files lie in the run directory: `tensorboard/`, and `wandb/`, which stays offline unless WANDB_MODE says otherwise
    (`wandb sync` sends it later).

    Raises:
        UserError: another kind, or the extra `track` is missing.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    for kind in kinds:
        if kind not in makers:
            raise UserError(f"there is no tracker '{kind}'; {nearest(kind, get_args(Kind))}")
        require("Trackers", "track", kind)
    with ExitStack() as stack:
        takes: list[Take] = []

        def on_row(row: Mapping[str, Any]) -> None:
            if not takes:  # not earlier: a run that is refused leaves nothing
                takes.extend(makers[kind](stack, Path(run), config, row["step"]) for kind in dict.fromkeys(kinds))
            for take in takes:
                take(row)

        yield on_row if kinds else None


def _tensorboard(stack: ExitStack, run: Path, config: TrainConfig, first: int) -> Take:
    from torch.utils.tensorboard import SummaryWriter

    # What was recorded after the checkpoint that the run goes on from is recorded anew.
    writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=first)
    stack.callback(writer.close)

    def take(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return take


def _wandb(stack: ExitStack, run: Path, config: TrainConfig, first: int) -> Take:
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    held: Any = wandb.init(
        project="deepdelta", name=run.name, dir=str(run), mode=mode, config=to_plain(config), settings={"silent": True}
    )
    stack.callback(held.finish)

    def take(row: Mapping[str, Any]) -> None:
        held.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return take
