"""Measured numbers as tables and JSON lines; progress that people can read."""

from jaxcompress.memory import peak_memory
from jaxcompress.progress import clock, track
from jaxcompress.reporting.leaves import LeafTable, explain, report
from jaxcompress.reporting.tables import (
    Size,
    append_lines,
    brief,
    comparison_lines,
    grouped,
    leaf_table,
    measure,
    plain,
    render,
    table,
    weight_count,
)

__all__ = [
    "LeafTable",
    "Size",
    "append_lines",
    "brief",
    "clock",
    "comparison_lines",
    "explain",
    "grouped",
    "leaf_table",
    "measure",
    "peak_memory",
    "plain",
    "render",
    "report",
    "table",
    "track",
    "weight_count",
]
