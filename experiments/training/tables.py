"""Tables of the room's page: training in low precision, and what it brings back."""

from collections.abc import Callable
from statistics import fmean

from experiments.common.tables import Row, Table

STARTS = {
    "2 bits coded, side": ("2.25 bits, `rate_distortion`, planned", "steps, norms"),
    "2 bits, all": ("2 bits, `learned`", "weights through the rounding, and these"),
    "2 bits, side": ("2 bits, `learned`", "scales, zero points, norms"),
    "four fifths of the neurons, all": (
        "a fifth of the neurons gone",
        "all but the embedding",
    ),
    "half of the weights, all": ("half zero, `alps`", "what is not zero, norms"),
    "rank, all": ("`svd`, 80 %, ranks planned by curvatures", "factors, norms"),
}


def seeds(rows: list[Row]) -> list[Row]:
    """Join the seeds of each start, model and length."""
    joined: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        key = (row["model"], row["row"], row["training_tokens"])
        joined.setdefault(key, []).append(row)
    order = list(STARTS)
    return [
        {"seeds": joined[key], "row": key[1], "model": key[0], "tokens": key[2]}
        for key in sorted(
            joined, key=lambda x: (x[0] != "reference", order.index(x[1]), -x[2])
        )
    ]


def mean(key: str, digits: int, by: float = 1) -> Callable[[Row], str]:
    """Show the mean of the seeds."""
    return lambda row: f"{by * fmean(x[key] for x in row['seeds']):.{digits}f}"


def kl_after(row: Row) -> str:
    """Write the mean of the seeds, and the largest deviation from it."""
    values = [seed["kl_after"] for seed in row["seeds"]]
    center = fmean(values)
    if len(values) == 1:
        return f"{center:.4f}"
    return f"{center:.4f} ({max(abs(x - center) for x in values):.4f})"


TABLES = {
    "recovery": Table(
        "recovery",
        "training.recovery [SmolLM2.gguf text.txt] [--steps N]",
        {
            "model": lambda row: row["model"].partition("-")[0],
            "start": lambda row: STARTS[row["row"]][0],
            "trains": lambda row: STARTS[row["row"]][1],
            "tokens": "{tokens:,}",
            "seeds": lambda row: str(len(row["seeds"])),
            "KL before": mean("kl_before", 3),
            "KL after": kl_after,
            "recovered": lambda row: mean("fraction_recovered", 0, 100)(row) + " %",
            "a million": mean("fraction_per_million_tokens", 1),
            "perplexity before": mean("perplexity_before", 2),
            "after": mean("perplexity_after", 2),
            "float": mean("dense_perplexity", 2),
        },
        seeds,
    ),
    "qlora": Table(
        "qlora",
        "training.qlora [smollm2 docstrings --steps 32 --every 8 --batch 2 "
        "--windows 4]",
        {
            "model": "{model}",
            "text": "{text}",
            "tokens trained on": "{training_tokens:,}",
            "loss": "{loss:.4f}",
            "loss while training": lambda row: (
                "" if row["training_loss"] is None else f"{row['training_loss']:.4f}"
            ),
            "of the float model": "{loss_float:.4f}",
            "numbers that train": "{trained:,}",
            "MiB": "{mebibytes:.1f}",
            "MiB, float": "{mebibytes_float:.1f}",
        },
    ),
    "quantization_aware": Table(
        "quantization_aware",
        "training.quantization_aware --bits N --steps 480",
        {
            "bits": "{bits}",
            "way": "{method}",
            "bits per weight": "{bits_per_weight:.2f}",
            "KL": "{kl:.4f} ± {kl_standard_error:.4f}",
            "bits per byte": "{bits_per_byte:.4f}",
        },
    ),
}
