"""Work on chunks and arrays in threads: order, bounds, the same bytes."""

import functools
import os
import threading
import time
import weakref

import numpy as np
import pytest
from trees_for_tests import check_same

from jaxcompress import storage
from jaxcompress.coding import threads
from jaxcompress.coding.threads import in_order
from jaxcompress.storage import file_writer, tree_json


def test_threads_give_chunks_in_order():
    seen = set()

    def work(i):
        seen.add(threading.get_ident())
        return i * i

    assert list(in_order(work, range(50), threads=3)) == [i * i for i in range(50)]
    assert list(in_order(work, range(3), threads=1)) == [0, 1, 4]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 // i, range(5), threads=2))


def test_threads_are_no_more_than_memory_bears(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    names = set()

    def work(_):
        time.sleep(0.002)
        names.add(threading.get_ident())

    for _ in in_order(work, range(100)):
        pass
    assert 1 < len(names) <= threads.THREADS < 64


def small_arrays():
    """Tiny ones, ones for a thread each, a large one among them, one without words."""
    random = np.random.default_rng(1)
    sizes = [
        70,
        3000,
        1500,
        30,
        2000,
        9000,
        8500,
        900,
        0,
        4000,
        2500,
        1000,
        8000,
        20,
        5000,
    ]
    return {
        f"{i:02}": random.normal(0, 1, n).astype(np.float32)
        for i, n in enumerate(sizes)
    }


@pytest.fixture
def bounds(monkeypatch):
    """So that arrays of thousands of bytes count as millions do."""
    monkeypatch.setattr(threads, "TINY", 1 << 12)
    monkeypatch.setattr(threads, "SMALL", 1 << 15)
    monkeypatch.setattr(threads, "TOGETHER", 48_000)
    return monkeypatch


def test_bytes_do_not_depend_on_threads(bounds, tmp_path):
    path = tmp_path / "x.safetensors"
    tree = small_arrays()
    found = set()
    for count in (1, 2, 5):
        bounds.setattr(os, "cpu_count", lambda count=count: count)
        storage.save(path, tree)
        found.add(path.read_bytes())
        check_same(storage.load(path, numpy=True), tree)
    for limit in ("TINY", "SMALL"):
        bounds.setattr(threads, limit, 1 << 62)
        storage.save(path, tree)
        found.add(path.read_bytes())
    assert len(found) == 1


def test_arrays_are_fetched_in_order_and_few_at_a_time(bounds, tmp_path):
    """By this thread, with one tick of progress for each; coded by others too."""
    tree, live, most, seen, used = small_arrays(), {}, [], [], set()
    choose = file_writer.array_codecs.choose

    def fetch(name):
        assert threading.current_thread() is threading.main_thread()
        array = tree[name].copy()
        live[name] = array.nbytes
        weakref.finalize(array, live.pop, name)
        most.append((sum(live.values()), len(live)))
        assert max(live.values()) <= threads.SMALL or len(live) == 1
        seen.append(name)
        return array

    def spy(array, **options):
        used.add(threading.get_ident())
        return choose(array, **options)

    def progress(names):
        for name in names:
            yield name
            assert seen[-1] == name

    bounds.setattr(os, "cpu_count", lambda: 3)
    bounds.setattr(file_writer.array_codecs, "choose", spy)
    slots = {
        name: tree_json.Slot("float32", x.shape, functools.partial(fetch, name))
        for name, x in tree.items()
    }
    with open(tmp_path / "x", "wb") as file:
        file_writer.write(file, slots, {}, progress=progress)
    assert seen == list(tree) and len(used) > 1
    largest, together = (max(column) for column in zip(*most, strict=True))
    assert largest <= threads.TOGETHER and together > 1
