"""Nearest-code search and code sums: pure functions of tensors, independent of modules."""

from smalto.search.code_sums import USAGE_WINDOW, code_sums
from smalto.search.nearest import Backend, Metric, nearest_codes

__all__ = ["USAGE_WINDOW", "Backend", "Metric", "code_sums", "nearest_codes"]
