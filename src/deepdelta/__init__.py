"""Delta residuals for PyTorch: X' = X + beta k (v^T - k^T X) in place of x + F(x)."""

from deepdelta import interop, ops
from deepdelta.errors import UserError
from deepdelta.models import GPT, GPTConfig, generate
from deepdelta.nn import DeltaResidual, DeltaStream, ResidualConfig, RewriteRecord, recording, use_backend, use_memory
from deepdelta.nn.presets import PRESETS
from deepdelta.operator import DeltaOperator
from deepdelta.training import TrainConfig, load, param_groups, train
from deepdelta.version import __version__

__all__ = [
    "GPT",
    "PRESETS",
    "DeltaOperator",
    "DeltaResidual",
    "DeltaStream",
    "GPTConfig",
    "ResidualConfig",
    "RewriteRecord",
    "TrainConfig",
    "UserError",
    "__version__",
    "generate",
    "interop",
    "load",
    "ops",
    "param_groups",
    "recording",
    "train",
    "use_backend",
    "use_memory",
]
