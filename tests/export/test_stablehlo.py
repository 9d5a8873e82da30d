"""StableHLO programs: called in a process that has neither Flax nor this package."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports_for_tests import MODEL, dense_params, small_params
from jax import export

import jaxcompress as jc
from jaxcompress.export import stablehlo
from jaxcompress.models.stacking import stack_layers

TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5) * 7 % 96
METHOD = "symmetric(bits=4, block=32)"
EVERYWHERE = ["cpu", "tpu", "cuda"]
RUN = """
import sys
import jax.export
import numpy as np
from safetensors.numpy import load_file
batch = np.load("batch.npy")
for name in sys.argv[1:]:
    tensors = load_file(f"{name}.safetensors")
    program = jax.export.deserialize(tensors.pop("program").tobytes())
    arrays = [tensors[name] for name in sorted(tensors)]
    np.save(f"{name}.npy", program.call(arrays, batch))
assert not {"flax", "jaxcompress"} & set(sys.modules), "more than JAX was imported"
"""


def small():
    return small_params(METHOD, ".*/(kernel|embedding)")


@functools.cache
def wanted():
    return np.asarray(jax.jit(MODEL.apply)({"params": small()}, TOKENS))


@functools.cache
def program():
    return stablehlo(MODEL, small(), TOKENS, platforms=EVERYWHERE)


@pytest.mark.slow
def test_another_process_runs_it_without_flax(tmp_path):
    pytest.importorskip("flatbuffers")
    program().save(tmp_path / "arguments.safetensors")
    embedded = stablehlo(MODEL, small(), TOKENS, embedded=True)
    embedded.save(tmp_path / "embedded.safetensors")
    assert embedded.names == embedded.arrays == ()
    np.save(tmp_path / "batch.npy", TOKENS)
    command = [sys.executable, "-c", RUN, "arguments", "embedded"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("arguments", "embedded"):
        logits = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(logits, wanted(), atol=1e-5)
        held = sum(x.nbytes for x in jax.tree.leaves(dense_params()))
        assert (tmp_path / f"{name}.safetensors").stat().st_size < held


def test_weights_stay_compressed_and_are_arguments():
    assert program().exported.platforms == ("cpu", "tpu", "cuda")
    assert sum(np.asarray(x).nbytes for x in program().arrays) == jc.nbytes(small())
    assert jc.nbytes(small()) < jc.nbytes(dense_params()) / 2.5
    assert "layer_0/mlp/up_proj/kernel/codes/packed" in program().names
    np.testing.assert_allclose(program()(TOKENS), wanted(), atol=1e-5)
    other = dict(small(), final_norm={"scale": 2 * small()["final_norm"]["scale"]})
    logits = program().exported.call(jax.tree.leaves(other), TOKENS)
    np.testing.assert_allclose(logits, 2 * wanted(), atol=2e-5)


@pytest.mark.slow
def test_scanned_models_and_free_sizes():
    (rows,) = export.symbolic_shape("rows")
    batch = {"tokens": jax.ShapeDtypeStruct((rows, 5), np.int32)}
    free = stablehlo(MODEL.clone(scan=True), stack_layers(small()), batch)
    for count in (1, 2):
        logits = free({"tokens": TOKENS[:count]})
        np.testing.assert_allclose(logits, wanted()[:count], atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        "svd(rank=4)",
        "nf4(block=32)",
        "nvfp4()",
        "magnitude(sparsity=0.5)",
        jc.chain("svd(rank=8)", [(".*/(left|right)", "symmetric(bits=8)")]),
        jc.chain("symmetric(bits=4, block=32)", "entropy_code()"),
        "code_floats()",
    ],
    ids=str,
)
def test_every_leaf_goes_into_a_file_and_back(recipe, tmp_path):
    pytest.importorskip("flatbuffers")
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    kernel = dense_params()["layer_1"]["mlp"]["up_proj"]["kernel"]
    params = jc.compress({"kernel": jnp.asarray(kernel)}, recipe)
    model = lambda params, x: x @ params["kernel"].astype(jnp.float32)  # noqa: E731
    exported = stablehlo(model, params, x, platforms=EVERYWHERE)
    exported.save(tmp_path / "a.safetensors")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    again = export.deserialize(bytearray(tensors.pop("program").tobytes()))
    out = again.call([tensors[name] for name in sorted(tensors)], x)
    dense = np.asarray(jc.materialize(params)["kernel"], np.float32)
    np.testing.assert_allclose(out, x @ dense, atol=1e-5)
    with pytest.raises(FileExistsError, match="exists; remove it"):
        exported.save(tmp_path / "a.safetensors")


def test_bad_requests_say_what_is_known():
    with pytest.raises(ValueError, match=r"cpu, cuda, rocm, tpu, not \['gpu'\]"):
        stablehlo(MODEL, dense_params(), TOKENS, platforms=["gpu"])
    with pytest.raises(ValueError, match=r"not \[\]"):
        stablehlo(MODEL, dense_params(), TOKENS, platforms=[])


def test_arrays_that_a_file_lacks_are_named(tmp_path):
    pytest.importorskip("flatbuffers")
    params = {"codes": jnp.zeros(4, jnp.int4), "scale": np.ones(4, np.float32)}

    def model(params, x):
        return params["codes"].astype(jnp.float32) * params["scale"] * x

    exported = stablehlo(model, params, np.float32(1))
    with pytest.raises(ValueError, match=r"codes has dtype int4.*embedded=True"):
        exported.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    exported = stablehlo(lambda params, x: params * x, np.float32(2), np.float32(1))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"jaxcompress\[stablehlo\]"):
        exported.save(tmp_path / "a.safetensors")


def test_modules_of_nnx_are_programs_too():
    from flax import nnx

    module = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    kernel = dense_params()["layer_1"]["mlp"]["up_proj"]["kernel"].astype(np.float32)
    params = {"kernel": kernel, "bias": jnp.ones(128)}
    params = jc.compress(params, METHOD)
    exported = stablehlo(module, params, x, platforms="cpu")
    assert exported.names == ("bias", "kernel/codes/packed", "kernel/scale")
    wanted = x @ np.asarray(params["kernel"].materialize()) + 1
    np.testing.assert_allclose(exported(x), wanted, atol=1e-5)
