"""Tables of the room's page: coded levels beside the bound, peers and fixed widths."""

import statistics
from collections.abc import Callable

from experiments.common.tables import (
    Row,
    Table,
    percent,
    scaled,
    spread,
    where,
)

SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
KERNELS, ALL = 106168320, 134479872  # weights without and with the embedding
COMMAND = "rate_distortion.models SmolLM2.gguf text.txt --calibration 256 --cache DIR"


def gaussian(rows: list[Row]) -> list[Row]:
    """Join states and priors of each covariance and number of bits."""
    named = [
        row
        | {
            "name": f"s{row['states']}" + "p" * (row["prior"] > 0),
            "at": round(row["bits_per_weight"]),
        }
        for row in rows
    ]
    return spread(named, "name", "covariance", "at")


def variants(**chosen: object) -> Callable[[list[Row]], list[Row]]:
    """Join the texts of each variant; most bits first."""

    def joined(rows: list[Row]) -> list[Row]:
        rows = [row for row in where(**chosen)(rows) if "timed" not in row["variant"]]
        named = [
            row | {"name": "far" if row["text"] == "docstrings" else "near"}
            for row in rows
        ]
        by = ("variant", "rate", "calibration_tokens", "bits_per_compressed_weight")
        found = spread(named, "name", *by)
        return sorted(found, key=lambda row: -row[by[-1]])

    return joined


def variant(row: Row) -> str:
    """Name a variant; recipes as code."""
    return f"`{row['variant']}`" if "(" in row["variant"] else row["variant"]


def tokens(row: Row) -> str:
    """Write how many tokens a method saw; none where it sees none."""
    if row["variant"].startswith("asymmetric"):
        return ""
    return f"{row['calibration_tokens'] // 1024}k"


def texts(bits_per_byte: bool, near: str) -> dict[str, str]:
    """Show divergence and perplexity of both texts."""
    columns = {}
    for name, text in (("near", near), ("far", "docstrings")):
        end = " " * (name == "far")
        columns[f"KL, {text}"] = (
            f"{{{name}[kl]:.4f}} ± {{{name}[kl_standard_error]:.4f}}"
        )
        columns[f"perplexity{end}"] = f"{{{name}[perplexity]:.2f}}"
        if bits_per_byte:
            columns[f"bits per byte{end}"] = f"{{{name}[bits_per_byte]:.3f}}"
    return columns


def columns(bits_per_byte: bool, near: str = "WikiText-2") -> dict[str, object]:
    """Show what a variant costs and loses."""
    return {
        "variant": variant,
        "tokens": tokens,
        "bits": "{near[bits_per_compressed_weight]:.3f}",
        "MB": lambda row: f"{row['near']['file_bytes'] / 1e6:.1f}",
        **texts(bits_per_byte, near),
        "processor seconds": "{near[compress_processor_seconds]:.0f}",
    }


GROUPS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "q k v": "query, key and value together",
    "o": "attention output",
    "gate": "gate",
    "up": "up",
    "gate up": "gate and up together",
    "down": "down",
}


def best_shrinkage(rows: list[Row]) -> list[Row]:
    """Choose the shrinkage at which a group saves most."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["bits_saved"] > best.get(row["group"], {"bits_saved": -1})["bits_saved"]:
            best[row["group"]] = row
    return [best[group] for group in GROUPS]


def loss(rate: float) -> str:
    """Show the mean loss over that of the defaults, and its range."""
    key = f"r{round(100 * rate)}"
    return f"{{{key}[loss_ratio]:.3f}} ({{{key}[least]:.3f}} to {{{key}[most]:.3f}})"


def pieces(rows: list[Row]) -> list[Row]:
    """Join the rates of each change."""
    named = [row | {"name": f"r{round(100 * row['rate'])}"} for row in rows]
    return spread([row for row in named if row["way"] != "as it is"], "name", "way")


NEAR = ("heldout", "wikitext2-valid")


def by_text(*by: str, **chosen: object) -> Callable[[list[Row]], list[Row]]:
    """Join the texts of each variant, most bits first, then in the order measured."""

    def joined(rows: list[Row]) -> list[Row]:
        named = [
            row | {"name": "near" if row["text"] in NEAR else row["text"]}
            for row in where(**chosen)(rows)
        ]
        found = spread(named, "name", *by, "bits", "variant")
        return sorted(found, key=lambda row: -row["bits"])

    return joined


def divergences(near: str) -> dict[str, object]:
    """Show the divergence on each of three texts, and the perplexity on the first."""
    columns: dict[str, object] = {
        f"KL, {title}": f"{{{name}[kl]:.5f}} ± {{{name}[kl_standard_error]:.5f}}"
        for name, title in (
            ("near", near),
            ("docstrings", "docstrings"),
            ("plays", "plays"),
        )
    }
    return columns | {f"perplexity, {near}": "{near[perplexity]:.2f}"}


def encoders(rows: list[Row]) -> list[Row]:
    """Choose the rows of the encoder, most bits first."""
    found = where(model="all-MiniLM-L6-v2")(rows)
    return sorted(found, key=lambda row: -row["bits"])


EMBEDDINGS = {
    "cosine": "{cosine:.5f}",
    "5th percentile": "{cosine_5th_percentile:.5f}",
    "same neighbour": percent("nearest_neighbour_agreement", 1),
}


def rivals(rows: list[Row]) -> list[Row]:
    """Join the texts; a rival, then ours at as many bits."""
    named = [
        row | {"name": "near" if row["text"] in NEAR else row["text"]} for row in rows
    ]
    joined = spread(named, "name", "rival", "bits", "variant")
    return sorted(joined, key=lambda row: (row["bits"], row["rival"], row["variant"]))


BASELINE = "tuned 192"
MOVED = {"held-out": "heldout", "docstrings": "docstrings", "plays": "plays"}


def levels(rows: list[Row]) -> list[Row]:
    """Join the texts of each variant, with its change against trained steps alone."""
    base = {
        (row["rate"], row["seed"], row["text"]): row["windows"]
        for row in rows
        if row["variant"] == BASELINE
    }
    named = []
    for row in rows:
        before = base.get((row["rate"], row["seed"], row["text"]), [])
        row = row | {"name": row["text"]}
        if len(before) == len(row["windows"]) and row["variant"] != BASELINE:
            pairs = [b - a for a, b in zip(before, row["windows"], strict=True)]
            scale = 100 * len(before) / sum(before)
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            change = f"{scale * statistics.mean(pairs):+.1f}"
            row["change"] = f", {change} ± {scale * error:.1f} %"
        named.append({"change": ""} | row)
    joined = spread(named, "name", "rate", "seed", "variant")
    return sorted(joined, key=lambda row: (-row["rate"], row["seed"]))


TABLES = {
    "gaussian_bound": Table(
        "gaussian_bound",
        "rate_distortion.gaussian_bound",
        {
            "covariance": "{covariance}",
            "bits": lambda row: f"{row['at'] + 0.05:.2f}",
            "rounding": "{s0[gap]:.3f}",
            "with prior": "{s0p[gap]:.3f}",
            "8 states": "{s8[gap]:.3f}",
            "with prior ": "{s8p[gap]:.3f}",
            "128 states": "{s128[gap]:.3f}",
            "with prior  ": "{s128p[gap]:.3f}",
        },
        gaussian,
        files=2,
    ),
    "smollm2": Table(
        "models",
        f"{COMMAND} --rates 4.05,3.05,2.55,2.05,1.6",
        columns(True),
        variants(model=SMOL, compressed_weights=(KERNELS, None)),
        files=2,
    ),
    "timed": Table(
        "models",
        f"{COMMAND.replace('256', '64')} --rates 2.05",
        {
            "variant": "{variant}",
            "text": "{text}",
            "moments, s": "{moments_seconds:.0f}",
            "curvatures, s": "{curvature_seconds:.0f}",
            "compression, s": "{compress_seconds:.0f}",
            "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}",
            "KL": "{kl:.4f} ± {kl_standard_error:.4f}",
        },
        lambda rows: [row for row in rows if "timed" in row["variant"]],
        files=2,
    ),
    "output_metric": Table(
        "output_metric",
        "rate_distortion.output_metric SmolLM2.gguf text.txt --cache DIR "
        "--sequences 96",
        {
            "outputs of": lambda row: GROUPS[row["group"]],
            "saved": "{bits_saved:.3f} ({least:.3f} to {most:.3f})",
            "shrinkage": "{shrinkage}",
        },
        best_shrinkage,
    ),
    "whole_model": Table(
        "models",
        f"{COMMAND} --embedding --rates 3.5,2.45",
        columns(False),
        variants(model=SMOL, compressed_weights=ALL),
        files=2,
    ),
    "reference": Table(
        "models",
        "rate_distortion.models --tokens 256 --windows 16 --rates 3.05,2.05",
        columns(False, "held-out"),
        variants(model="reference"),
        files=2,
    ),
    "levels": Table(
        "levels",
        "rate_distortion.levels --also docstrings,plays",
        {
            "variant": "{variant}",
            "draw": "{seed}",
            "bits": "{heldout[bits_per_compressed_weight]:.4f}",
            "tokens of training": "{heldout[training_tokens]}",
            **{
                f"KL, {text}": f"{{{name}[kl]:.4f}}{{{name}[change]}}"
                for text, name in MOVED.items()
            },
        },
        levels,
        files=3,
    ),
    "rivals": Table(
        "rivals",
        "rate_distortion.rivals SmolLM2.gguf text.txt --bits 2 3 --layers 6 "
        "[--rival AutoRound]",
        {
            "variant": "{variant}",
            "bits": "{near[bits_per_compressed_weight]:.3f}",
            **divergences("WikiText-2"),
            "processor seconds": "{near[compress_processor_seconds]:.0f}",
        },
        rivals,
    ),
    "pieces": Table(
        "pieces",
        "rate_distortion.pieces SmolLM2.gguf text.txt --cache DIR --layers 20",
        {
            "instead of the defaults": "{way}",
            "2.05 bits": loss(2.05),
            "3.05 bits": loss(3.05),
        },
        pieces,
    ),
    "original_reference": Table(
        "original",
        "rate_distortion.original",
        {
            "variant": "{variant}",
            "bits": "{bits}",
            "bits in the file": "{near[bits_per_weight]:.3f}",
            "MB": lambda row: f"{row['near']['file_bytes'] / 1e6:.2f}",
            **divergences("held-out"),
        },
        by_text(model="reference"),
        files=3,
    ),
    "original_minilm": Table(
        "original",
        "rate_distortion.original all-MiniLM-L6-v2 text.txt",
        {
            "variant": "{variant}",
            "bits": "{bits}",
            "bits in the file": "{bits_per_weight:.3f}",
            "MB": scaled("file_bytes", 1e-6, 2),
            **EMBEDDINGS,
        },
        encoders,
        files=3,
    ),
    "lattice": Table(
        "lattice",
        "rate_distortion.lattice",
        {
            "variant": "{variant}",
            "bits": "{near[bits_per_compressed_weight]:.3f}",
            **divergences("held-out"),
        },
        by_text(model="reference"),
    ),
    "lattice_minilm": Table(
        "lattice",
        "rate_distortion.lattice all-MiniLM-L6-v2 text.txt",
        {
            "variant": "{variant}",
            "bits": "{bits_per_compressed_weight:.3f}",
            **EMBEDDINGS,
        },
        encoders,
    ),
}
