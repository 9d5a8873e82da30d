"""What the README and the notebooks say runs."""

import ast
import copy
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest

from jaxcompress.cli import demo

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "run_notebooks"
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
# What replaces the values of the cell tagged "parameters".
FAST = {
    "WINDOWS": 2,
    "TRAIN_STEPS": 3,
    "CALIBRATION": 4,
    "KERNELS": '"layers/mlp/down_proj/kernel"',
}


def code_of(notebook):
    """The source of a notebook's code cells, without installation and shell lines."""
    cells = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        lines = [x for x in cell.source.splitlines() if not x.startswith(("%", "!"))]
        source = "\n".join(lines)
        if "parameters" in cell.metadata.get("tags", ()):
            for name, value in FAST.items():
                source = re.sub(rf"(?m)^{name} = \S+", f"{name} = {value}", source)
        cells.append(source)
    return cells


def readme_examples():
    """The README's blocks of Python."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_readme_examples_run(tmp_path, monkeypatch, capsys):
    """In order, in one namespace; each prints."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for source in readme_examples():
        exec(compile(source, "README.md", "exec"), names)
        assert capsys.readouterr().out


def test_readme_is_short():
    assert 6_000 <= (ROOT / "README.md").stat().st_size <= 8_500
    for source in readme_examples():
        assert len([line for line in source.splitlines() if line.strip()]) <= 12


@pytest.mark.slow
def test_demo_runs(tmp_path, capsys):
    rows = demo.run(tmp_path, limit=2, recipes=("symmetric(bits=4, block=64)",))
    assert [row["recipe"] for row in rows] == [
        "float32",
        "symmetric(bits=4, block=64)",
    ]
    dense, small = rows
    assert small["file bytes"] < dense["file bytes"] / 6
    assert 0 < small["KL"] < 0.2
    assert dense["bits/byte"] < small["bits/byte"] < 1.05 * dense["bits/byte"]
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for i, source in enumerate(code_of(notebook)):
        exec(compile(source, f"{notebook.name}, code cell {i}", "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(notebook):
    found = nbformat.read(notebook, as_version=4)
    nbformat.validate(found)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert "colab-badge.svg" in found.cells[0].source
    assert f"colab/{notebook.name}" in found.cells[0].source
    installs = [cell for cell in code if "pip install" in cell.source]
    assert len(installs) == 1 and installs[0].source.count("\n") == 0
    # Where the package is missing: from the clone, from PyPI, from the repository; pip
    # leaves a jax that meets the requirements as it is, unless it is told to upgrade.
    words = installs[0].source
    order = ["import jaxcompress", '"..[', '"jaxcompress[', "git+https"]
    assert sorted(order, key=words.index) == order
    assert not re.search(r"(?i)upgrade|-U\b|--force|\bjax\b(?!compress)", words)


def run_notebooks():
    """The script as a module; it has no suffix."""
    loader = importlib.machinery.SourceFileLoader("run_notebooks", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_and_small(notebook):
    """What `scripts/run_notebooks` stored: of all cells, without errors."""
    text = notebook.read_text("utf-8")
    assert len(text) < 100_000 and str(ROOT) not in text and "/tmp/" not in text
    stored = nbformat.reads(text, 4)
    code = [x for x in stored.cells if x.cell_type == "code"]
    assert all(x.execution_count for x in code if "pip install" not in x.source)
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert 0 < stored.metadata["processor_seconds"] < 180


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_what_to_look_at(notebook):
    """Before the code, after it, an exercise, and a figure with its numbers."""
    cells = nbformat.read(notebook, as_version=4).cells
    assert re.search(r"(?m)^\*\*Look at\*\* ", cells[0].source)
    assert cells[-1].source.startswith("## What you should have seen\n")
    assert re.search(r"(?m)^\*\*Exercise\.\*\* ", cells[-1].source)
    drawn = [x for cell in cells for x in cell.get("outputs", ()) if "data" in x]
    drawn = [output for output in drawn if "image/png" in output.data]
    assert drawn
    for output in drawn:
        series = [x for panel in output.metadata["figure"] for x in panel.values()]
        assert any(len(values) > 1 for one in series for values in one)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_recorded_rows_are_those_of_the_experiments(notebook):
    """`RECORDED` in a notebook: by file, entries that agree with one row at least."""
    for source in code_of(notebook):
        for node in ast.parse(source).body:
            names = [getattr(x, "id", "") for x in getattr(node, "targets", ())]
            if names != ["RECORDED"]:
                continue
            for file, entries in ast.literal_eval(node.value).items():
                rows = map(json.loads, (ROOT / file).read_text("utf-8").splitlines())
                rows = list(rows)
                for entry in entries:
                    assert any(agrees(entry, row) for row in rows), (file, entry)


def agrees(entry, row):
    """Whether a row has an entry's fields, numbers rounded as the entry has them."""
    for name, value in entry.items():
        if isinstance(value, float) and isinstance(row.get(name), float):
            digits = len(repr(value).split(".")[1])
            if abs(row[name] - value) > 0.5001 * 10 ** -max(digits, 3):
                return False
        elif row.get(name) != value:
            return False
    return True


@pytest.mark.nightly
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_are_drawn_again(notebook):
    """Executed anew, as a user would: the figures' numbers are those stored."""
    where = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(SCRIPT), "--check", str(notebook)]
    run = subprocess.run(command, capture_output=True, text=True, env=where)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


@pytest.mark.slow
def test_comparison_of_figures_sees_each_number():
    from matplotlib import pyplot

    script = run_notebooks()
    figure, (left, right) = pyplot.subplots(1, 2)
    left.plot([1, 2, 4], [0.5, 0.25, 0.125])
    left.scatter([1, 2], [3, 4])
    right.bar(["a", "b"], [3.0, 5.0])
    right.imshow(np.arange(6.0).reshape(2, 3))
    stored = [script.figure_data(figure)]
    pyplot.close(figure)
    assert stored[0][0]["lines"] == [[1, 2, 4, 0.5, 0.25, 0.125]]
    assert stored[0][0]["points"] == [[1, 2, 3, 4]]
    assert stored[0][1] == {"bars": [[3, 5]], "images": [[1, 4]]}
    script.compare_figures(stored, copy.deepcopy(stored), 0.05)
    for panel, artist in ((0, "lines"), (0, "points"), (1, "bars"), (1, "images")):
        for place in range(len(stored[0][panel][artist][0])):
            drawn = copy.deepcopy(stored)
            drawn[0][panel][artist][0][place] *= 1.04
            script.compare_figures(stored, drawn, 0.05)
            drawn[0][panel][artist][0][place] += 0.6
            with pytest.raises(ValueError, match=f"panel {panel}, {artist} 0"):
                script.compare_figures(stored, drawn, 0.05)
    for other in ([], [stored[0][:1]], [[stored[0][0], {"bars": [[3, 5]]}]]):
        with pytest.raises(ValueError, match="made otherwise"):
            script.compare_figures(stored, other, 0.05)
