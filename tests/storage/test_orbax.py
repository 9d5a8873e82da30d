"""Orbax checkpoints of compressed parameters: no target, any sharding, two hosts."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from trees_for_tests import TREES, check_same, trees

import jaxcompress as jc
from jaxcompress import storage


def mesh():
    return Mesh(np.asarray(jax.devices()), ("x",), axis_types=(AxisType.Auto,))


def placed(*spec):
    return NamedSharding(mesh(), PartitionSpec(*spec))


@trees
def test_needs_no_target(name, tmp_path):
    storage.save_orbax(tmp_path / "a", TREES[name])
    check_same(storage.restore_orbax(tmp_path / "a"), TREES[name])


def test_restores_where_it_is_told(tmp_path):
    kernel = jax.device_put(jnp.arange(24.0).reshape(4, 6), placed("x"))
    tree = {
        "kernel": jc.Reshaped(kernel, (4, 2, 3), (-3, -2, -1)),
        "bias": jnp.ones(2),
        "none": jnp.zeros((0, 2)),
    }
    storage.save_orbax(tmp_path / "a", tree)

    def by_name(name, shape):
        assert name in ("kernel/inner", "bias", "none")
        return placed(None, "x") if name == "kernel/inner" else placed()

    by_tree = {"kernel": placed(None, "x"), "bias": placed(), "none": placed()}
    for sharding, spec in [
        (placed("x"), placed("x")),
        (by_name, placed(None, "x")),
        (by_tree, placed(None, "x")),
    ]:
        found = storage.restore_orbax(tmp_path / "a", sharding=sharding)
        check_same(found, tree)
        assert found["kernel"].inner.sharding.is_equivalent_to(spec, 2)
        doubled = jax.jit(lambda tree: jc.materialize(tree["kernel"]) * 2)(found)
        np.testing.assert_array_equal(doubled, kernel.reshape(4, 2, 3) * 2)
    with pytest.raises(ValueError, match=r"bias \(2,\) can't be placed"):
        storage.restore_orbax(tmp_path / "a", sharding=placed(None, "x"))


@pytest.mark.parametrize(
    ("wrote", "advice"), [(1, "with what wrote it"), (9, "update")]
)
def test_other_formats_say_what_to_do(wrote, advice, tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(storage.orbax, "VERSION", wrote)
        storage.save_orbax(tmp_path / "x", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=f"of format {wrote}, .*{advice}"):
        storage.restore_orbax(tmp_path / "x")


def test_errors(tmp_path):
    storage.save_orbax(tmp_path / "a", {"a": jnp.ones(1)})
    with pytest.raises(ValueError, match="exists"):
        storage.save_orbax(tmp_path / "a", {"a": jnp.ones(1)})
    with pytest.raises(FileNotFoundError):
        storage.restore_orbax(tmp_path / "none")
    handler = orbax.checkpoint.PyTreeCheckpointHandler()
    with orbax.checkpoint.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "foreign", {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="not a checkpoint of save_orbax"):
        storage.restore_orbax(tmp_path / "foreign")


HOST = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress import storage

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
mesh = Mesh(np.asarray(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("x"))
whole = NamedSharding(mesh, PartitionSpec())
dense = np.arange(48, dtype=np.uint8).reshape(8, 6) % 16
codes = jax.make_array_from_callback(dense.shape, rows, lambda at: dense[at])
codes = jax.jit(lambda codes: codes.astype(jnp.uint4))(codes)
tree = {"kernel": jc.Reshaped(codes, (8, 2, 3), (-3, -2, -1)), "own": jnp.arange(3)}
storage.save_orbax(sys.argv[1], tree)
place = lambda name, shape: rows if shape == dense.shape else whole
for sharding, wanted in ((None, whole), (place, rows)):
    found = storage.restore_orbax(sys.argv[1], sharding=sharding)
    inner = found["kernel"].inner
    assert inner.sharding.is_equivalent_to(wanted, 2), inner.sharding
    assert inner.dtype == jnp.uint4 and found["kernel"].order == (-3, -2, -1)
    for shard in inner.addressable_shards:
        part = np.asarray(shard.data).astype(np.uint8)
        assert np.array_equal(part, dense[shard.index])
    assert np.array_equal(found["own"].addressable_data(0), np.arange(3))
try:
    storage.save(sys.argv[1] + ".safetensors", tree)
except ValueError as error:
    assert "save_orbax" in str(error)
else:
    raise SystemExit("save wrote a part of an array")
"""


@pytest.mark.slow
def test_two_hosts_save_and_restore(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "error", "-c", HOST, str(tmp_path / "a"), port]
    hosts = [
        subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, env=os.environ)
        for i in range(2)
    ]
    try:
        for host in hosts:
            _, log = host.communicate(timeout=300)
            assert host.returncode == 0, log.decode()[-2000:]
    finally:
        for host in hosts:
            host.kill()
