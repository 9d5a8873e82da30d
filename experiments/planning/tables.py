"""Table of the room's page: planned bits against equal ones."""

from experiments.common.tables import Row, Table, spread

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


TABLES = {
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
