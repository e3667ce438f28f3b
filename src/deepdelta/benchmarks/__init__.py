"""What is timed, how, and against whom: `deepdelta bench`."""

from deepdelta.benchmarks.gradients import run_gradients
from deepdelta.benchmarks.results import BenchResults, load_results
from deepdelta.benchmarks.runner import run_suite
from deepdelta.benchmarks.suites import GRADIENTS, SUITES, load_suite

__all__ = ["GRADIENTS", "SUITES", "BenchResults", "load_results", "load_suite", "run_gradients", "run_suite"]
