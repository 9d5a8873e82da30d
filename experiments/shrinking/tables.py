"""Tables of the room's page: one call at several sizes, and what its stages took."""

from experiments.common.tables import Row, Table, last, spread

CALIBRATIONS = {
    "own": "the model's own",
    "text": "WikiText-2",
    "mixture": "three kinds",
    "none": "none",
}


def by_size(rows: list[Row]) -> list[Row]:
    """Join the texts; the latest of equal runs, larger files first."""
    kept = last(rows, "model", "size", "effort", "calibration", "seed", "text")
    smollm2 = [row for row in kept if row["model"].startswith("SmolLM2")]
    joined = spread(smollm2, "text", "size", "effort", "calibration", "seed")
    return sorted(joined, key=lambda row: -row["wikitext2-valid"]["file_bytes"])


def planned(rows: list[Row]) -> list[Row]:
    """Return the runs that measured a plan and equal rates."""
    runs = [row["wikitext2-valid"] for row in by_size(rows)]
    return [run for run in runs if {"plan", "uniform"} <= run["candidates"].keys()]


def gain(row: Row) -> str:
    """Return the divergence of the plan over that of equal rates."""
    kl = {name: each["kl"] for name, each in row["candidates"].items()}
    return f"{kl['plan'] / kl['uniform']:.2f}"


def divergence(text: str) -> str:
    """Return the template of a divergence and its standard error."""
    return f"{{{text}[kl]:.4f}} ± {{{text}[kl_standard_error]:.4f}}"


def stages(rows: list[Row]) -> list[Row]:
    """List the stages of each run, each with its run."""
    listed = []
    for row in by_size(rows):
        run = row["wikitext2-valid"]
        for name, took in run["stages"].items():
            listed.append({**run, "stage": name, **took})
    return listed


TABLES = {
    "sizes": Table(
        "sizes",
        "shrinking.sizes SmolLM2.gguf text.txt --also docstrings,plays --store DIR",
        {
            "size": "{size}",
            "effort": "{effort}",
            "calibrated on": lambda row: CALIBRATIONS[row["calibration"]],
            "file, MB": lambda row: f"{row['wikitext2-valid']['file_bytes'] / 1e6:.1f}",
            "bits per weight": "{wikitext2-valid[bits_per_weight]:.2f}",
            "KL, WikiText-2": divergence("wikitext2-valid"),
            "perplexity": "{wikitext2-valid[perplexity]:.2f}",
            "KL, docstrings": divergence("docstrings"),
            "perplexity ": "{docstrings[perplexity]:.2f}",
            "KL, plays": divergence("plays"),
            "perplexity  ": "{plays[perplexity]:.2f}",
            "predicted KL": "{wikitext2-valid[predicted_kl]:.3f}",
        },
        by_size,
        files=3,
    ),
    "candidates": Table(
        "sizes",
        "shrinking.sizes SmolLM2.gguf text.txt --also docstrings,plays --store DIR",
        {
            "size": "{size}",
            "effort": "{effort}",
            "calibrated on": lambda row: CALIBRATIONS[row["calibration"]],
            "KL, plan": "{candidates[plan][kl]:.4f}",
            "KL, equal rates": "{candidates[uniform][kl]:.4f}",
            "ratio": gain,
        },
        planned,
    ),
    "stages": Table(
        "sizes",
        "shrinking.sizes SmolLM2.gguf text.txt --also docstrings,plays --store DIR",
        {
            "size": "{size}",
            "effort": "{effort}",
            "calibrated on": lambda row: CALIBRATIONS[row["calibration"]],
            "stage": "{stage}",
            "seconds": "{seconds:.0f}",
            "processor seconds": "{processor_seconds:.0f}",
            "peak so far, GB": lambda row: f"{row['peak_memory_bytes'] / 1e9:.2f}",
        },
        stages,
    ),
}
