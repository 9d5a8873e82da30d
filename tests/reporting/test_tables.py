"""Tables, JSON lines and progress."""

import dataclasses
import io
import itertools
import json
import math
import time

import numpy as np
import pytest

from jaxcompress import reporting
from jaxcompress.tree.compress import LeafReport


def leaf_report(name, before, after, error=0.5):
    weights = before // 4
    bits = 8 * after / weights
    return LeafReport(name, (weights,), "m()", before, after, bits, error, "")


def test_leaf_table_adds_up_what_it_does_not_list():
    reports = [leaf_report(f"leaf_{i}", 4000 + i, 1000) for i in range(5)]
    text = reporting.render(reporting.leaf_table(reports, largest=2))
    assert "leaf_4" in text and "leaf_3" in text and "leaf_2" not in text
    assert "3 more" in text and "12 003" in text
    assert "20 010" in text and "5 000" in text and "5 leaves" in text


def test_leaf_table_shows_bytes_in_the_file():
    reports = [leaf_report("a", 4000, 1000), leaf_report("b", 4000, 1000)]
    text = reporting.render(reporting.leaf_table(reports, {"a": 777, "b": 1}))
    assert "777" in text and "778" in text and "in file" in text


def test_table_of_rows():
    rows = [{"x": "one", "n": 12345}, {"x": "two", "n": None}]
    lines = reporting.render(reporting.table(rows)).splitlines()
    assert lines[1].split() == ["one", "12", "345"]
    assert lines[2].split() == ["two", "-"]


def test_size_is_the_length_of_the_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    params = {"kernel": np.zeros((10, 20), np.float32)}
    size = reporting.measure(params, tmp_path / "x", tmp_path / "x")
    assert (size.weights, size.memory_bytes, size.file_bytes) == (200, 800, 200)
    assert size.bits_per_weight == 8


def test_json_lines_are_appended_and_strict(tmp_path):
    @dataclasses.dataclass
    class Row:
        loss: float
        count: np.int64

    reporting.append_lines(tmp_path / "x", [{"loss": math.nan}])
    reporting.append_lines(tmp_path / "x", [Row(np.float32(0.5), np.int64(3))])
    lines = (tmp_path / "x").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"loss": None},
        {"loss": 0.5, "count": 3},
    ]


def test_track_says_rate_and_time_left(monkeypatch):
    clock = itertools.count(0, 20)  # 20 seconds pass at every look
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    items = [3, 5, 5, 7]
    seen = list(
        reporting.track(items, "work", unit="tokens", amount=int, stream=stream)
    )
    assert seen == items
    lines = stream.getvalue().splitlines()
    assert lines[0] == "work: 1/4, 0:20 so far"  # with compilation, and no rate
    assert lines[2] == "work: 3/4, 0.25 tokens/s, 0:20 left, 1:00 so far"


def test_track_without_length_and_quick_says_nothing():
    stream = io.StringIO()
    assert list(reporting.track(iter("ab"), "work", stream=stream)) == ["a", "b"]
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")]
)
def test_clock(seconds, text):
    assert reporting.clock(seconds) == text
