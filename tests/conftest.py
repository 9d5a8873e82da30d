"""Strict JAX for every test: two fake devices, no silent rank promotion.

Each file has a budget of processor time, compilation included; files over it are named
at the end of a run. All processes of a run share what they compile.
"""

import atexit
import collections
import os
import shutil
import tempfile
import time

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="jaxcompress-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

BUDGET = 60.0  # processor seconds per file, on both cores together
spent = collections.Counter()
last = time.process_time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Each report carries the processor time since the last one of its process."""
    global last
    report = yield
    now = time.process_time()
    report.processor_seconds, last = now - last, now
    return report


def pytest_runtest_logreport(report):
    """Sums them up, where tests run in several processes too."""
    spent[report.nodeid.split("::")[0]] += report.processor_seconds


def pytest_terminal_summary(terminalreporter):
    for name, seconds in spent.most_common():
        if seconds > BUDGET:
            terminalreporter.write_line(
                f"{name}: {seconds:.0f} s of processor time, over its budget of "
                f"{BUDGET:.0f} s"
            )
    total = sum(spent.values())
    terminalreporter.write_line(f"{total:.0f} s of processor time in all")
