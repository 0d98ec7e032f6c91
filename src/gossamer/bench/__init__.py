"""Comparing methods: suites, the runner and the report; the time of a step; scoring a model."""

from gossamer.bench.evaluation import Evaluate, evaluate_model
from gossamer.bench.runner import bench
from gossamer.bench.site import write_report
from gossamer.bench.step import StepBench, bench_step, step_table, write_page
from gossamer.bench.suite import SUITES, Bench, Recipe, Suite
from gossamer.bench.table import summary_table

__all__ = [
    "SUITES",
    "Bench",
    "Evaluate",
    "Recipe",
    "StepBench",
    "Suite",
    "bench",
    "bench_step",
    "evaluate_model",
    "step_table",
    "summary_table",
    "write_page",
    "write_report",
]
