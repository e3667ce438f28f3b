"""Delta residuals for PyTorch: X' = X + beta k (v^T - k^T X) in place of x + F(x)."""

from deepdelta import interruption as interruption  # first, for what importing the others takes

# isort: split
from deepdelta import interop, ops
from deepdelta.decoding import generate, generate_batch
from deepdelta.device import keep_freed_memory
from deepdelta.errors import UserError
from deepdelta.explorer import explore
from deepdelta.models import GPT, GPTConfig
from deepdelta.nn import (
    DeltaResidual,
    DeltaStream,
    Intervention,
    ResidualConfig,
    RewriteRecord,
    intervening,
    recording,
    use_backend,
    use_memory,
)
from deepdelta.nn.presets import PRESETS
from deepdelta.operator import DeltaOperator
from deepdelta.retrofitting import (
    RetrofitConfig,
    RetrofitReport,
    load_retrofit,
    retrofit,
    retrofitted,
    save_retrofit,
    undo_retrofit,
)
from deepdelta.training import TrainConfig, load, param_groups, train
from deepdelta.version import __version__

__all__ = [
    "GPT",
    "PRESETS",
    "DeltaOperator",
    "DeltaResidual",
    "DeltaStream",
    "GPTConfig",
    "Intervention",
    "ResidualConfig",
    "RetrofitConfig",
    "RetrofitReport",
    "RewriteRecord",
    "TrainConfig",
    "UserError",
    "__version__",
    "explore",
    "generate",
    "generate_batch",
    "interop",
    "intervening",
    "keep_freed_memory",
    "load",
    "load_retrofit",
    "ops",
    "param_groups",
    "recording",
    "retrofit",
    "retrofitted",
    "save_retrofit",
    "train",
    "undo_retrofit",
    "use_backend",
    "use_memory",
]
