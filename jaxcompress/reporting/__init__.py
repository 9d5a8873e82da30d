"""Measured numbers as tables and JSON lines; progress that people can read."""

from jaxcompress.reporting.tables import (
    Size,
    append_lines,
    brief,
    clock,
    comparison_lines,
    grouped,
    leaf_table,
    measure,
    peak_memory,
    plain,
    render,
    table,
    track,
    weight_count,
)

__all__ = [
    "Size",
    "append_lines",
    "brief",
    "clock",
    "comparison_lines",
    "grouped",
    "leaf_table",
    "measure",
    "peak_memory",
    "plain",
    "render",
    "table",
    "track",
    "weight_count",
]
