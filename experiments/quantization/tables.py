"""Tables of the room's page: methods with and without data, and their speed."""

from collections.abc import Iterable

from experiments.common.tables import Row, Table, last, named, short, spread, where

PERPLEXITIES = {
    "perplexity, WikiText-2": lambda row: short(row["wikitext2-valid"]["perplexity"]),
    "KL": "{wikitext2-valid[kl]:.3f}",
    "perplexity, docstrings": lambda row: short(row["docstrings"]["perplexity"]),
    "KL ": "{docstrings[kl]:.3f}",
}


def any_text(row: Row) -> Row:
    """Return the row of WikiText-2, which every method has."""
    return row["wikitext2-valid"]


def method(row: Row) -> str:
    """Name a method without what the table says of all its rows."""
    return row["method"].replace(", embedding too", "")


def nearest_recipe(row: Row) -> str:
    """Name the recipe of the kernels; the embedding takes 8 bits where not said."""
    recipe = row["recipe"]
    if isinstance(recipe, list):
        return f"`{recipe[-1][1]}`"
    everywhere = recipe not in ("float32", "symmetric(bits=8)")
    return f"`{recipe}`{' everywhere' if everywhere else ''}"


NAMES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2",
    "gemma-3-270m-Q4_K_M.gguf": "Gemma 3 270M",
}


def nearest(rows: list[Row]) -> list[Row]:
    """Join the texts; by model, largest files first."""
    joined = spread(rows, "text", "model", "recipe")
    order = list(NAMES)
    return sorted(
        joined,
        key=lambda row: (order.index(row["model"]), -any_text(row)["file_bytes"]),
    )


def by_bits(
    rows: list[Row], tokens: tuple[int, ...], order: Iterable[str]
) -> list[Row]:
    """Join the texts of each method; 4 bits first, then in the order of methods."""
    names = list(order)

    def place(row: Row) -> tuple[int, int]:
        name, bits = method(row).rsplit(", ", 1)
        return -int(bits[0]), names.index(name)

    chosen = where(calibration_tokens=tokens, tokens=8176)(rows)
    return sorted(spread(chosen, "text", "method"), key=place)


METHODS = (
    "nearest",
    "hqq",
    "gptq",
    "gptq, searched steps",
    "awq",
    "mixed",
    "nf4",
    "mxfp4",
    "nvfp4",
    "gptq on nvfp4",
    "learned",
)
KERNELS, ALL = 106168320, 134479872  # weights without and with the embedding
FULL = (0, 65536)  # tokens to calibrate on, none for methods without data


def blockwise(rows: list[Row]) -> list[Row]:
    """Calibrate on fewer tokens, with moments of the compressed blocks."""
    fewer = where(calibration_tokens=(8192, 16384), device="cpu")(rows)
    return spread(fewer, "text", "method", "calibration_tokens")


def seconds(row: Row) -> str:
    """Write the seconds of a method, and where they passed."""
    of = any_text(row)
    on_cores = of["device"] == "cpu"
    value = of["compress_processor_seconds" if on_cores else "compress_seconds"]
    return f"{value:.0f}{' (two cores)' if on_cores else ''}"


BITS = "{wikitext2-valid[bits_per_compressed_weight]:.2f}"
PROCESSOR = "{wikitext2-valid[compress_processor_seconds]:.0f}"

TABLES = {
    "nearest": Table(
        "nearest",
        "quantization.nearest SmolLM2.gguf text.txt`, `... gemma-3-270m-Q4_K_M.gguf "
        "text.txt --windows 4 --only full_range",
        {
            "model": named("model", NAMES),
            "recipe": nearest_recipe,
            "file, MB": lambda row: f"{any_text(row)['file_bytes'] / 1e6:.1f}",
            "bits per weight": "{wikitext2-valid[bits_per_weight]:.2f}",
            "perplexity, WikiText-2": lambda row: short(
                row["wikitext2-valid"]["perplexity"]
            ),
            "KL": "{wikitext2-valid[kl]:.4f}",
            "perplexity, docstrings": lambda row: short(
                row["docstrings"]["perplexity"]
            ),
            "KL ": "{docstrings[kl]:.4f}",
        },
        nearest,
        files=1,
    ),
    "calibrated": Table(
        "calibrated",
        "quantization.calibrated SmolLM2.gguf text.txt --bits N --calibration 128 "
        "--windows 16",
        {"method": method, "bits": BITS, **PERPLEXITIES, "seconds": seconds},
        lambda rows: by_bits(where(compressed_weights=KERNELS)(rows), FULL, METHODS),
        files=2,
    ),
    "embedding": Table(
        "calibrated",
        "quantization.calibrated SmolLM2.gguf text.txt --bits N --calibration 128 "
        "--windows 16 --embedding",
        {
            "method": method,
            "bits": BITS,
            **PERPLEXITIES,
            "processor seconds": PROCESSOR,
        },
        lambda rows: by_bits(where(compressed_weights=ALL)(rows), FULL, METHODS),
        files=2,
    ),
    "blockwise": Table(
        "calibrated",
        'quantization.calibrated SmolLM2.gguf text.txt --bits 4 --only "gptq;gptq, '
        'blockwise"',
        {
            "method": method,
            "tokens": "{calibration_tokens:,}",
            "bits": BITS,
            **PERPLEXITIES,
            "processor seconds": PROCESSOR,
        },
        blockwise,
        files=2,
    ),
    "fewer_tokens": Table(
        "calibrated",
        "quantization.calibrated SmolLM2.gguf text.txt --bits 4 --calibration 64 "
        "--windows 16 --only gptq",
        {
            "method": method,
            "tokens": "{calibration_tokens:,}",
            "bits": BITS,
            **PERPLEXITIES,
            "processor seconds": PROCESSOR,
        },
        lambda rows: spread(
            where(calibration_tokens=32768)(rows),
            "text",
            "method",
            "calibration_tokens",
        ),
        files=2,
    ),
    "gptq_speed": Table(
        "gptq_speed",
        "quantization.gptq_speed",
        {
            "width": "{width}",
            "seconds": "{ours_seconds:.3f}",
            "times as fast as PyTorch (processor time)": "{times_as_fast_as_torch:.1f}",
            "as NumPy": "{times_as_fast_as_numpy:.1f}",
        },
    ),
    "learned_grids": Table(
        "learned_grids",
        "quantization.learned_grids",
        {
            "method": "`{method}`",
            "bits": "{bits_per_weight:.2f}",
            "KL": "{kl:.4f} ± {kl_standard_error:.4f}",
            "perplexity": "{perplexity:.2f}",
            "processor seconds": "{processor_seconds:.0f}",
        },
        lambda rows: last(rows, "method"),
    ),
}
