"""Comparing methods: suites, the runner and the report; the time of a step; scoring a model."""

from gossamer.bench.claim import Claim, Follow, Order, Run, Sweep, Table
from gossamer.bench.evaluation import Evaluate, evaluate_model
from gossamer.bench.recipes import Recipe, presets
from gossamer.bench.reproduce import Reproduce, reproduce
from gossamer.bench.runner import bench
from gossamer.bench.site import write_report
from gossamer.bench.step import StepBench, bench_step, step_table, write_page
from gossamer.bench.study import Search
from gossamer.bench.suite import SUITES, Bench, Suite
from gossamer.bench.sweep import search, trials_table
from gossamer.bench.table import summary_table

__all__ = [
    "SUITES",
    "Bench",
    "Claim",
    "Evaluate",
    "Follow",
    "Order",
    "Recipe",
    "Reproduce",
    "Run",
    "Search",
    "StepBench",
    "Suite",
    "Sweep",
    "Table",
    "bench",
    "bench_step",
    "evaluate_model",
    "presets",
    "reproduce",
    "search",
    "step_table",
    "summary_table",
    "trials_table",
    "write_page",
    "write_report",
]
