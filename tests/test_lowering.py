"""Every program that the package compiles can be compiled for a TPU.

Nothing runs there: `jax.export` lowers on the CPU, and stops where an operation, or a
type in it, has no rule for the platform.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from laws import METHODS, TRACEABLE, Model, apply, compressed, moments_for, parameters
from laws import TOKENS as WORDS
from models_for_tests import TOKENS, language, layouts

import jaxcompress as jc
from jaxcompress.evaluation import Apply, LanguageModelMetrics
from jaxcompress.tree.methods import parse

SECOND = {  # methods that read moments, with a kernel of 64 inputs
    "gptq(bits=4, block=16)",
    "sparsegpt(sparsity=0.5)",
    "alps(sparsity=0.5)",
    "wanda(nm='2:4')",
    "svd(rank=8)",
    "svd(rank=8, randomized=True)",
    "tucker(ranks=(8, 8, 4), sizes=(64, 8, 12), sweeps=1)",
    "cp(rank=4, sizes=(64, 8, 12), sweeps=2)",
    "corrected(base='gptq(bits=3, block=16)', rank=4)",
    "learned(bits=3, block=16, steps=2)",
    "mixed_channels(bits=3, channels=4, score='second_order')",
}


def lowered(function, *arguments):
    """The program for a TPU; its inputs may be abstract."""
    program = export.export(jax.jit(function), platforms=["tpu"])(*arguments)
    assert program.platforms == ("tpu",)
    return program.mlir_module()


@pytest.mark.parametrize("method", TRACEABLE)
def test_methods(method):
    known = moments_for(method)  # collected before anything is traced
    lowered(lambda params: apply(method, params, moments=known), parameters())


@pytest.mark.parametrize("method", sorted(SECOND))
def test_methods_with_moments(method):
    kernel = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    moments = jc.moments_from_covariance(jnp.eye(64))
    lowered(parse(method), kernel, moments)


@pytest.mark.parametrize("method", METHODS)
def test_materialize_and_plain_runs(method):
    if method in TRACEABLE:
        params = parameters(scanned=True)
        known = moments_for(method, scanned=True)
        small = jax.eval_shape(
            lambda p: apply(method, p, scanned=True, moments=known), params
        )
    else:
        small = compressed(method, scanned=True)
    model = Model(scanned=True)

    def run(params, tokens):
        return jc.materialize(params), model.apply({"params": params}, tokens)

    assert "while" in lowered(run, small, WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "scan_remat"])
def test_fast_and_streaming_runs(kind):
    model, params = language(kind)
    recipes = (
        ("svd(rank=4)", "float", False),
        ("symmetric(bits=8)", "int8", True),
        ("asymmetric(bits=4)", "int8", True),
        ("symmetric(bits=4, block=8)", "int8", False),
        ("corrected(base='symmetric(bits=4, block=8)', rank=2)", "int8", False),
    )
    for recipe, activations, integers in recipes:
        rules = [(".*(kernel|embedding)", recipe)]
        abstract = jax.eval_shape(
            lambda p, rules=rules: jc.compress(p, rules, layouts=layouts(p)), params
        )

        def run(params, tokens, activations=activations):
            with jc.compressed_matmul(activations=activations):
                return model.apply({"params": params}, tokens)

        text = lowered(run, abstract, TOKENS)
        products = [line for line in text.splitlines() if "dot_general" in line]
        found = any("xbf16>) -> tensor<2x6x16xf32>" in line for line in products)
        assert found == integers, recipe

        def stream(params, tokens):
            with jc.low_memory():
                return model.apply({"params": params}, tokens)

        assert "optimization_barrier" in lowered(stream, abstract, TOKENS)


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3))(nn.Conv(8, (3, 3), strides=2)(x))


def test_fast_convolutions():
    model, x = Pictures(), jnp.ones((2, 8, 8, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    kinds = {f"Conv_{i}/kernel": jc.Layout((), (0, 1, 2), (3,)) for i in range(2)}
    sizes = "sizes=(3, 3, 8, 8)"
    for method in (
        "svd(rank=4)",
        f"tucker(ranks=(None, None, 4, 4), {sizes}, sweeps=1)",
        f"cp(rank=4, {sizes}, sweeps=1)",
    ):
        rules = [(".*kernel", method)]
        small = jax.eval_shape(
            lambda p, rules=rules: jc.compress(p, rules, layouts=kinds), params
        )

        def run(params, x):
            with jc.compressed_matmul():
                return model.apply({"params": params}, x)

        lowered(run, small, x)


def test_a_step_of_training_and_of_evaluation():
    model, params = language("scan")
    rules = [(".*(kernel|embedding)", "symmetric(bits=4)")]
    small = jc.compress(params, rules, layouts=layouts(params))
    trainable, frozen = jc.partition(small)
    optimizer = optax.adamw(1e-3)

    def step(trainable, state, frozen, tokens):
        def loss(trainable):
            with jc.compressed_matmul(activations="int8"):
                small = jc.combine(trainable, frozen)
                logits = model.apply({"params": small}, tokens)
            targets = jnp.roll(tokens, -1)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, targets
            ).mean()

        gradients = jax.grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    lowered(step, trainable, optimizer.init(trainable), frozen, TOKENS)
    metrics = LanguageModelMetrics(Apply(model))
    lowered(metrics, small, {"tokens": TOKENS, "mask": TOKENS > 0})


def test_decoding_steps_of_the_packaged_architecture():
    model = jc.models.Transformer(
        vocab_size=64,
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_size=16,
        mlp_width=64,
        scan=True,
    )
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    kinds = jc.find_layouts(model, params, {"tokens": tokens})
    rules = [(".*(kernel|embedding)", "symmetric(bits=8)")]
    small = jax.eval_shape(lambda p: jc.compress(p, rules, layouts=kinds), params)

    def step(params, tokens, cache):
        with jc.compressed_matmul(activations="int8"):
            return model.apply({"params": params}, tokens, cache=cache)

    lowered(step, small, tokens, jax.eval_shape(lambda: model.init_cache(1, 8)))
