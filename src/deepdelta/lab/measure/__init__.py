"""What a model does and what it costs: operations, memory, speed, and the rewrites of a trained one."""

from deepdelta.lab.measure.cost import Cost, measure_costs
from deepdelta.lab.measure.flops import Flops, Work, training_flops_per_token
from deepdelta.lab.measure.memory import peak_bytes
from deepdelta.lab.measure.rewrites import RewriteTotals, rewrite_totals

__all__ = [
    "Cost",
    "Flops",
    "RewriteTotals",
    "Work",
    "measure_costs",
    "peak_bytes",
    "rewrite_totals",
    "training_flops_per_token",
]
