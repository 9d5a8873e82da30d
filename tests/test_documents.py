"""What the README and the notebooks say runs."""

import pathlib
import re

import nbformat
import pytest

from jaxcompress.cli import demo

ROOT = pathlib.Path(__file__).parent.parent
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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_and_small(notebook):
    """What `scripts/run_notebooks` stored: of all cells or of none, without errors."""
    text = notebook.read_text("utf-8")
    assert len(text) < 100_000 and str(ROOT) not in text and "/tmp/" not in text
    code = [x for x in nbformat.reads(text, 4).cells if x.cell_type == "code"]
    counts = [x.execution_count for x in code if "pip install" not in x.source]
    assert not any(counts) or all(counts)
    outputs = [output for cell in code for output in cell.outputs]
    assert bool(outputs) == any(counts)
    assert all(output.output_type != "error" for output in outputs)
