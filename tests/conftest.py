"""Strict JAX for every test: two fake devices, no silent rank promotion.

Each file has a budget of processor time, compilation included; files over it are named
at the end of a run. All processes of a run share what they compile. A process that has
grown forgets its programs after a file.

Most of the time is compilation of small programs, so that the compiler's optimization
is off, unless XLA_FLAGS names a level: `.ci/nightly` runs everything again with it.
"""

import atexit
import collections
import json
import os
import pathlib
import resource
import shutil
import tempfile
import time

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
for flag, value in {
    "xla_force_host_platform_device_count": 2,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}.items():
    if flag not in flags:
        flags += f" --{flag}={value}"
os.environ["XLA_FLAGS"] = flags

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="jaxcompress-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

BUDGET = 60.0  # processor seconds per file, on both cores together
LIMITS = {"slow": 0.6, "nightly": 6.0}  # processor seconds of one test
GROWN = 1.0e9  # resident bytes at which a process forgets its programs
spent = collections.Counter()  # by test
largest = collections.Counter()  # resident bytes, by process
last = time.process_time()


def pytest_addoption(parser):
    parser.addoption(
        "--seconds", metavar="FILE", help="write each test's processor seconds as JSON"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Tests are slow or nightly as their marks or `seconds.json` say.

    It holds what tests took (`--seconds FILE`). What is longest runs only where it is
    asked for: -m nightly.
    """
    seconds = json.loads((pathlib.Path(__file__).parent / "seconds.json").read_text())
    for item in items:
        for mark, limit in LIMITS.items():
            if seconds.get(item.nodeid, 0) > limit:
                item.add_marker(mark)
    if "nightly" not in config.option.markexpr:
        items[:] = [x for x in items if not x.get_closest_marker("nightly")]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Programs are freed between files, where they have become many."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if memory > GROWN and (nextitem is None or nextitem.path != item.path):
        jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Each report carries the processor time since the last one of its process."""
    global last
    report = yield
    now = time.process_time()
    report.processor_seconds, last = now - last, now
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.process = os.getpid(), memory
    return report


def pytest_runtest_logreport(report):
    """Sums them up, where tests run in several processes too."""
    spent[report.nodeid] += getattr(report, "processor_seconds", 0)
    process, memory = getattr(report, "process", (0, 0))  # a crash leaves no report
    largest[process] = max(largest[process], memory)


def pytest_terminal_summary(terminalreporter, config):
    files = collections.Counter()
    for name, seconds in spent.items():
        files[name.split("::")[0]] += seconds
    for name, seconds in files.most_common():
        if seconds > BUDGET:
            terminalreporter.write_line(
                f"{name}: {seconds:.0f} s of processor time, over its budget of "
                f"{BUDGET:.0f} s"
            )
    terminalreporter.write_line(
        f"{spent.total():.0f} s of processor time in all, at most "
        f"{max(largest.values(), default=0) / 1e9:.2f} GB a process"
    )
    if config.option.seconds:
        with open(config.option.seconds, "w") as file:
            json.dump(dict(spent.most_common()), file, indent=0)
