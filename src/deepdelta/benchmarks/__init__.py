"""What is timed, how, and against whom: `deepdelta bench`."""

from deepdelta.benchmarks.results import BenchResults, load_results
from deepdelta.benchmarks.runner import run_suite
from deepdelta.benchmarks.suites import SUITES, load_suite

__all__ = ["SUITES", "BenchResults", "load_results", "load_suite", "run_suite"]
