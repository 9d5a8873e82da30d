"""What the steps of generation and evaluation compute with compressed weights."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.coding.levels.narrow import NarrowLevels
from jaxcompress.evaluation import Apply, LanguageModelMetrics, evaluate, windows
from jaxcompress.models import Transformer, generation
from jaxcompress.models.generation import generate, sample
from jaxcompress.quantization import grids, symmetric
from jaxcompress.running.compressed_matmul import compressed_matmul
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.leaf import is_leaf, materialize
from jaxcompress.tree.paths import roots

MODEL = Transformer(
    vocab_size=300, width=24, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=32
)


@dataclasses.dataclass
class Letters:
    """A tokenizer of lower-case letters: id 3 is "a"; 1 begins a text."""

    bos_id: int | None = 1
    eos_id: int | None = None
    end_ids: tuple[int, ...] = ()

    def encode(self, text):
        return [ord(letter) - 94 for letter in text]

    def decode(self, ids):
        return "".join(chr(i + 94) for i in ids if i > 2)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes["params"]
    )


def test_the_likeliest_token_takes_no_sort():
    settings = (jnp.float32(0), jnp.int32(40), jnp.float32(1))
    jaxpr = jax.make_jaxpr(sample)(jnp.arange(40.0), jax.random.key(0), *settings).jaxpr
    outside = [equation.primitive.name for equation in jaxpr.eqns]
    assert "sort" not in outside
    branches = jaxpr.eqns[outside.index("cond")].params["branches"]
    sorts = ["sort" in str(branch) for branch in branches]
    assert sorts == [False, True], "one branch sorts, the greedy one does not"


@pytest.mark.slow
def test_steps_are_compiled_for_the_way_they_multiply(params, monkeypatch):
    """Integer products only where the caller asks, whichever call came first."""
    called = []

    def record(*args):
        called.append(1)
        return grids.super_product(*args)

    monkeypatch.setattr(grids, "super_product", grids.integer_product, raising=False)
    monkeypatch.setattr(grids, "integer_product", record)
    small = compress(params, [(".*kernel", symmetric(bits=8))])
    metrics = LanguageModelMetrics(Apply(MODEL))
    batches = windows(np.arange(33) % 300, 33, 2)
    losses, reached = {}, set()
    for how in (None, "int8"):
        with compressed_matmul(activations=how) if how else contextlib.nullcontext():
            called.clear()
            generate(MODEL, small, Letters(), "hello", max_tokens=1)
            assert not called or how == "int8"
            reached |= {how} if called else set()
            loss = evaluate(metrics, small, batches)["loss"]
        assert losses.setdefault(how or "float", loss) == loss
    assert reached == {"int8"} and losses["int8"] != losses["float"]
    dense = evaluate(metrics, jax.jit(materialize)(small), batches)["loss"]
    assert losses["float"] == pytest.approx(dense, rel=1e-5)


@pytest.mark.slow
def test_generation_decodes_once_and_multiplies_by_what_is_stored(params):
    peaked = jax.tree.map(lambda x: x**5, params)  # most codes 0: coding them pays
    small = compress(peaked, chain([(".*mlp.*kernel|.*embedding", symmetric(bits=4))]))
    coded = compress(small, chain("entropy_code()", "code_floats()"))
    is_coded = lambda x: getattr(x, "entropy_coded", False)  # noqa: E731
    assert any(map(is_coded, jax.tree.leaves(coded, is_leaf=is_coded)))
    seen = []

    def watch(call, args, kwargs, context):
        if context.module.scope is not None:
            variables = context.module.variables.get("params", {})
            seen.append((variables, context.module.name))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        text = generate(MODEL, coded, Letters(), "hello", max_tokens=1)
    assert text == generate(
        MODEL, jax.jit(materialize)(small), Letters(), "hello", max_tokens=1
    )
    for variables, name in seen:
        assert not any(map(is_coded, jax.tree.leaves(variables, is_leaf=is_coded)))
        if name == "up_proj":
            assert is_leaf(variables["kernel"]), "dense before the first token"
    assert {"up_proj", "embed"} <= {name for _, name in seen}


def test_levels_are_packed_before_the_first_token(params):
    small = compress(params, [(".*gate_proj/kernel", "rate_distortion(rate=3.0)")])
    ready = generation._to_run(MODEL, small)
    kinds = [type(x).__name__ for _, x in roots(ready) if is_leaf(x)]
    assert kinds == ["RateCoded"]
    levels = ready["layer_0"]["mlp"]["gate_proj"]["kernel"].levels
    assert isinstance(levels, NarrowLevels)
    texts = [generate(MODEL, x, Letters(), "ab", max_tokens=4) for x in (small, ready)]
    assert texts[0] == texts[1]
