"""What is timed, how, and against whom: `deepdelta bench`."""

from deepdelta.lab.bench.depth import run_depth
from deepdelta.lab.bench.gradients import run_gradients
from deepdelta.lab.bench.results import BenchResults, load_results
from deepdelta.lab.bench.runner import redraw, run_suite
from deepdelta.lab.bench.suites import DEPTH, GRADIENTS, QUESTIONS, SUITES, load_suite

__all__ = [
    "DEPTH",
    "GRADIENTS",
    "QUESTIONS",
    "SUITES",
    "BenchResults",
    "load_results",
    "load_suite",
    "redraw",
    "run_depth",
    "run_gradients",
    "run_suite",
]
