"""Two processes collect moments, compress, evaluate and save as one does."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

import jaxcompress as jc

SCRIPT = """
import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.evaluation import Apply, windows
from jaxcompress.models.bundled_text import heldout_text

folder, port, count, number = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)
assert jax.process_count() == len(jax.devices()) == count
mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
rows, whole = (NamedSharding(mesh, PartitionSpec(*x)) for x in (["data"], []))

model, params, tokenizer = jc.models.load("reference")
tokens = tokenizer.encode(heldout_text())
held_out, batches = windows(tokens[:2048], 129, 4), windows(tokens[2048:6144], 129, 4)
share = slice(number * 4 // count, (number + 1) * 4 // count)
mine = [{name: x[share] for name, x in batch.items()} for batch in batches]
place = lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x))
shared = [jax.tree.map(place, batch) for batch in mine]
moments = jc.collect_moments(model, jax.device_put(params, whole), shared)
moments = jax.tree.map(np.asarray, moments)

without = jc.compress(params, "symmetric(bits=4, block=64)")
kernels = [(".*kernel", "gptq(bits=3, block=64)")]
calibrated = jc.compress(params, kernels, moments)
parts = [{key: x[share] for key, x in batch.items()} for batch in held_out]
results = {}
for name, small in {"without": without, "calibrated": calibrated}.items():
    results[name] = jc.compare(Apply(model), params, small, parts, mesh=mesh).kl
if number == 0:
    jc.save(f"{folder}/{count}-without.safetensors", without)
    jc.save(f"{folder}/{count}-moments.safetensors", {
        name: [m.count, m.mean, m.second, m.tokens] for name, m in moments.items()
    })
    print(json.dumps(results))
"""


def run(folder, count):
    """KL of both trees, after `count` processes of one device each have run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    command = [sys.executable, "-c", SCRIPT, str(folder), port, str(count)]
    hosts = [
        subprocess.Popen(
            [*command, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for number in range(count)
    ]
    try:
        outputs = [host.communicate(timeout=600) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, log) in zip(hosts, outputs, strict=True):
        assert host.returncode == 0, log.decode()[-2000:]
    return json.loads(outputs[0][0].splitlines()[-1])  # Gloo greets first


@pytest.mark.nightly
def test_two_processes_give_what_one_gives(tmp_path):
    one, two = run(tmp_path, 1), run(tmp_path, 2)
    without = [(tmp_path / f"{n}-without.safetensors").read_bytes() for n in (1, 2)]
    assert without[0] == without[1]
    both = [jc.load(tmp_path / f"{n}-moments.safetensors", numpy=True) for n in (1, 2)]
    assert both[0].keys() == both[1].keys()
    for name in both[0]:
        for a, b in zip(both[0][name], both[1][name], strict=True):
            if a is not None:
                np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * abs(a).max())
    assert two["without"] == pytest.approx(one["without"], rel=1e-5)
    assert two["calibrated"] == pytest.approx(one["calibrated"], rel=0.01)
    assert one["without"] > 1e-3 < one["calibrated"]
