"""`shrink` of models that are no language models of ours: Linen, NNX, functions."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.running.nnx import params_of
from jaxcompress.shrinking import efforts
from jaxcompress.tree.equality import same_bits

pytestmark = pytest.mark.slow


class Classifier(nn.Module):
    """Pictures to logits of ten classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="first")(x.reshape(len(x), -1)))
        return nn.Dense(64, name="second")(x)


class Module(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    changed = dataclasses.replace(efforts.EFFORTS["good"], curvature_rows=8, states=8)
    monkeypatch.setitem(efforts.EFFORTS, "good", changed)


def batches(*shape):
    random = np.random.default_rng(0)
    return [random.normal(size=(16, *shape)).astype(np.float32) for _ in range(10)]


def test_a_classifier_is_measured_by_its_own_outputs(tmp_path):
    model, data = Classifier(), batches(8, 8)
    params = model.init(jax.random.key(0), data[0])["params"]
    size = 16_000
    small = jc.shrink(model, params, size=size, batches=data, progress=False)
    assert 0.99 * size <= small.file_bytes <= size and small.kl > 0
    small.save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size == small.file_bytes
    loaded = jc.load(tmp_path / "small.safetensors")
    assert same_bits(loaded, small.params)
    dense, after = (
        jax.nn.log_softmax(model.apply({"params": p}, np.concatenate(data[-2:])))
        for p in (params, jc.materialize(loaded))
    )
    kl = (np.exp(dense) * (dense - after)).sum(-1).mean()
    assert small.kl == pytest.approx(float(kl), rel=1e-3)


def test_an_nnx_module_brings_its_parameters():
    module = Module(nnx.Rngs(0))
    data = [{"x": batch} for batch in batches(64)]
    small = jc.shrink(module, size=16_000, batches=data, progress=False)
    assert small.file_bytes <= 16_000 and small.kl > 0
    ready = jc.materialize(small.params)
    wanted = module(data[0]["x"])
    found = small.model(data[0]["x"])
    assert found.shape == wanted.shape and not np.array_equal(found, wanted)
    assert same_bits(params_of(small.model), small.params)
    kernel = params_of(module)["first"]["kernel"]
    assert ready["first"]["kernel"].shape == kernel.shape


def test_axes_of_a_convolution_are_found_in_an_example():
    kernel = np.zeros((3, 3, 16, 32), np.float32)
    params = {"first": {"kernel": kernel}}
    with pytest.raises(ValueError, match=r"first/kernel.*pass batches="):
        jc.shrink(
            lambda params, x: x, params, size=9_000, effort="quick", progress=False
        )


def test_without_data_only_quick_is_there():
    module = Module(nnx.Rngs(0))
    with pytest.raises(ValueError, match="batches="):
        jc.shrink(module, size=16_000, progress=False)
    small = jc.shrink(module, size=16_000, effort="quick", progress=False)
    assert small.file_bytes <= 16_000 and small.kl is None
    assert not small.notes and repr(small) == str(small)
    small = jc.shrink(module, size=5_000, effort="quick", progress=False)
    assert "nothing was measured" in str(small)
