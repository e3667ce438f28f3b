"""The parts with parameters: direction, target, gate, expansion, compression, and the residual that joins them."""

from deepdelta.nn.adding import resnet_branch
from deepdelta.nn.backend import Backend, use_backend
from deepdelta.nn.config import ResidualConfig
from deepdelta.nn.interventions import Intervention, intervening
from deepdelta.nn.linear import Linear, RMSNorm, initialise
from deepdelta.nn.recording import Recorder, recording
from deepdelta.nn.replay import Plan, use_memory
from deepdelta.nn.residual import DeltaResidual, RewriteRecord
from deepdelta.nn.stream import DeltaStream

__all__ = [
    "Backend",
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
