"""The parts with parameters: direction, target, gate, expansion, compression, and the residual that joins them."""

from deepdelta.nn.activation_memory import Plan
from deepdelta.nn.adding import resnet_branch
from deepdelta.nn.backend import Backend
from deepdelta.nn.chain import Chain
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.inspection import Intervention, Recorder, intervening, recording
from deepdelta.nn.linear import Linear, RMSNorm, initialise
from deepdelta.nn.residual import DeltaResidual
from deepdelta.nn.rewriting import RewriteRecord
from deepdelta.nn.runtime import use_backend, use_memory
from deepdelta.nn.stream import DeltaStream

__all__ = [
    "Backend",
    "Chain",
    "DeltaResidual",
    "DeltaStream",
    "Intervention",
    "Linear",
    "Plan",
    "RMSNorm",
    "Recorder",
    "ResidualConfig",
    "RewriteRecord",
    "initialise",
    "intervening",
    "recording",
    "resnet_branch",
    "use_backend",
    "use_memory",
]
