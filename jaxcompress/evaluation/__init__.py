"""Evaluation: what compression costs in quality, on text or any batches."""

from jaxcompress.evaluation.batches import evaluate, per_example, totals
from jaxcompress.evaluation.language import (
    Apply,
    LanguageModelMetrics,
    Report,
    Score,
    compare,
    divergence,
    perplexity,
    windows,
)

__all__ = [
    "Apply",
    "LanguageModelMetrics",
    "Report",
    "Score",
    "compare",
    "divergence",
    "evaluate",
    "per_example",
    "perplexity",
    "totals",
    "windows",
]
