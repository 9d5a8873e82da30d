"""GGUF files, which llama.cpp runs: settings, tokenizer, and tensors of a model.

Source: the GGUF specification and llama.cpp's converter, github.com/ggml-org.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.export.gguf_layout import Stored, quantized_of, store, store_dense
from jaxcompress.export.gguf_tokenizer import tokenizer_metadata
from jaxcompress.export.named_leaves import (
    ExportedLeaf,
    NamedLeaf,
    dense_tensor,
    is_compressed,
    named_leaves,
)
from jaxcompress.export.requests import Changes, check_model, float_dtype
from jaxcompress.export.sharded_files import new_file
from jaxcompress.models.gguf_files import ROPE_FACTORS
from jaxcompress.models.gguf_settings import ARCHITECTURES
from jaxcompress.models.rope import rope_frequencies
from jaxcompress.models.transformer import Transformer
from jaxcompress.models.written_configurations import config_from
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import DType, Params

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
GEMMA_PERIOD = 6  # of its layers, the last attends to everything


def gguf(
    path: str | Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dense: str | None = None,
    requantize: Sequence[tuple[str, Any]] = (),
    dtype: DType | None = None,
    context: int = 8192,
    metadata: Mapping[str, Any] | None = None,
) -> list[ExportedLeaf]:
    """Write a model as a GGUF file, its codes and scales unchanged.

    Symmetric codes (`symmetric`, `gptq`, `learned`) of up to 4 bits become Q4_0, of 5
    to 8 bits Q8_0, where blocks are multiples of 32 and divide the inputs. Arrays are
    written as F32, F16 or BF16, vectors as F32.

    Args:
      path: must not exist. The file appears when it is complete.
      model: a Transformer of the families Llama, Mistral, Qwen2 or Qwen3 without
        sliding windows, or Gemma 3, looped or scanned.
      params: its parameters, or an open checkpoint that is read leaf by leaf.
      tokenizer: byte-level or SentencePiece BPE; llama.cpp needs one to generate.
      dense: a pattern on leaf names; compressed leaves that it matches are written
        dense.
      requantize: rules (pattern on leaf names, method) for compressed leaves that have
        no counterpart. The error that each adds is returned.
      dtype: of dense matrices; None keeps that of each.
      context: tokens that the model takes at most, which a Transformer does not record.
      metadata: more keys, such as `general.name` or `tokenizer.chat_template`.

    Returns:
      One `ExportedLeaf` for each leaf.

    Raises:
      TypeError: a model of another class.
      ValueError: a leaf, a tokenizer or settings without a counterpart; named. A
        pattern that matches no leaf.
      FileExistsError: the file exists.
      ModuleNotFoundError: the package `gguf` is not installed.

    Example:
      >>> recipe = "symmetric(bits=4, block=32, scale_dtype='float16')"
      >>> small = jc.compress(params, recipe)
      >>> leaves = jc.export.gguf("small.gguf", model, small)
    """
    check_model(model, context)
    dtype, changes = float_dtype(dtype), Changes.of(dense, requantize)
    family, settings = _settings(model, context)
    settings |= {} if tokenizer is None else tokenizer_metadata(tokenizer)
    settings |= metadata or {}
    count = len(settings.get("tokenizer.ggml.tokens", ())) or model.vocab_size
    if count != model.vocab_size:
        raise ValueError(
            f"the tokenizer has {count} tokens and the model {model.vocab_size} rows; "
            "GGUF needs one for each: trim or pad the model's vocabulary"
        )
    architecture = ARCHITECTURES[family]
    written = []
    with new_file(path) as partial:
        writer = _writer(partial, family, settings)
        try:
            with named_leaves(
                model, params, architecture.modules, check_names=changes.check_names
            ) as leaves:
                for leaf in leaves:
                    leaf, error = changes.apply(leaf)
                    rows = (
                        _rows(leaf, model.head_size)
                        if architecture.interleaved
                        else None
                    )
                    stored = _stored(leaf, rows, dtype)
                    _add(writer, leaf.tensor, stored)
                    size = stored.data.nbytes
                    written.append(
                        ExportedLeaf(leaf.name, leaf.tensor, stored.type, size, error)
                    )
            if (factors := _rope_factors(model)) is not None:
                _add(writer, ROPE_FACTORS, store_dense(factors))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
            if writer.temp_file is not None:
                writer.temp_file.close()
    return written


def _rows(leaf: NamedLeaf, head_size: int) -> np.ndarray | None:
    """Return the order of rows in which pairs (2i, 2i + 1) of a head rotate."""
    if not re.search(r"/[qk]_proj/", leaf.name):
        return None
    rows = np.arange(leaf.value.shape[-1]).reshape(-1, 2, head_size // 2)
    return rows.swapaxes(1, 2).ravel()


def _stored(leaf: NamedLeaf, rows: np.ndarray | None, dtype: DType | None) -> Stored:
    advice = (
        f"pass dense={leaf.name!r} to write it dense, or requantize=[({leaf.name!r}, "
        "\"symmetric(bits=8, block=32, scale_dtype='float16')\")]"
    )
    if not is_compressed(leaf.value):
        array = dense_tensor(leaf.name, leaf.value)
        return store_dense(array if rows is None else array[rows], dtype)
    codes = quantized_of(leaf.name, leaf.value)
    if codes is None:
        raise ValueError(
            f"{leaf.name} is a {type(leaf.value).__name__}, which GGUF has no "
            f"counterpart for; {advice}"
        )
    try:
        return store(codes, rows)
    except ValueError as error:
        raise ValueError(f"{leaf.name}: {error}. Or {advice}") from error


def _settings(model: Transformer, context: int) -> tuple[str, dict[str, Any]]:
    """Return GGUF's name of the architecture, and its metadata.

    Raises ValueError where llama.cpp would compute something else.
    """
    config = config_from(model)
    name = config["architectures"][0]
    if name not in FAMILIES:
        raise ValueError(
            f"{name} models are not written as GGUF; supported are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    for field, only in _required(model, family).items():
        if (value := getattr(model, field)) != only:
            raise ValueError(
                f"{field}={value}: llama.cpp computes {family} models with {field}="
                f"{only} only; there is no GGUF file for this model"
            )
    settings = {
        "general.type": "model",
        "general.quantization_version": 2,
        f"{family}.vocab_size": model.vocab_size,
        f"{family}.context_length": context,
        f"{family}.embedding_length": model.width,
        f"{family}.block_count": model.layers,
        f"{family}.feed_forward_length": model.mlp_width,
        f"{family}.attention.head_count": model.heads,
        f"{family}.attention.head_count_kv": model.kv_heads,
        f"{family}.attention.key_length": model.head_size,
        f"{family}.attention.value_length": model.head_size,
        f"{family}.attention.layer_norm_rms_epsilon": float(model.norm_eps),
        f"{family}.rope.dimension_count": model.head_size,
        f"{family}.rope.freq_base": float(model.rope_theta),
    }
    if family == "gemma3":
        settings["gemma3.attention.sliding_window"] = _window(model)
    return family, settings | {
        f"{family}.rope.{key}": value for key, value in _scaling(model).items()
    }


def _required(model: Transformer, family: str) -> dict[str, Any]:
    """Return the fields that llama.cpp does not read, and their only values."""
    if family != "gemma3":
        fields: dict[str, Any] = {"sliding_window": None, "activation": "silu"}
        return fields | ({"qkv_bias": False} if family == "qwen3" else {})
    local = [(i + 1) % GEMMA_PERIOD for i in range(model.layers)]
    windows = tuple(_window(model) if x else None for x in local)
    fields = {
        "sliding_window": windows if len(set(windows)) > 1 else windows[0],
        "sliding_rope_theta": 1e4,
        "attention_scale": None,
        "activation": "gelu_tanh",
        "qkv_bias": False,
    }
    if dict(model.rope_scaling or ()).get("rope_type") != "linear":
        fields["rope_scaling"] = None
    return fields


def _window(model: Transformer) -> int:
    """Return the tokens that local layers of Gemma attend to."""
    window = model.sliding_window
    return max(
        filter(None, window if isinstance(window, tuple) else [window]), default=1
    )


def _scaling(model: Transformer) -> dict[str, Any]:
    """Return metadata of scaled rotations; Llama 3's are a tensor of factors
    instead.
    """
    options = dict(model.rope_scaling or ())
    kind = options.pop("rope_type", "none")
    if kind in ("none", "llama3"):
        return {}
    supported = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    if kind not in ("linear", "yarn") or set(options) - supported:
        raise ValueError(
            f"rope_scaling {dict(model.rope_scaling)} has no counterpart in GGUF"
        )
    names = {
        "factor": "scaling.factor",
        "original_max_position_embeddings": "scaling.original_context_length",
        "beta_fast": "scaling.yarn_beta_fast",
        "beta_slow": "scaling.yarn_beta_slow",
    }
    return {"scaling.type": kind} | {names[key]: x for key, x in options.items()}


def _rope_factors(model: Transformer) -> np.ndarray | None:
    """Return what Llama 3's scaling divides the frequencies by, [head_size / 2]."""
    if dict(model.rope_scaling or ()).get("rope_type") != "llama3":
        return None
    plain, _ = rope_frequencies(model.head_size, model.rope_theta)
    scaled, _ = rope_frequencies(model.head_size, model.rope_theta, model.rope_scaling)
    return np.asarray(plain / scaled, np.float32)


def _writer(path: Path, family: str, settings: Mapping[str, Any]) -> Any:
    try:
        from gguf import GGUFValueType, GGUFWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing .gguf files needs the gguf package: "
            "pip install 'jaxcompress[models]'"
        ) from error
    writer = GGUFWriter(path, family, use_temp_file=True)
    types = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    for key, value in settings.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, types[type(value)])
    return writer


def _add(writer: Any, name: str, stored: Stored) -> None:
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType[stored.type]
    data = stored.data.view(np.uint8) if kind.name == "BF16" else stored.data
    writer.add_tensor(name, data, raw_dtype=kind)
