"""Table of the room's page: thin factors, planned ranks and corrections."""

from experiments.common.tables import Row, Table, short

WAYS = {
    "plain": "plain",
    "weighted": "weighted",
    "planned": "weighted, planned ranks",
    "curved": "weighted, planned ranks, both by curvatures",
}
NEAREST = "symmetric(bits=3, block=64, full_range=True)"
OTHERS = {
    NEAREST: "3 bits in blocks of 64, nearest",
    f"corrected(base='{NEAREST}', rank=32, weighted=False)": "3 bits and a product "
    "of rank 32, by the weights",
    f"corrected(base='{NEAREST}', rank=32)": "3 bits and a product of rank 32, by "
    "the outputs (QERA)",
    "chain": "chain: pruned, factorized, quantized, coded",
}


def way(row: Row) -> str:
    """Name what was done."""
    name, _, fraction = row["row"].partition(" ")
    return WAYS[name] if fraction and name in WAYS else OTHERS[row["row"]]


def kept(row: Row) -> str:
    """Write the fraction of the numbers that is kept."""
    return (
        f"{100 * float(row['row'].split()[-1]):.0f} %" if "kept_weights" in row else "-"
    )


def by_model(rows: list[Row]) -> list[Row]:
    """Order by model, by fraction from most to least, by way."""

    def place(row: Row) -> tuple[bool, float, int]:
        fraction = float(row["row"].split()[-1]) if "kept_weights" in row else 0.0
        order = [*WAYS.values(), *OTHERS.values()]
        return row["model"] != "reference", -fraction, order.index(way(row))

    return sorted(rows, key=place)


TABLES = {
    "low_rank": Table(
        "low_rank",
        "factorization.low_rank [SmolLM2.gguf text.txt --tokens 512 --calibration 64 "
        "--windows 12]",
        {
            "model": lambda row: row["model"].partition("-")[0],
            "kept": kept,
            "way": way,
            "perplexity (dense)": lambda row: (
                f"{short(row['perplexity'])} ({row['dense_perplexity']:.2f})"
            ),
            "KL": "{kl:.3f}",
            "processor seconds": "{processor_seconds:.1f}",
        },
        by_model,
    ),
}
