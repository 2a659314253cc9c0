"""Run report: one self-contained HTML file."""

from smalto.report.page import Example, RunReport, write_report

__all__ = ["Example", "RunReport", "write_report"]
