"""The experiments on rate and distortion run, in small."""

import ctypes
import itertools
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

SEARCH = pathlib.Path(__file__).parents[2] / "experiments/rate_distortion/viterbi.c"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "states", "most"), [(4.05, 0, 0.30), (2.05, 128, 0.15)]
)
def test_the_gap_of_the_hardest_covariance(experiment, rate, states, most):
    """With half of its spectrum under the water at 2 bits; the full size, one seed."""
    module = experiment("rate_distortion.gaussian_bound")
    x = np.random.default_rng(1).standard_normal((192, 2048)).astype(np.float32)
    found = module.beside_the_bound(
        x,
        module.covariances(192)["rotated"],
        rate=rate,
        states=states,
        damping=1e-6,
        prior=0.5,
    )
    assert found["bits_per_weight"] == pytest.approx(rate, rel=0.005)
    assert 0 < found["gap"] < most


def even_neighbours(x, shift):
    """Compute all points of the moved D8 around `x`, by all roundings."""
    low = np.floor(x - shift)
    for up in itertools.product((0, 1), repeat=8):
        if (low + up).sum() % 2 == 0:
            yield low + up + shift


def test_the_nearest_point_of_e8_is_the_nearest_of_all(experiment):
    module = experiment("rate_distortion.lattice")
    x = 1.5 * np.random.default_rng(0).standard_normal((40, 8))
    x[0] = 0.5  # a point of the other coset
    x[1] = np.eye(8)[0]  # as far as can be
    for each, point in zip(x, module.nearest_point(x), strict=True):
        errors = [
            np.square(each - other).sum()
            for shift in (0, 0.5)
            for other in even_neighbours(each, shift)
        ]
        assert np.square(each - point).sum() == pytest.approx(min(errors))
        assert (2 * point).sum() % 4 == 0 and len(set(point % 1)) == 1


def test_points_of_e8_come_back(experiment):
    module = experiment("rate_distortion.lattice")
    x = np.random.default_rng(1).standard_normal((4, 40, 8))
    points, classes = module.nearest_point(2 * x), np.arange(40) % 3
    streams = module.code(points, classes)
    assert (module.decode(streams, classes, 4) == points).all()


@pytest.mark.slow
def test_points_of_e8_cost_what_they_should(experiment):
    """Within 0.03 bit of the 0.146 above the bound that E8 has at high rates."""
    module = experiment("rate_distortion.lattice")
    x = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)
    values, bits = module.at_rate(x, 4.0)
    rate, error = bits / x.size, np.square(values - x).mean() / np.square(x).mean()
    assert rate == pytest.approx(4.0, rel=0.01)
    assert 0.14 < rate + 0.5 * np.log2(error) < 0.18


def best_path(lut, x, bits, overlap):
    """Search the bitshift trellis as it is defined, in float64, state by state."""
    states = np.arange(lut.size)
    allowed = (states >> bits == overlap) | (overlap is None)
    cost, back = np.where(allowed, (lut - x[0]) ** 2, np.inf), []
    for value in x[1:]:
        before = (states >> bits)[:, None] + (
            np.arange(2**bits) << (lut.size.bit_length() - 1 - bits)
        )
        choice = cost[before].argmin(axis=1)
        back.append(before[states, choice])
        cost = cost[before].min(axis=1) + (lut - value) ** 2
    low = lut.size >> bits
    end = cost if overlap is None else np.where(states % low == overlap, cost, np.inf)
    path = [int(end.argmin())]
    for row in reversed(back):
        path.append(int(row[path[-1]]))
    return path[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_in_c_finds_the_best_path(bits, tmp_path):
    if shutil.which("gcc") is None or "avx512f" not in cpu_flags():
        pytest.skip("needs gcc and AVX-512")
    path = tmp_path / "viterbi.so"
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-o", path, SEARCH], check=True)
    random = np.random.default_rng(bits)
    room = np.empty(2**16 + 16, np.float32)
    start = -room.ctypes.data // 4 % 16
    lut = room[start : start + 2**16]
    lut[:] = random.standard_normal(2**16)
    x = random.standard_normal((12, 2)).astype(np.float32)
    overlap = random.integers(0, 2 ** (16 - bits), 2).astype(np.int32)
    search = ctypes.CDLL(str(path)).viterbi
    for shared in (None, overlap):
        found = np.empty((12, 2), np.int32)
        arrays = (lut, x, shared, found)
        search(
            *(a if a is None else ctypes.c_void_p(a.ctypes.data) for a in arrays),
            *(12, 2, bits),
        )
        for row in range(2):
            end = None if shared is None else int(shared[row])
            path_of_row = best_path(lut.astype(np.float64), x[:, row], bits, end)
            assert found[:, row].tolist() == path_of_row


def cpu_flags():
    info = pathlib.Path("/proc/cpuinfo")
    return info.read_text().split() if info.exists() else []
