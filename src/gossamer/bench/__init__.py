"""Comparing methods: suites, the runner, timing, and the report."""

from gossamer.bench.report import summary_table, write_report
from gossamer.bench.runner import bench
from gossamer.bench.suite import SUITES, Bench, Suite

__all__ = ["SUITES", "Bench", "Suite", "bench", "summary_table", "write_report"]
