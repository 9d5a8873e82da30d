"""Tables of the room's page: tokenizers, vocabularies, trimming, speed."""

from collections.abc import Callable

from experiments.common.tables import Row, Table, last, percent, scaled, spread

NAMES = {
    "bpe": "`bpe`",
    "bpe across spaces": "`bpe` across spaces and scripts",
    "unigram": "`unigram`",
    "wordpiece": "`wordpiece`",
    "dictionary": "`dictionary`",
    "word": "`word`",
    "char": "`char`",
    "SentencePiece bpe": "SentencePiece, its defaults, BPE",
    "SentencePiece unigram": "the same, Unigram",
    "HF bpe": "Hugging Face, byte-level BPE",
    "HF unigram": "Hugging Face, Unigram",
}
SIZES = (1024, 4096, 8192, 32768)


def kinds(rows: list[Row]) -> list[Row]:
    """Join the sizes of each tokenizer."""
    joined = spread(last(rows, "tokenizer", "asked"), "asked", "tokenizer")
    return sorted(joined, key=lambda row: list(NAMES).index(row["tokenizer"]))


def bytes_per_token(size: int) -> Callable[[Row], str]:
    """Show both texts, and the size that the corpus carries where it is less."""

    def cell(row: Row) -> str:
        of = row[str(size)]
        smaller = [row[str(x)]["vocab_size"] for x in SIZES if x < size]
        if of["vocab_size"] in smaller:
            return ""
        text = f"{of['in_bytes_per_token']:.2f} / {of['out_bytes_per_token']:.2f}"
        return text if of["vocab_size"] == size else f"{text} ({of['vocab_size']})"

    return cell


def unknown(row: Row) -> str:
    """Show the rate of bytes or unknown tokens in both texts."""
    of = row["4096"]
    return f"{100 * of['in_unknown_rate']:.1f} / {100 * of['out_unknown_rate']:.1f} %"


def round_trip(row: Row) -> str:
    """Say whether the texts come back."""
    exact = all(row[str(x)]["in_exact"] and row[str(x)]["out_exact"] for x in SIZES)
    return "all" if exact else "loses"


def engines(rows: list[Row]) -> list[Row]:
    """Join one process and two of each engine, as measured last."""
    found = last((row for row in rows if "engine" in row), "engine")
    named = []
    for row in found:
        engine, _, workers = row["engine"].rpartition(", ")
        named.append(row | {"name": engine, "workers": f"of{workers[0]}"})
    return spread(named, "workers", "name")


def speed(workers: str) -> Callable[[Row], str]:
    """Show MB per second of processor time and per second passed."""
    return lambda row: (
        f"{row[workers]['mb_per_cpu_second']:.1f} / {row[workers]['mb_per_second']:.1f}"
    )


KEPT = {
    ("none", "measured"): "all",
    ("1", "measured"): "those that occur",
    ("0.0004", "measured"): "and the likely ones, found on the windows measured",
    ("0.0004", "other"): "and the likely ones, found on other windows",
}


def trimmed(rows: list[Row]) -> list[Row]:
    """Choose the rows measured last, whose files hold bfloat16 coded without loss."""
    found = [row for row in rows if row["commit"][:7] in ("d50d81b", "c9e490d")]
    order = list(KEPT)
    return sorted(
        found, key=lambda row: order.index((row["cut_off"], row["calibrated"]))
    )


TABLES = {
    "kinds": Table(
        "kinds",
        "tokenization.kinds text.txt",
        {
            "tokenizer": lambda row: NAMES[row["tokenizer"]],
            **{f"{size // 1024}k": bytes_per_token(size) for size in SIZES},
            "unknown": unknown,
            "round trip": round_trip,
        },
        kinds,
    ),
    "vocabulary": Table(
        "vocabulary",
        "tokenization.vocabulary",
        {
            "pieces": "{vocab_size:,}",
            "kind": lambda row: {"bpe": "BPE", "unigram": "Unigram"}[row["kind"]],
            "bytes per token": "{heldout_bytes_per_token:.2f}",
            "steps of 1 024 tokens": "{steps}",
            "bits per byte": "{bits_per_byte:.3f}",
            "file, MB (8 bits, coded)": scaled("file_bytes_8_bits", 1e-6, 2),
            "embedding": lambda row: (
                f"{100 * row['embedding_weights'] / row['weights']:.0f} %"
            ),
        },
        lambda rows: sorted(rows, key=lambda row: (row["vocab_size"], row["kind"])),
        files=2,
    ),
    "trimming": Table(
        "trimming",
        "tokenization.trimming SmolLM2.gguf text.txt",
        {
            "kept": lambda row: KEPT[row["cut_off"], row["calibrated"]],
            "pieces": "{vocab_size:,}",
            "file, MB": scaled("file_bytes_bfloat16", 1e-6, 1),
            "probability lost": percent("lost_probability", 2),
            "perplexity, in domain": "{in_domain_perplexity:.3f}",
            "bits per byte, held out": "{held_out_bits_per_byte:.3f}",
            "out of domain": "{out_of_domain_bits_per_byte:.3f}",
            "bytes per token, out of domain": "{out_of_domain_bytes_per_token:.2f}",
        },
        trimmed,
        files=2,
    ),
    "speed": Table(
        "speed",
        "tokenization.speed",
        {
            "engine": "{name}",
            "one process": speed("of1"),
            "two processes (or threads)": speed("of2"),
        },
        engines,
    ),
    "sentences": Table(
        "speed",
        "tokenization.speed",
        {
            "letters": "{sentence:,}",
            "Viterbi, s": "{viterbi_cpu_seconds:.4f}",
            "in SentencePiece, s": "{sentencepiece_cpu_seconds:.4f}",
            "greedy, s": "{greedy_cpu_seconds:.4f}",
            "tokens": "{viterbi_tokens:,}",
            "greedy tokens": "{greedy_tokens:,}",
            "nats": "{viterbi_nats:,.0f}",
            "greedy nats": "{greedy_nats:,.0f}",
        },
        lambda rows: last((row for row in rows if "sentence" in row), "sentence"),
    ),
}
