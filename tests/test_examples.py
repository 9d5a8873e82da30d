"""The examples of all public names run, on one tiny model."""

import ast
import doctest
import importlib.machinery
import importlib.util
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

ROOT = pathlib.Path(__file__).parent.parent
LINTER = ROOT / "scripts" / "lint_words"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF


def load_linter():
    loader = importlib.machinery.SourceFileLoader("lint_words", str(LINTER))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("lint_words", loader)
    )
    loader.exec_module(module)
    return module


# The linter counts public names without an example.
PUBLIC = {
    name: (path, node)
    for name, path, node in load_linter().public(ROOT / "jaxcompress")
    if ">>> " in (ast.get_docstring(node) or "")
}


@pytest.fixture(scope="module")
def names():
    """What every example may use; the package's docstring says so."""
    tokenizer = jc.tokenization.train(
        ["a small text", "another small text"] * 20, kind="word", vocab_size=270
    )
    model = jc.models.Transformer(
        vocab_size=tokenizer.vocab_size,
        width=64,
        layers=2,
        heads=2,
        kv_heads=2,
        head_size=32,
        mlp_width=64,
    )
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    batches = [{"tokens": tokens, "mask": jnp.ones_like(tokens)}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few tokens, on purpose
        moments = jc.collect_moments(model, params, batches)
    name = "layer_0/mlp/down_proj/kernel"

    def apply_fn(params, tokens):
        return model.apply({"params": params}, tokens)

    return {
        "os": os,
        "jax": jax,
        "jnp": jnp,
        "np": np,
        "optax": optax,
        "jc": jc,
        "mesh": jax.make_mesh(
            (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
        ),
        "key": jax.random.key(2),
        "windows": jc.evaluation.windows(np.arange(64) % 8, length=16, batch=2),
        "tokenizer": tokenizer,
        "loss_fn": jc.distillation.hard_labels(apply_fn),
        "model": model,
        "apply_fn": apply_fn,
        "params": params,
        "small": jc.compress(params, "symmetric(bits=4)"),
        "optimizer": optax.adam(1e-3),
        "tokens": tokens,
        "batches": batches,
        "moments": moments,
        "x": params["layer_0"]["mlp"]["down_proj"]["kernel"],
        "of_x": moments[name],
    }


# More than two seconds of processor time each, most of it compilation.
LONG = {
    "CodedLevels",
    "RateCoded",
    "Shrunk",
    "compress_blockwise",
    "distillation.cached_labels",
    "distillation.rollout",
    "distillation.train",
    "measure_curvatures",
    "measure_curvatures_blockwise",
    "models.generate",
    "shrink",
    "textcoding.decode",
    "textcoding.encode",
    "textcoding.exact",
    "textcoding.verify",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in PUBLIC],
)
@pytest.mark.filterwarnings("ignore")
def test_example_runs(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, node = PUBLIC[name]
    text = ast.get_docstring(node) or ""
    test = doctest.DocTestParser().get_doctest(
        text, dict(names), name, str(path), node.lineno
    )
    assert test.examples
    said = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
