"""Tables of the room's page: text coded by models."""

from experiments.common.tables import Cell, Row, Table, percent, spread

TEXTS = ("wikitext2-valid.txt", "heldout", "repository.txt")


def peers(rows: list[Row]) -> list[Row]:
    """Join the texts of all coders on 102,400 bytes, with the mixer; weakest first."""
    chosen = [row for row in rows if row["bytes"] == 102_400 and row.get("mix", True)]
    joined = spread(chosen, "text", "coder")
    return sorted(joined, key=lambda row: -row["wikitext2-valid.txt"]["file_bytes"])


def bits_of(text: str) -> Cell:
    """Show bits per byte of one text."""
    return lambda row: f"{row[text]['bits_per_byte']:.3f}" if text in row else ""


def encode_rate(row: Row) -> str:
    """Show bytes coded in a second of all processors, where both parts were timed."""
    if "hidden_processor_seconds" not in row:
        return ""
    seconds = row["hidden_processor_seconds"] + row["other_processor_seconds"]
    return f"{row['bytes'] / seconds:,.0f}"


def decode_rate(row: Row) -> str:
    """Show bytes decoded in a second of all processors."""
    return f"{row['decoded_bytes'] / row['decode_processor_seconds']:,.0f}"


def per_second(name: str) -> Cell:
    """Show kilobytes coded in a second."""
    return lambda row: f"{row['bytes'] / row[name] / 1000:.1f}"


def model_size(row: Row) -> str:
    """Show the megabytes of the model's own file, where there is one."""
    return f"{row['model_bytes'] / 1e6:.1f}" if "model_bytes" in row else ""


def both_sizes(row: Row) -> str:
    """Show bits per byte with the model's own file counted."""
    return f"{8 * (row['file_bytes'] + row['model_bytes']) / row['bytes']:,.0f}"


def of_sizes(rows: list[Row]) -> list[Row]:
    """Choose rows of models of several sizes, by text and size."""
    chosen = [row for row in rows if "model_bytes" in row and row["bytes"] == 102_400]
    return sorted(chosen, key=lambda row: (row["text"], -row["model_bytes"]))


def in_full(rows: list[Row]) -> list[Row]:
    """Choose the rows of whole texts by models as they come."""
    chosen = [row for row in rows if "window" in row and row["bytes"] > 20_000]
    apart = [*of_sizes(rows), *with_primers(rows)]
    return [row for row in chosen if row not in apart]


def with_primers(rows: list[Row]) -> list[Row]:
    """Choose the rows that compare a primer with none."""
    return [row for row in rows if "window" in row and row["bytes"] == 30_720]


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
        "textcoding.ratio MODEL [TEXT] --settings W/O/L --decode 64",
        {
            "model": lambda row: row["coder"].partition("-")[0],
            "text": "{text}",
            "bytes": "{bytes:,}",
            "window / overlap / lanes": "{window} / {overlap} / {lanes}",
            "mixer": lambda row: "yes" if row["mix"] else "no",
            "bytes of its cross entropy": "{entropy_bytes:,.1f}",
            "without stored lanes": "{coded_bytes:,}",
            "file, bytes": "{file_bytes:,}",
            "bits per byte": "{bits_per_byte:.3f}",
            "encoded, bytes a second": encode_rate,
            "decoded": lambda row: decode_rate(row) if "decoded_bytes" in row else "",
        },
        in_full,
    ),
    "sizes": Table(
        "ratio",
        "textcoding.ratio MODEL TEXT --bytes 102400 --settings 2048/0/1 --decode 64",
        {
            "text": "{text}",
            "model's file, MB": model_size,
            "mixer": lambda row: "yes" if row["mix"] else "no",
            "file, bytes": "{file_bytes:,}",
            "bits per byte": "{bits_per_byte:.3f}",
            "with the model's file": both_sizes,
            "encoded, bytes a second": encode_rate,
            "decoded": lambda row: decode_rate(row) if "decoded_bytes" in row else "",
        },
        of_sizes,
    ),
    "primers": Table(
        "ratio",
        "textcoding.ratio reference TEXT --bytes 30720 --mix 1 --primer PRIMER",
        {
            "lanes": "{lanes}",
            "primer, bytes": "{primer:,}",
            "file, bytes": "{file_bytes:,}",
            "bits per byte": "{bits_per_byte:.3f}",
        },
        with_primers,
    ),
    "windows": Table(
        "ratio",
        "textcoding.ratio reference --bytes 16384 --settings 512/0/1,512/128/1,...",
        {
            "window / overlap / lanes": "{window} / {overlap} / {lanes}",
            "mixer": lambda row: "yes" if row["mix"] else "no",
            "file, bytes": "{file_bytes:,}",
            "bits per byte": "{bits_per_byte:.3f}",
            "hidden states, processor seconds": "{hidden_processor_seconds:.1f}",
        },
        lambda rows: [row for row in rows if "window" in row and row["bytes"] < 20_000],
    ),
    "rates": Table(
        "rates",
        "textcoding.rates reference --bytes 30720",
        {
            "model": "{model}",
            "weights": "{weights:,}",
            "lanes": "{lanes}",
            "window / overlap": "{window} / {overlap}",
            "mixer": lambda row: "yes" if row["mix"] else "no",
            "bits per byte": "{bits_per_byte:.3f}",
            "encoded, KB/s": per_second("encode_seconds"),
            "per processor": per_second("encode_processor_seconds"),
            "decoded, KB/s": per_second("decode_seconds"),
            "per processor, decoded": per_second("decode_processor_seconds"),
        },
        lambda rows: [row for row in rows if "mix" in row],
    ),
    "student": Table(
        "student",
        "textcoding.student --steps 240 --output student.safetensors",
        {
            "weights": "{weights:,}",
            "steps": "{steps}",
            "bits per byte, float32": "{bits_per_byte:.3f}",
            "of the teacher": "{teacher_bits_per_byte:.3f}",
            "KL": "{kl:.3f}",
            "processor seconds": "{processor_seconds:.0f}",
        },
    ),
    "peers": Table(
        "ratio",
        "textcoding.ratio MODEL [TEXT] --bytes 102400 --peers",
        {
            "coder": "{coder}",
            "WikiText-2": bits_of(TEXTS[0]),
            "held-out Python": bits_of(TEXTS[1]),
            "this repository": bits_of(TEXTS[2]),
        },
        peers,
    ),
    "peers_short": Table(
        "ratio",
        "textcoding.ratio SmolLM2.gguf wikitext2-valid.txt --peers",
        {"coder": "{coder}", "bits per byte": "{bits_per_byte:.3f}"},
        lambda rows: [
            row
            for row in rows
            if row["bytes"] == 61_440
            and "window" not in row
            and row["text"] == TEXTS[0]
        ],
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
        "textcoding.portable --pythons OLD,NEW",
        {
            "lanes": "{lanes}",
            "decoded in": "{place}",
            "jax": "{decoder_jax}",
            "Python": "{python}",
            "same text": lambda row: "yes" if row["same_text"] else "no",
            "same file": lambda row: {True: "yes", False: "no", None: ""}[
                row.get("same_file")
            ],
            "seconds": "{seconds:.0f}",
        },
    ),
}
