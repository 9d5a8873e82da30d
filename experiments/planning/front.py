"""Draw the rows of `pareto`: size against divergence, a line for each method.

python -m experiments.planning.front   # writes front.png next to the room's page
"""

from pathlib import Path
from typing import Any

from experiments.common.tables import Row, read_rows
from jaxcompress import plots
from jaxcompress.evaluation.sweep import Point

ROOM = Path(__file__).parent
ROWS = ROOM / "results" / "pareto.jsonl"
PICTURE = ROOM / "front.png"
TEXT = "heldout"


def points(rows: list[Row]) -> list[Point]:
    """Make points of the rows that have a divergence on the held-out text."""
    return [
        Point(
            name=f"{row['group']}, {row['setting']}",
            file_bytes=row["file_bytes"],
            bits_per_weight=float("nan"),
            kl=row["kl"],
            kl_standard_error=row["kl_standard_error"],
            perplexity=float("nan"),
            perplexity_before=float("nan"),
            group=row["group"],
        )
        for row in rows
        if row["text"] == TEXT and row["kl"] is not None  # of the reference model
    ]


def draw() -> Any:
    """Draw the picture of all stored rows."""
    title = "Reference model, held-out code: methods alone and combined"
    return plots.size_quality(points(read_rows(ROWS)), title=title)


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=110)
