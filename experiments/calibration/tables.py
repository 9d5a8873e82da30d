"""Tables of the room's page: a model calibrated block by block."""

from experiments.common.tables import Row, Table, scaled, spread


def per_weight(row: Row) -> str:
    """Show microseconds of a processor for a weight of the stage."""
    return f"{1e6 * row['processor_seconds'] / row['weights']:.2f}"


def by_text(rows: list[Row]) -> list[Row]:
    """Join the texts of each method and shrinkage."""
    return spread(rows, "text", "variant", "shrinkage")


def kl(text: str) -> str:
    """Return the template of a divergence and its standard error."""
    return f"{{{text}[kl]:.4f}} ± {{{text}[kl_standard_error]:.4f}}"


TABLES = {
    "shrinkage": Table(
        "shrinkage",
        "calibration.shrinkage SmolLM2.gguf text.txt",
        {
            "method": "`{variant}`",
            "shrinkage": "{shrinkage}",
            "KL, WikiText-2": kl("wikitext2-valid"),
            "KL, docstrings": kl("docstrings"),
            "KL, plays": kl("plays"),
        },
        by_text,
    ),
    "blockwise": Table(
        "blockwise",
        "calibration.blockwise SmolLM2.gguf text.txt",
        {
            "recipe": "`{recipe}`",
            "layers": "{layers}",
            "tokens": "{calibration_tokens:,}",
            "seconds": "{seconds:.0f}",
            "processor seconds": "{processor_seconds:.0f}",
            "peak, GB": scaled("peak_bytes", 1e-9, 1),
            "peak before, GB": scaled("peak_bytes_before", 1e-9, 2),
            "mean relative error of outputs": "{mean_output_error:.4f}",
        },
    ),
    "curvatures": Table(
        "curvatures",
        "calibration.curvatures SmolLM2.gguf text.txt --stage STAGE --calibration 8",
        {
            "stage": "`{stage}`",
            "tokens": "{calibration_tokens:,}",
            "processor seconds": "{processor_seconds:.0f}",
            "peak, GB": scaled("peak_bytes", 1e-9, 1),
            "peak before, GB": scaled("peak_bytes_before", 1e-9, 1),
        },
    ),
    "killed": Table(
        "killed",
        "calibration.killed SmolLM2.gguf text.txt --windows 4 --states 0",
        {
            "stage": "{stage}",
            "sweep": "{sweep}",
            "killed after, s": "{seconds_when_killed:.0f}",
            "blocks done, of all": "{blocks_when_killed} of {blocks}",
            "file, MB": scaled("file_bytes", 1e-6, 1),
            "the same bytes": lambda row: "yes" if row["same_bytes"] else "no",
        },
    ),
    "larger": Table(
        "larger",
        "calibration.larger --shape SHAPE --store DIR --stage STAGE",
        {
            "shape": "{shape}",
            "stage": "`{stage}`",
            "weights, millions": scaled("weights", 1e-6, 0),
            "processor seconds": "{processor_seconds:.0f}",
            "microseconds a weight": per_weight,
            "peak, GB": scaled("peak_bytes", 1e-9, 2),
        },
    ),
}
