"""A full disk, or a process killed, while a directory is packed or unpacked."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxcompress import storage

ROOM = 100_000  # bytes that a file may have; there is no room for more

# Runs the command line where no file grows beyond ROOM, as on a disk without room.
FULL = f"""
import resource, signal, sys
from jaxcompress import cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({ROOM}, {ROOM}))
sys.exit(cli.main(sys.argv[1:]))
"""

# Packs or unpacks, and is killed at a moment: when two parts or files of many are
# written, or when everything is, in front of the call that puts it in its place.
KILLED = """
import os, signal, sys
from jaxcompress import storage

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(items):
    for number, item in enumerate(items):
        if moment == "two" and number == 2:
            kill()
        yield item

what, source, target, moment = sys.argv[1:]
if moment != "two":
    setattr(os, moment, kill)
getattr(storage, what)(source, target, progress=progress)
"""


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def left(folder):
    """What stands in a directory beside what this file puts there."""
    return sorted(set(os.listdir(folder)) - {"in", "x"})


@pytest.fixture
def given(tmp_path):
    """A directory that is larger than ROOM, packed before it grew."""
    random = np.random.default_rng(0)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (tmp_path / "in" / name).write_bytes(random.bytes(ROOM // 2))
    storage.pack(tmp_path / "in", tmp_path / "x")
    (tmp_path / "in" / "sub" / "d").write_bytes(random.bytes(2 * ROOM))
    return tmp_path


def test_a_full_disk_leaves_the_old_archive(given):
    old = (given / "x").read_bytes()
    found = run(FULL, "pack", given / "in", given / "x")
    assert found.returncode == 2
    error = found.stderr.splitlines()[-1]
    assert "file too large" in error and str(given / "x") in error
    assert "Traceback" not in found.stderr
    assert (given / "x").read_bytes() == old and left(given) == []


def test_a_full_disk_leaves_no_directory(given):
    """Nor those made to hold it; the error names the file that did not fit."""
    storage.pack(given / "in", given / "x")
    target = given / "new" / "deep" / "out"
    found = run(FULL, "unpack", given / "x", target)
    assert found.returncode == 2
    error = found.stderr.splitlines()[-1]
    assert "file too large" in error and str(target / "sub" / "d") in error
    assert "Traceback" not in found.stderr
    assert left(given) == []


@pytest.mark.parametrize("moment", ["two", "replace"])
def test_an_archive_survives_a_killed_process(given, moment):
    old = (given / "x").read_bytes()
    found = run(KILLED, "pack", given / "in", given / "x", moment)
    assert found.returncode == -signal.SIGKILL
    assert (given / "x").read_bytes() == old
    storage.verify(given / "x")
    (rest,) = left(given)
    assert rest.startswith(".x.")
    if moment == "replace":  # parts are read ahead of what is written
        assert (given / rest).stat().st_size > ROOM
    storage.pack(given / "in", given / "x")
    storage.unpack(given / "x", given / "out")
    assert contents(given / "out") == contents(given / "in")


@pytest.mark.parametrize("moment", ["two", "rename"])
def test_a_killed_process_leaves_no_directory(given, moment):
    storage.pack(given / "in", given / "x")
    found = run(KILLED, "unpack", given / "x", given / "out", moment)
    assert found.returncode == -signal.SIGKILL
    (rest,) = left(given)
    assert rest.startswith(".out.") and contents(given / rest)
    storage.unpack(given / "x", given / "out")
    assert contents(given / "out") == contents(given / "in")
