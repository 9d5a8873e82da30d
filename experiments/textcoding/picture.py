"""Draw the rows of `rates`: bits per byte against speed, a bubble's area by weights.

python -m experiments.textcoding.picture   # writes rates.png next to the room's page
"""

from pathlib import Path
from typing import Any

from experiments.common.tables import Row, last, read_rows

ROOM = Path(__file__).parent
ROWS = ROOM / "results" / "rates.jsonl"
PICTURE = ROOM / "rates.png"
NAMES = {"student.safetensors": "student", "reference": "reference"}
BLUE, GREY, INK = "#0072B2", "#999999", "#222222"


def draw(rows: list[Row]) -> Any:
    """Draw the latest row of each coder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in last(rows, "model", "coder", "mix"):
        speed = row["bytes"] / row["encode_seconds"] / 1000
        height, area, color = row["bits_per_byte"], 40.0, GREY
        label = row.get("coder", "")
        if not label:
            mixed = ", mixer" if row["mix"] else ""
            label = f"{NAMES[row['model']]}, {row['weights'] / 1e6:.1f} M{mixed}"
            area, color = area + 40 * row["weights"] / 1e6, BLUE
        axes.scatter(speed, height, s=area, color=color)
        axes.annotate(
            label,
            (speed, height),
            xytext=(12, 2),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_xscale("log")
    axes.set_xlabel("encoded, KB a second on two processors")
    axes.set_ylabel("bits per byte, model not counted")
    axes.set_title("Python that no model has seen, 30 720 bytes")
    axes.margins(0.2, 0.15)
    axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    draw(read_rows(ROWS)).savefig(PICTURE, dpi=110)
