"""Draw the README's picture from stored rows: bits against divergence, beside others.

python -m experiments.figures   # writes docs/size_quality_light.png and _dark.png
"""

from pathlib import Path
from typing import Any

from experiments.common.tables import Row, read_rows

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "experiments/rate_distortion/results/models.jsonl"
SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = {"wikitext2-valid": "WikiText-2", "docstrings": "Python docstrings"}
# Name in the picture: the beginning or the whole of a variant, colour, marker.
SERIES = {
    "jaxcompress, rate_distortion": ("planned, apart", "#0072B2", "o"),
    "jaxcompress, gptq": ("gptq(", "#56B4E9", "s"),
    "round to nearest": ("asymmetric(", "#999999", "X"),
    "llama.cpp, importance matrix": ("llama.cpp", "#D55E00", "^"),
    "AutoRound, 20 iterations": ("AutoRound", "#009E73", "D"),
}
INK = {"light": "#1f2328", "dark": "#e6edf3"}


def points(rows: list[Row], variant: str, text: str) -> list[tuple[float, float, str]]:
    """Choose `(bits per weight, KL, commit)` of a series; the most calibrated runs."""
    chosen = [
        row
        for row in rows
        if row["model"] == SMOL
        and row["embedding"] == 0
        and row["text"] == text
        and "timed" not in row["variant"]
        and (
            row["variant"].startswith(variant)
            if variant[-1] == "(" or variant in ("llama.cpp", "AutoRound")
            else row["variant"] == variant
        )
    ]
    most: dict[tuple[str, float], Row] = {}
    for row in chosen:
        key = row["variant"], row["rate"]
        if (
            key not in most
            or row["calibration_tokens"] >= most[key]["calibration_tokens"]
        ):
            most[key] = row
    return sorted(
        (row["bits_per_compressed_weight"], row["kl"], str(row["commit"])[:7])
        for row in most.values()
    )


def draw(theme: str) -> Any:
    """Draw both texts side by side, in the ink of a theme, on no background."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, ink = read_rows(ROWS), INK[theme]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(9, 4.3), sharey=True, layout="constrained"
    )
    commits: set[str] = set()
    for panel, (text, title) in zip(axes, TEXTS.items(), strict=True):
        for name, (variant, colour, marker) in SERIES.items():
            found = points(rows, variant, text)
            commits |= {commit for _, _, commit in found}
            ours = variant == "planned, apart"
            panel.plot(
                [x for x, _, _ in found],
                [y for _, y, _ in found],
                color=colour,
                marker=marker,
                linestyle="-" if "(" in variant or ours else "none",
                linewidth=2.5 if ours else 1.2,
                label=name,
            )
        panel.set_title(title, color=ink, fontsize=11)
        panel.set(yscale="log", xlim=(1.4, 4.8), ylim=(0.01, 15))
        panel.set_xlabel("bits per weight in the file", color=ink)
        panel.grid(alpha=0.25)
        panel.tick_params(which="both", colors=ink)
        panel.set_facecolor("none")
        for spine in panel.spines.values():
            spine.set_color(ink)
    ticks = [0.01, 0.1, 1, 10]
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("KL from the model, nats a token", color=ink)
    names, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        names,
        labels,
        loc="outside upper center",
        ncols=3,
        frameon=False,
        labelcolor=ink,
        fontsize=8.5,
    )
    figure.supxlabel(
        f"SmolLM2-135M, linear layers; rows of {', '.join(sorted(commits))}",
        color=ink,
        fontsize=6,
    )
    figure.patch.set_alpha(0)
    return figure


def path(theme: str) -> Path:
    """Return where the picture of a theme is stored."""
    return ROOT / "docs" / f"size_quality_{theme}.png"


def main() -> None:
    """Write the pictures of both themes."""
    for theme in INK:
        draw(theme).savefig(path(theme), dpi=120, transparent=True)


if __name__ == "__main__":
    main()
