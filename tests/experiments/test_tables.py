"""Every table of the pages is what its rows say."""

import json
import re
import subprocess
import sys

import pytest

from experiments.common import tables
from experiments.tables import main

ROOT = tables.ROOT


@pytest.mark.parametrize("room", tables.rooms())
def test_page_is_fresh(room):
    page = tables.page(room).read_text(encoding="utf-8")
    assert tables.refresh(room) == page, "python -m experiments.tables writes it anew"


def test_every_file_of_results_is_in_a_table():
    shown = {
        ROOT / room / "results" / f"{table.results}.jsonl"
        for room in tables.rooms()
        for table in tables.tables_of(room).values()
    }
    assert shown == set(ROOT.glob("*/results/*.jsonl"))


def test_the_index_names_every_page_and_is_short():
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(index.splitlines()) <= 120
    linked = set(re.findall(r"\((\w+)/README\.md\)", index))
    assert linked == set(tables.rooms())
    assert linked == {path.parent.name for path in ROOT.glob("*/README.md")}


def test_tables_are_compared_without_jax():
    code = """
import sys
from experiments.tables import main
assert main(check=True) == []
assert "jax" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True)


ROWS = [
    {"name": "a", "text": "x", "kl": 0.1234, "commit": "abcdefghi", "jax": "1"},
    {"name": "b", "text": "x", "kl": 2.0, "jax": "1", "device": "cpu", "format": 3},
    {"name": "a", "text": "y", "kl": 3.0, "commit": "abcdefghi", "jax": "2"},
]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A room of one table, whose page is out of date."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    folder = tmp_path / "room"
    (folder / "results").mkdir(parents=True)
    lines = "\n".join(map(json.dumps, ROWS))
    (folder / "results" / "question.jsonl").write_text(lines)
    (folder / "README.md").write_text("<!-- table: one -->\nold\n<!-- end -->\nText\n")
    table = tables.Table(
        "question",
        "room.question",
        {"name": "`{name}`", "x": "{x[kl]:.2f}", "y": "{y[kl]:.2f}"},
        lambda rows: tables.spread(rows, "text", "name"),
        files=2,
    )
    monkeypatch.setattr(tables, "tables_of", lambda room: {"one": table})
    monkeypatch.setattr("experiments.tables.rooms", lambda: ["room"])
    return folder


def test_a_page_out_of_date_is_found_and_written(room):
    page = room / "README.md"
    before = page.read_text()
    assert main(check=True) == ["room"] and page.read_text() == before
    assert main() == ["room"] and main(check=True) == []
    assert page.read_text() == (
        "<!-- table: one -->\n"
        "| name | x | y |\n| --- | --- | --- |\n"
        "| `a` | 0.12 | 3.00 |\n| `b` | 2.00 |  |\n\n"
        "<sub>`python -m experiments.room.question`; commit abcdefg; some without a "
        "commit; jax 1, 2; cpu; files of format 2 and 3</sub>\n"
        "<!-- end -->\nText\n"
    )


def test_a_table_without_its_comments_raises(room):
    (room / "README.md").write_text("Text\n")
    with pytest.raises(ValueError, match=r"tables \[\].*\['one'\]"):
        tables.refresh("room")


def test_rows_are_chosen_and_joined():
    assert tables.where(text="x", name=("a", "c"))(ROWS) == ROWS[:1]
    assert tables.last(ROWS, "name") == [ROWS[2], ROWS[1]]
    assert tables.spread(ROWS[::2], "text", "name") == [
        {"name": "a", "x": ROWS[0], "y": ROWS[2]}
    ]


def test_cells_are_written_as_asked():
    row = {"x": 0.12345, "y": None}
    assert tables.cell(row, "{x:.2f}") == "0.12"
    assert tables.cell(row, "{y:.2f}") == tables.cell(row, "{z}") == ""
    assert tables.percent("x", 1)(row) == "12.3 %"
    assert tables.scaled("x", 1000, 0)(row) == "123"
    assert tables.named("x", {0.12345: "one"})(row) == "one"
    assert tables.short(9443.882) == "9443.88" and tables.short(5.6e6) == "5.6e6"


@pytest.mark.parametrize(
    ("columns", "recipe", "message"),
    [
        ({"recipe": "{recipe}"}, "none", "no row of nearest.jsonl"),
        ({"of": "{kl_}", "recipe": "{recipe}"}, "float32", r"has a value for \['of'\]"),
    ],
)
def test_a_table_that_shows_nothing_raises(columns, recipe, message):
    table = tables.Table("nearest", "c", columns, tables.where(recipe=recipe))
    with pytest.raises(ValueError, match=message):
        tables.render(table, "quantization")
