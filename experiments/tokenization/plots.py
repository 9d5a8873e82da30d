"""Draw what `vocabulary.py` measured: bits per byte of equal compute.

python -m experiments.tokenization.plots [--operations 1.2e12]
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.common.config import parse

LOOKS = {"bpe": ("o-", "BPE"), "unigram": ("s--", "Unigram")}


@dataclasses.dataclass(frozen=True)
class Config:
    results: str = "experiments/tokenization/results/vocabulary.jsonl"
    picture: str = "docs/tokenizers.svg"
    operations: float = 1.2e12  # of the models shown


def run(config: Config) -> dict[str, Any]:
    """Write the picture; returns what is in it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "jaxcompress"  # the same bytes every time
    from matplotlib import pyplot

    lines = Path(config.results).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["config"]["operations"] == config.operations]
    if not rows:
        raise ValueError(
            f"{config.results} has no models of {config.operations:.2g} operations"
        )
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2))
    for kind, (look, label) in LOOKS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        chosen.sort(key=lambda row: row["vocab_size"])
        sizes = [row["vocab_size"] for row in chosen]
        bits = [row["bits_per_byte"] for row in chosen]
        lengths = [row["heldout_bytes_per_token"] for row in chosen]
        files = [row["file_bytes_8_bits"] / 1e6 for row in chosen]
        for ax, x, y in zip(
            axes, (sizes, sizes, files), (lengths, bits, bits), strict=True
        ):
            ax.plot(x, y, look, label=label)
    for ax, x, y in zip(
        axes,
        ("pieces", "pieces", "file, MB (8 bits, coded)"),
        ("bytes per token", "bits per byte", "bits per byte"),
        strict=True,
    ):
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.grid(alpha=0.3)
        if x == "pieces":
            ax.set_xscale("log", base=2)
    axes[0].legend()
    figure.tight_layout()
    Path(config.picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.picture, metadata={"Date": None})
    pyplot.close(figure)
    return {"models": len(rows), "bytes": Path(config.picture).stat().st_size}


if __name__ == "__main__":
    print(run(parse(Config, __doc__)))
