"""Table of the room's page: planned bits against equal ones."""

import itertools
import math

from experiments.common.tables import Cell, Row, Table, spread

NAMES = {"uniform": "{} everywhere", "planned": "planned by noise"}


def chosen(row: Row) -> str:
    """Count the layers at each width."""
    counts = row["wikitext2-valid"]["chosen"]
    if len(counts) == 1:
        return ""
    return ", ".join(f"{b}: {counts[b]}" for b in sorted(counts)) + " layers"


def by_rate(rows: list[Row]) -> list[Row]:
    """Join the texts; plans of the same bytes follow each other."""
    joined = spread(rows, "text", "bits", "rate")
    return sorted(joined, key=lambda row: -row["rate"])


FRONT = "rate_distortion, planned"
NEAR = 0.01  # of the smallest file of the front, in logarithms


def pareto(rows: list[Row]) -> list[Row]:
    """Join the texts; larger files first. `factor` is KL over that of planned rates."""
    joined = spread(rows, "text", "group", "setting")
    front = sorted(
        (math.log(row["heldout"]["file_bytes"]), math.log(row["heldout"]["kl"]))
        for row in joined
        if row["group"] == FRONT
    )
    for row in joined:
        row["factor"] = ""
        kl, at = row["heldout"]["kl"], math.log(row["heldout"]["file_bytes"])
        if kl is not None and front[0][0] - NEAR <= at <= front[-1][0]:
            row["factor"] = f"{kl / math.exp(interpolated(front, at)):.2f}"
    return sorted(joined, key=lambda row: -row["heldout"]["file_bytes"])


def interpolated(points: list[tuple[float, float]], at: float) -> float:
    """Interpolate linearly between sorted points."""
    for (x, y), (later, after) in itertools.pairwise(points):
        if at <= later:
            return y + (after - y) * (at - x) / (later - x)
    return points[-1][1]


def kl(text: str) -> Cell:
    """Write a divergence and its standard error, where there is one."""

    def write(row: Row) -> str:
        if row[text]["kl"] is None:
            return ""
        return f"{row[text]['kl']:.4f} ± {row[text]['kl_standard_error']:.4f}"

    return write


TABLES = {
    "pareto": Table(
        "pareto",
        "planning.pareto --also docstrings,plays",
        {
            "method": "{group}",
            "setting": "{setting}",
            "file, bytes": "{heldout[file_bytes]:,}",
            "KL, held-out code": kl("heldout"),
            "docstrings": kl("docstrings"),
            "plays": kl("plays"),
            "bits per byte, held-out code": "{heldout[bits_per_byte]:.4f}",
            "KL over planned rates'": "{factor}",
        },
        pareto,
        files=3,
    ),
    "planned_bits": Table(
        "planned_bits",
        "planning.planned_bits SmolLM2.gguf text.txt [--curvatures]",
        {
            "bits": lambda row: NAMES.get(row["bits"], row["bits"]).format(row["rate"]),
            "kernels, bytes": "{wikitext2-valid[kernel_bytes]:,}",
            "chosen": chosen,
            "KL, WikiText-2": "{wikitext2-valid[kl]:.3f} ± "
            "{wikitext2-valid[kl_standard_error]:.3f}",
            "perplexity": "{wikitext2-valid[perplexity]:.1f}",
            "KL, docstrings": "{docstrings[kl]:.3f} ± "
            "{docstrings[kl_standard_error]:.3f}",
            "perplexity ": "{docstrings[perplexity]:.1f}",
        },
        by_rate,
    ),
}
