"""Comparing methods: suites, the runner, timing, and the report."""

from gossamer.bench.report import write_report
from gossamer.bench.runner import bench
from gossamer.bench.suite import SUITES, Bench, Recipe, Suite
from gossamer.bench.table import summary_table

__all__ = ["SUITES", "Bench", "Recipe", "Suite", "bench", "summary_table", "write_report"]
