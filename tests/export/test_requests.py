"""What is asked of an export wrongly is refused before anything is written."""

import flax.linen as nn
import numpy as np
import pytest
from exports_for_tests import MODEL, small_params

import jaxcompress as jc
from jaxcompress.models.bert import Bert

EXPORTS = {
    "compressed_tensors": jc.export.compressed_tensors,
    "gguf": jc.export.gguf,
    "huggingface": jc.export.huggingface,
}
SMALL = "symmetric(bits=4, block=32)"


@pytest.fixture(params=EXPORTS)
def export(request):
    return EXPORTS[request.param]


@pytest.fixture
def refused(tmp_path):
    def refused(export, match, *, model=MODEL, error=ValueError, **options):
        with pytest.raises(error, match=match):
            export(tmp_path / "out", model, small_params(SMALL), **options)
        assert list(tmp_path.iterdir()) == []

    return refused


@pytest.mark.parametrize(
    "model",
    [nn.Dense(4), Bert(96, 64, 2, 4, 128), None, {"embed": np.ones(3)}],
    ids=str,
)
def test_models_that_others_have_no_name_for(model, export, refused):
    name = f"not a {type(model).__name__}.*rename.*stablehlo"
    refused(export, name, model=model, error=TypeError)


@pytest.mark.parametrize("dtype", ["bf16", "int8", bool])
def test_dtypes_that_hold_no_weights(dtype, export, refused):
    refused(export, "floating-point dtype, such as 'bfloat16'", dtype=dtype)


@pytest.mark.parametrize("context", [0, -1, 8192.0, True])
def test_contexts_that_are_no_number_of_tokens(context, export, refused):
    refused(export, f"context .of tokens. of 1 or more, not {context}", context=context)


@pytest.mark.parametrize("name", ["compressed_tensors", "gguf"])
def test_patterns_and_rules(name, refused):
    export = EXPORTS[name]
    nearest = "'layer_0/mpl/.*' matches no leaf; the nearest names are layer_0/mlp"
    refused(export, nearest, dense="layer_0/mpl/.*")
    refused(export, nearest, requantize=[("layer_0/mpl/.*", SMALL)])
    refused(export, r"dense: '\(' is not a regular expression", dense="(")
    refused(export, "pairs, not 'symmetric", requantize=SMALL)
    refused(export, "pairs, not '.*kernel'", requantize=[".*kernel"])
    refused(export, "is not a method", requantize=[(".*kernel", "symmetric(")])


def test_experts_are_no_gguf_of_ours(refused):
    model = MODEL.clone(qk_norm=True, experts=2, expert_width=64)
    refused(jc.export.gguf, "Qwen3MoeForCausalLM models are not written", model=model)


def test_nothing_is_overwritten(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists; remove it, or export to"):
        export(tmp_path / "out", MODEL, small_params(SMALL))
    assert [x.name for x in tmp_path.rglob("*")] == ["out", "note"]
