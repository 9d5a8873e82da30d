"""Pictures show the numbers that they are given, with titles and units."""

import io

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import plots
from jaxcompress.evaluation.sweep import Point

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    kernel = jax.numpy.asarray(random.normal(size=(64, 96)), "float32")
    return {"mlp": {"kernel": kernel}, "norm": {"scale": jax.numpy.ones(64)}}


def drawn(figure):
    """Draws a figure, so that ticks and labels exist; returns its axes with data."""
    figure.savefig(io.BytesIO(), format="png")
    return [axes for axes in figure.axes if axes.has_data()]


def test_sizes_and_divergences_are_where_they_belong():
    points = [
        Point("nf4()", 2_000_000, 4.0, 0.02, 0.001, 12.0, 10.0, "nf4"),
        Point("symmetric(bits=3)", 1_500_000, 3.0, 0.1, 0.004, 13.0, 10.0, "symmetric"),
        Point("symmetric(bits=2)", 1_000_000, 2.0, 1.0, None, 20.0, 10.0, "symmetric"),
    ]
    (axes,) = drawn(plots.size_quality(points))
    assert "MB" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    lines = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(lines[0], [[1.0, 1.0], [1.5, 0.1]])
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["nf4", "symmetric"]
    ticks = [tick.get_text() for tick in axes.get_xticklabels() if tick.get_text()]
    assert ticks and not any("10^" in tick or "times" in tick for tick in ticks)


def test_bits_and_errors_of_leaves(params):
    small = jc.compress(params, "symmetric(bits=4, block=32)")
    report = jc.report(params, small)
    left, right = drawn(plots.layers(report))
    (bar,) = left.patches
    row = report["mlp/kernel"]
    stored = 8 * report.file_bytes["mlp/kernel"] / (64 * 96)
    assert bar.get_width() == pytest.approx(stored)
    (line,) = right.lines
    assert line.get_xdata()[0] == row.relative_error > 0
    assert right.get_xlim()[1] > 1.05 * row.relative_error  # the marker is whole


def test_energy_left_out_ends_at_the_last_value():
    x = np.diag([3.0, 2.0, 1.0])
    (axes,) = drawn(plots.spectra({"kernel": jax.numpy.asarray(x, "float32")}))
    energy = axes.lines[0].get_ydata()
    np.testing.assert_allclose(energy, np.array([14, 5, 1]) / 14, rtol=1e-6)


def test_histograms_show_the_steps_of_codes(params):
    small = jc.compress(params, "symmetric(bits=2)")
    axes = drawn(plots.histograms(params, small))[0]
    counts, _ = np.histogram(jc.materialize(small)["mlp"]["kernel"], 161)
    assert axes.get_title().startswith("mlp/kernel") and (counts > 0).sum() < 161


def test_zeros_of_a_pruned_leaf_do_not_hide_the_others(params):
    small = jc.compress(params, "magnitude(sparsity=0.75)")
    axes = drawn(plots.histograms(params, small))[0]
    counts, *_ = np.histogram(params["mlp"]["kernel"], 161, density=True)
    assert axes.get_title() == "mlp/kernel, after: 75% zero"
    assert axes.get_ylim()[1] < 2 * counts.max()


def test_the_first_layer_of_a_stack_is_drawn_and_said(params):
    stacked = jax.tree.map(lambda x: jax.numpy.stack([x, 2 * x]), params)
    axes = drawn(plots.histograms(stacked, stacked, ["mlp/kernel"]))[0]
    assert axes.get_title() == "mlp/kernel[0]" and len(axes.patches) == 161


def test_masks_tell_the_share_that_stays(params):
    pruned = jc.compress(params, "magnitude(sparsity=0.75)")
    axes = drawn(plots.masks(pruned))[0]
    assert "25.0% nonzero" in axes.get_title()
    image = axes.images[0].get_array()
    assert np.mean(image) == pytest.approx(0.25, abs=1e-3)


def test_squares_of_large_masks_are_means():
    alive = np.zeros((600, 3), bool)
    alive[:300] = True
    pooled = plots._pooled(alive)
    assert pooled.shape == (200, 3) and pooled[0, 0] == 1 and pooled[-1, 0] == 0


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.size_quality([]), "jc.sweep"),
        (lambda: plots.layers([]), "nothing to plot"),
        (lambda: plots.spectra({"a": np.ones((4, 4))}, ["b"]), "no leaf 'b'"),
        (lambda: plots.spectra({"a": np.ones(4)}), "no matrix"),
    ],
)
def test_what_cannot_be_plotted_is_said(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
