"""Tables of the room's page: text coded by models."""

from experiments.common.tables import Row, Table, percent, spread


def peers(rows: list[Row]) -> list[Row]:
    """Join the texts of other compressors; weakest first."""
    joined = spread((row for row in rows if "window" not in row), "text", "coder")
    return sorted(joined, key=lambda row: -row["wikitext2-valid.txt"]["file_bytes"])


TABLES = {
    "exact_price": Table(
        "exact_price",
        "textcoding.exact_price MODEL [TEXT]",
        {
            "model": lambda row: row["model"].partition("-")[0],
            "text": "{text}",
            "windows": "{windows}",
            "tokens": "{tokens:,}",
            "bits per token, float32": "{bits_per_token_float:.4f}",
            "integers": "{bits_per_token_exact:.4f}",
            "price": percent("price", 2),
        },
    ),
    "ratio": Table(
        "ratio",
        "textcoding.ratio SmolLM2.gguf wikitext2-valid.txt --bytes 16384 "
        "--settings 1024/512/1",
        {
            "model": lambda row: row["coder"].partition("-")[0],
            "text": "{text}",
            "bytes": "{bytes:,}",
            "window / overlap / lanes": "{window} / {overlap} / {lanes}",
            "file, bytes": "{file_bytes:,}",
            "bits per byte": "{bits_per_byte:.3f}",
            "encoding, s": "{encode_seconds:.0f}",
        },
        lambda rows: [row for row in rows if "window" in row],
    ),
    "peers": Table(
        "ratio",
        "textcoding.ratio --peers",
        {
            "coder": "{coder}",
            "WikiText-2": lambda row: (
                f"{row['wikitext2-valid.txt']['bits_per_byte']:.3f}"
            ),
            "held-out Python": "{heldout[bits_per_byte]:.3f}",
        },
        peers,
    ),
    "round_trips": Table(
        "round_trips",
        "textcoding.round_trips --inputs 1000",
        {
            "inputs": "{inputs:,}",
            "the same again": "{same:,}",
            "damaged files": "{damaged:,}",
            "refused": "{refused:,}",
        },
    ),
    "portable": Table(
        "portable",
        "textcoding.portable --lanes 1,3,32 --bytes 3000 --pythons OLD,NEW",
        {
            "lanes": "{lanes}",
            "decoded in": "{place}",
            "jax": "{jax}",
            "Python": "{python}",
            "same text": lambda row: "yes" if row["same_text"] else "no",
            "same file": lambda row: "yes" if row["same_file"] else "no",
            "seconds": "{seconds:.0f}",
        },
    ),
}
