"""The run report: one HTML file that needs nothing else."""

from smalto.report.page import Example, write_report

__all__ = ["Example", "write_report"]
