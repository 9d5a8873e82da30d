"""Pictures of what compression did; they need matplotlib (`jaxcompress[plots]`).

Each function returns a figure: `jc.plots.layers(report).savefig("layers.svg")`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params

__all__ = ["histograms", "layers", "masks", "size_quality", "spectra"]

# Okabe and Ito's palette, which colour-blind readers tell apart; markers help in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MOST_ROWS = 40  # of leaves in one picture
SHOWN = 6  # leaves in a picture of curves
SAMPLE = 200_000  # weights that a histogram counts
PIXELS = 256  # of a mask's sides, at most


def size_quality(points: Iterable[Any], *, title: str = "Size and quality") -> Any:
    """Plot KL against the size of the file, both on logarithmic axes.

    Args:
      points: with `name`, `file_bytes`, `kl`, `kl_standard_error`, `group`: those of
        `sweep`. Points of a group are joined.
      title: of the picture.

    Raises:
      ValueError: no points.

    Example:
      >>> points = jc.sweep(model, params, ["symmetric(bits=3)"], windows)
      >>> figure = jc.plots.size_quality(points)
    """
    groups: dict[str, list[Any]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    if not groups:
        raise ValueError("there are no points to plot; make some with jc.sweep")
    figure, axes = _figure(7, 4.5)
    for number, (name, each) in enumerate(groups.items()):
        each = sorted(each, key=lambda point: point.file_bytes)
        errors = [point.kl_standard_error or 0.0 for point in each]
        axes.errorbar(
            [point.file_bytes / 1e6 for point in each],
            [max(point.kl, 1e-9) for point in each],
            yerr=errors if any(errors) else None,
            color=COLORS[number % len(COLORS)],
            # Repeated colours get other markers.
            marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
            linestyle="-" if name else "none",
            capsize=2,
            label=name or None,
        )
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("file, MB")
    axes.set_ylabel("KL(model || small), nats per token")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.grid(which="both", alpha=0.25)
    if any(groups):
        axes.legend(frameon=False)
    return figure


def layers(report: Iterable[Any], *, title: str = "Bits and errors by leaf") -> Any:
    """Plot bits per weight in the file, and the relative error, of each leaf.

    Args:
      report: of `jc.report`, or `Shrunk.report`; the leaves with most weights are
        shown, in the order of the tree.
      title: of the picture.

    Raises:
      ValueError: no leaf that was compressed.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=4)")
      >>> figure = jc.plots.layers(jc.report(params, small))
    """
    stored = getattr(report, "file_bytes", {})
    rows = [row for row in report if row.relative_error]  # those that changed
    if not rows:
        raise ValueError(
            "no leaf of the report was compressed; there is nothing to plot"
        )
    largest = sorted(rows, key=lambda row: -np.prod(row.shape))[:MOST_ROWS]
    rows = [row for row in rows if row in largest]
    figure, (left, right) = _figure(9, 1.4 + 0.22 * len(rows), columns=2, share=True)
    places = np.arange(len(rows))
    bits = [
        8 * stored[row.name] / np.prod(row.shape)
        if row.name in stored
        else row.bits_per_weight
        for row in rows
    ]
    left.barh(places, bits, color=COLORS[0])
    left.set_yticks(places, [row.name for row in rows], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("bits per weight in the file" if stored else "bits per weight")
    right.plot(
        [row.relative_error for row in rows],
        places,
        COLORS[1],
        marker=MARKERS[1],
        linestyle="none",
        label="of weights",
    )
    errors = [(row.output_error, i) for i, row in enumerate(rows) if row.output_error]
    if errors:
        right.plot(
            *zip(*errors, strict=True),
            COLORS[2],
            marker=MARKERS[2],
            linestyle="none",
            label="of outputs",
        )
    right.set_xlabel("relative error")
    largest_error = max(max(row.relative_error, row.output_error or 0) for row in rows)
    right.set_xlim(0, 1.08 * largest_error)  # markers are whole at the edge
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
    figure.suptitle(title)
    return figure


def spectra(
    params: Params,
    names: Sequence[str] | None = None,
    *,
    title: str = "Singular values",
) -> Any:
    """Plot the energy that the first singular values of each matrix leave out.

    Args:
      params: a tree; of a stacked weight the first slice is taken.
      names: of leaves; None: the largest matrices.
      title: of the picture.

    Raises:
      ValueError: an unknown name, or no matrix.

    Example:
      >>> figure = jc.plots.spectra(params)
    """
    figure, axes = _figure(7, 4.5)
    for number, (name, x) in enumerate(_matrices(params, names)):
        values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
        energy = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)
        share = np.linspace(0, 1, len(energy))
        axes.plot(
            share[:-1],
            np.maximum(energy[:-1] / max(energy[0], 1e-30), 1e-6),
            color=COLORS[number % len(COLORS)],
            linestyle=("-", "--", ":")[number % 3],
            label=name,
        )
    axes.set(yscale="log", title=title, xlim=(0, 1))
    axes.set_xlabel("rank, as a fraction of full rank")
    axes.set_ylabel("share of the squared weights left out")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)
    return figure


def histograms(
    params: Params,
    small: Params = None,
    names: Sequence[str] | None = None,
    *,
    title: str = "Weights",
) -> Any:
    """Plot the distribution of weights, before and after, leaf by leaf.

    Args:
      params: the tree before.
      small: the tree after, or None.
      names: of leaves; None: the largest matrices.
      title: of the picture.

    Raises:
      ValueError: an unknown name, or no matrix.

    Example:
      >>> figure = jc.plots.histograms(params)
    """
    chosen = _matrices(params, names)
    later = {} if small is None else dict(roots(small))
    rows = -(-len(chosen) // 2)
    figure, grid = _figure(8, 0.8 + 1.9 * rows, rows=rows, columns=2)
    grid = np.atleast_1d(grid).reshape(-1)
    for axes, (name, x) in zip(grid, chosen, strict=False):
        before = _sampled(x)
        spread = max(float(np.std(before)), 1e-12)
        bins = np.linspace(-4 * spread, 4 * spread, 161)
        counts, *_ = axes.hist(
            before, bins, color=COLORS[5], density=True, label="before"
        )
        name_of_leaf = name.removesuffix("[0]")
        if name_of_leaf in later:
            after = _sampled(_slice(dense(later[name_of_leaf])))
            counts_after, *_ = axes.hist(
                after,
                bins,
                color=COLORS[1],
                density=True,
                histtype="step",
                label="after",
            )
            middle = len(counts_after) // 2
            zeros, counts_after[middle] = counts_after[middle], 0
            top = 1.1 * max(counts.max(), counts_after.max())
            if zeros > 3 * top:  # pruned: zeros would hide the others
                axes.set_ylim(0, top)
                name = f"{name}, after: {np.mean(after == 0):.0%} zero"
        axes.set_title(name, fontsize=8)
        axes.set_yticks([])
        axes.set_ylabel("density", fontsize=7)
        axes.set_xlabel("weight", fontsize=7)
        axes.tick_params(labelsize=7)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    if small is not None:
        grid[0].legend(frameon=False, fontsize=7)
    figure.suptitle(title)
    return figure


def masks(
    small: Params, names: Sequence[str] | None = None, *, title: str = "Nonzero weights"
) -> Any:
    """Plot where weights are not zero, as densities of small squares.

    Args:
      small: a pruned tree, dense or `Sparse`.
      names: of leaves; None: the largest matrices.
      title: of the picture.

    Raises:
      ValueError: an unknown name, or no matrix.

    Example:
      >>> figure = jc.plots.masks(jc.compress(params, "magnitude(sparsity=0.5)"))
    """
    chosen = _matrices(small, names)
    rows = -(-len(chosen) // 3)
    figure, grid = _figure(9, 0.8 + 3.0 * rows, rows=rows, columns=3)
    grid = np.atleast_1d(grid).reshape(-1)
    image = None
    for axes, (name, x) in zip(grid, chosen, strict=False):
        alive = np.asarray(x) != 0
        image = axes.imshow(
            _pooled(alive), cmap="cividis", vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_title(f"{name}\n{alive.mean():.1%} nonzero", fontsize=7)
        axes.set_xlabel("columns", fontsize=7)
        axes.set_ylabel("rows", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(grid), shrink=0.7, label="share that is nonzero")
    figure.suptitle(title)
    return figure


def _matrices(
    params: Params, names: Sequence[str] | None
) -> list[tuple[str, jax.Array]]:
    """Name and first slice, as `[0]`, of the leaves that a picture shows."""
    leaves: Mapping[str, Any] = dict(roots(params))
    if names is None:
        large = [n for n, x in leaves.items() if x.ndim > 1 and min(x.shape[-2:]) > 1]
        names = sorted(large, key=lambda n: -np.prod(leaves[n].shape))[:SHOWN]
    for name in names:
        if name not in leaves:
            raise ValueError(
                f"the tree has no leaf {name!r}; leaf_names(params) lists all"
            )
        if leaves[name].ndim < 2:
            raise ValueError(f"{name} has shape {leaves[name].shape}: it is no matrix")
    if not names:
        raise ValueError("the tree has no matrix to plot")
    return [
        (name + "[0]" * (leaves[name].ndim > 2), _slice(dense(leaves[name])))
        for name in names
    ]


def _slice(x: jax.Array) -> jax.Array:
    return x[(0,) * (x.ndim - 2)]


def _sampled(x: jax.Array) -> np.ndarray:
    flat = np.asarray(x, np.float32).reshape(-1)
    return flat[:: max(1, flat.size // SAMPLE)]


def _pooled(alive: np.ndarray) -> np.ndarray:
    """Return means over rectangles, so that no side has more than `PIXELS`."""
    rows, columns = (-(-side // PIXELS) for side in alive.shape)
    padded = np.pad(
        alive.astype(np.float32),
        ((0, -alive.shape[0] % rows), (0, -alive.shape[1] % columns)),
        mode="edge",
    )
    shape = padded.shape[0] // rows, rows, padded.shape[1] // columns, columns
    return padded.reshape(shape).mean(axis=(1, 3))


def _figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, share: bool = False
) -> Any:
    """Return a figure and its axes, without a window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'jaxcompress[plots]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=share)


def _plain_ticks(axis: Any) -> None:
    """Write ticks of a logarithmic axis as plain numbers, few enough to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
