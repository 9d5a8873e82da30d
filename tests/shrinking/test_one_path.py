"""From somebody's model to a small file, and on in another process, bit for bit."""

import hashlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from shrinking.test_other_models import Module, batches

import jaxcompress as jc
from jaxcompress.running.nnx import with_params

pytestmark = pytest.mark.slow


def digest(tree):
    parts = [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def trained(loss, params):
    """Digest of the floats after one step down, once it is sure that it led down."""
    trainable, frozen = jc.partition(params)
    loss = jax.jit(lambda x, of=loss: of(jc.combine(x, frozen)))
    value, gradient = jax.value_and_grad(loss)(trainable)
    step = 0.01 * value / sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
    after = jax.tree.map(lambda x, g: x - step * g, trainable, gradient)
    assert float(loss(after)) < float(value)
    return digest(after)


def language_model(path):
    """What a file of `Shrunk.save` does: bits, text, and a step of training."""
    model, params, tokenizer = jc.models.load(path)
    text = jc.models.generate(model, params, tokenizer, "import os", max_tokens=5)
    tokens = jnp.asarray([tokenizer.encode("import os\nimport sys\n")])

    def loss(params):
        logits = model.apply({"params": params}, tokens)[:, :-1]
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return entropy(logits, tokens[:, 1:]).mean()

    return [digest(params), text, trained(loss, params)]


def module(path):
    """The same of an NNX module, its outputs in the place of text."""
    params, x = jc.load(path), batches(64)[0]
    empty = Module(nnx.Rngs(1))
    outputs = with_params(empty, params)(x)
    loss = lambda params: jnp.mean(with_params(empty, params)(x) ** 2)  # noqa: E731
    return [digest(params), digest(outputs), trained(loss, params)]


def in_another_process(function, path):
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[2]); "
        "from shrinking import test_one_path as here; "
        f"print(json.dumps(here.{function.__name__}(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(path), json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_directory_becomes_a_small_file_that_runs_anywhere(tmp_path):
    model, params, tokenizer = jc.models.load("reference")
    jc.export.huggingface(tmp_path / "directory", model, params, tokenizer)
    small = jc.shrink(
        tmp_path / "directory", size="1.5MB", effort="quick", progress=False
    )
    path = tmp_path / "small.safetensors"
    small.save(path)
    assert 1_485_000 <= path.stat().st_size <= 1_500_000
    wanted = language_model(path)
    assert wanted[0] == digest(small.params)
    assert in_another_process(language_model, path) == wanted


def test_a_module_becomes_a_small_file_that_runs_anywhere(tmp_path):
    small = jc.shrink(Module(nnx.Rngs(0)), size=16_000, effort="quick", progress=False)
    path = tmp_path / "small.safetensors"
    small.save(path)
    wanted = module(path)
    assert wanted[:2] == [digest(small.params), digest(small.model(batches(64)[0]))]
    assert in_another_process(module, path) == wanted
