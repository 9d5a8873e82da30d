"""Tables of the room's page: weights coded without loss, beside other coders."""

from collections.abc import Callable

from experiments.common.tables import Row, Table, last, named, spread, where

DTYPES = ("bfloat16", "float32", "float16")


def by_dtype(rows: list[Row]) -> list[Row]:
    """Order by dtype; within one as measured."""
    return sorted(rows, key=lambda row: DTYPES.index(row["kind"]))


def runs(memory_kept: bool) -> Callable[[list[Row]], list[Row]]:
    """Choose runs in which ZipNN and ours have the process for themselves."""
    return lambda rows: by_dtype(where(only="ZipNN", memory_kept=memory_kept)(rows))


def earlier(rows: list[Row]) -> list[Row]:
    """Choose speeds of an earlier revision, measured as memory comes."""
    timed = where(experiment="lossless")(rows[:EARLIER])
    return by_dtype([row for row in timed if not row.get("memory_kept")])


def file_format(row: Row) -> str:
    """Name the format of files of ours; the first rows do not say it."""
    ours = "kind" in row or row["coder"].startswith("ours")
    return str(row.get("format") or 2) if ours else ""


def sizes(rows: list[Row]) -> list[Row]:
    """Join the dtypes of each coder and format."""
    chosen = where(experiment="lossless_sizes")(rows)
    chosen = [row | {"written": file_format(row)} for row in chosen]
    joined = spread(chosen, "kind", "coder", "written")
    return sorted(joined, key=lambda row: not row["coder"].startswith("ours"))


def to_zipnn(what: str) -> Callable[[Row], str]:
    """Show the speed over ZipNN's in the same round, least and most in brackets."""

    def cell(row: Row) -> str:
        ratio = row[f"{what}_to_zipnn"]
        least, most = (row[f"{what}_to_zipnn_{end}"] for end in ("least", "most"))
        if row["coder"] == "ZipNN":
            return "1"
        return f"{ratio:.2f}" + f" ({least:.2f}-{most:.2f})" * (least < most)

    return cell


def in_xla(row: Row) -> str:
    """Show the speed of decoding in XLA, worst and best in brackets."""
    worst, best = row["xla_gb_s_worst"], row["xla_gb_s_best"]
    return f"{row['xla_gb_s']:.2f} ({worst:.2f}-{best:.2f})"


SPEEDS = {
    "weights": "{kind}",
    "coder": "{coder}",
    "bits in a file": lambda row: f"{row.get('file_bits', row['bits']):.3f}",
    "encode, MB/s": "{encode_mb_s:.0f}",
    "to ZipNN": to_zipnn("encode"),
    "decode, MB/s": "{decode_mb_s:.0f}",
    "to ZipNN ": to_zipnn("decode"),
    "decode in XLA, GB/s": in_xla,
}
EARLIER = 52  # rows before these are of an earlier revision of the coder
FORWARD = {"as they are": "as they are"} | {
    f"code_floats({old})": f"`code_floats({new})`"
    for old, new in (("", ""), ("fast=True", 'speed="decode"'))
}


def twice(rows: list[Row]) -> list[Row]:
    """Join the two runs of each way."""
    joined: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        joined.setdefault((row["weights"], row["streaming"]), []).append(row)
    return [{"weights": key[0], "low": key[1], "runs": x} for key, x in joined.items()]


def both(key: str, digits: int) -> Callable[[Row], str]:
    """Show both runs, once where they agree."""

    def cell(row: Row) -> str:
        texts = [f"{run[key]:.{digits}f}" for run in row["runs"]]
        return ", ".join(dict.fromkeys(texts))

    return cell


def way(row: Row) -> str:
    """Name the weights, and the context that the model ran in."""
    inside = ", inside `low_memory()`" if row["low"] else ""
    return FORWARD[row["weights"]] + inside


def quantized_model(row: Row) -> str:
    """Name the model, and how much of it where not all is coded."""
    name = "MiniLM" if row["model"] == "model.safetensors" else "SmolLM2"
    return f"{name}, {row['layers']} layers" if row["layers"] else name


def windows(rows: list[Row]) -> list[Row]:
    """Choose the rows that compare tables by tensor with tables by window."""
    chosen = [row for row in rows if "entropy_by_window_of_16384" in row]
    return last(chosen, "model", "layers", "kind")


TABLES = {
    "lossless": Table(
        "lossless",
        "coding.lossless MODEL.safetensors --rounds 7",
        SPEEDS,
        lambda rows: by_dtype(where(only="", threads=1)(rows[EARLIER:])),
        files=2,
    ),
    "zipnn_alone": Table(
        "lossless",
        "coding.lossless MODEL.safetensors --rounds 7 --only ZipNN",
        SPEEDS,
        lambda rows: runs(False)(rows[EARLIER:]),
        files=2,
    ),
    "earlier": Table(
        "lossless",
        "coding.lossless MODEL.safetensors --rounds N --threads N --only CODER",
        {"rounds": "{rounds}", "threads": "{threads}", **SPEEDS},
        earlier,
        files=2,
    ),
    "sizes": Table(
        "lossless",
        "coding.lossless MODEL.safetensors --sizes",
        {
            "coder": "{coder}",
            "format": "{written}",
            **{dtype: f"{{{dtype}[file_bits]:.3f}}" for dtype in DTYPES},
        },
        sizes,
        files=2,
    ),
    "memory_kept": Table(
        "lossless",
        "coding.lossless MODEL.safetensors --rounds 9 --only ZipNN",
        SPEEDS,
        runs(True),
        files=2,
    ),
    "coded_forward": Table(
        "coded_forward",
        "coding.coded_forward reference",
        {
            "weights": way,
            "bits per weight in memory": both("bits_per_weight", 2),
            "milliseconds": both("milliseconds", 0),
            "temporaries, MB": both("temporary_mb", 1),
            "compilation, s": both("compile_seconds", 1),
        },
        twice,
    ),
    "quantized_codes": Table(
        "quantized_codes",
        "coding.quantized_codes MODEL [--layers 4 --rates 2.05 3.05]",
        {
            "model": quantized_model,
            "codes": named(
                "kind",
                {
                    f"rate_distortion(rate={rate})": f"`rate_distortion(rate={rate})`"
                    for rate in (2.05, 3.05)
                },
            ),
            "format": file_format,
            "packed": "{bits_packed:.3f}",
            "as `save` codes it": "{bits_saved_plainly:.3f}",
            "`entropy_code`, `code_floats`": "{bits_entropy_coded:.3f}",
            "codes alone": "{bits_of_codes_alone:.3f}",
            "dB": "{signal_to_noise_db:.1f}",
        },
        files=2,
    ),
    "windows": Table(
        "quantized_codes",
        "coding.quantized_codes MODEL",
        {
            "model": quantized_model,
            "codes": "{kind}",
            "entropy by tensor": "{entropy_by_tensor:.3f}",
            "by window of 16 384, free of charge": "{entropy_by_window_of_16384:.3f}",
            "codes alone, in a file": "{bits_of_codes_alone:.3f}",
        },
        windows,
        files=2,
    ),
}
