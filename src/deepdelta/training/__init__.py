"""Training: loop, parameter groups, run directories, evaluation."""

from deepdelta.training.config import TrainConfig
from deepdelta.training.evaluation import Evaluation, evaluate
from deepdelta.training.imported import import_published
from deepdelta.training.loading import Loaded, load
from deepdelta.training.loop import train
from deepdelta.training.optimizer import param_groups
from deepdelta.training.rundir import RunDirectory
from deepdelta.training.trainer import Trained

__all__ = [
    "Evaluation",
    "Loaded",
    "RunDirectory",
    "TrainConfig",
    "Trained",
    "evaluate",
    "import_published",
    "load",
    "param_groups",
    "train",
]
