"""The Hugging Face `config.json` that describes a Transformer."""

import dataclasses
from typing import Any

from jaxcompress.models.configurations import (
    ACTIVATIONS,
    LAYER_TYPES,
    transformer_from,
)
from jaxcompress.models.transformer import Transformer

# Fields of how a model is run or built, and the window, which is compared by layer.
_RUNNING = (
    *("parent", "name", "scan", "remat", "sow_intermediates", "dtype", "logits"),
    "sliding_window",
)


def config_from(model: Transformer) -> dict[str, Any]:
    """Write the `config.json` of a model; the inverse of `transformer_from`."""
    for field in ("heads", "kv_heads", "mlp_width"):
        if not isinstance(getattr(model, field), int):
            raise ValueError(
                f"{field} is {getattr(model, field)}, one number per layer, which "
                "Hugging Face's configurations cannot say; keep the model in a file "
                "of models.save"
            )
    name = _architecture(model)
    if name == "Gemma3ForCausalLM":
        return _verified(model, name, _gemma_config(model))
    if name == "GPT2LMHeadModel":
        return _verified(model, name, _gpt2_config(model))
    config = {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": _hidden_act(model.activation),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "rope_theta": model.rope_theta,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "attention_bias": model.qkv_bias and model.out_bias,
        "mlp_bias": model.mlp_bias,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    windows = _per_layer(model)
    if any(windows):
        config["sliding_window"] = max(filter(None, windows))
        config["use_sliding_window"] = True
        if name.startswith("Qwen") and not model.experts:  # others have one window
            config["layer_types"] = [LAYER_TYPES[not window] for window in windows]
    if model.experts:
        config["model_type"] = "qwen3_moe"
        config |= {
            "num_experts": model.experts,
            "num_experts_per_tok": model.chosen_experts,
            "moe_intermediate_size": model.expert_width,
            "norm_topk_prob": model.normalized_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(model.dense_layers),
        }
    return _verified(model, name, config)


def _gpt2_config(model: Transformer) -> dict[str, Any]:
    gelu = {"gelu_tanh": "gelu_new"}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_embd": model.width,
        "n_inner": model.mlp_width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.positions,
        "activation_function": gelu.get(model.activation, model.activation),
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tied,
    }


def _gemma_config(model: Transformer) -> dict[str, Any]:
    windows = _per_layer(model)
    scale = model.attention_scale
    scalar = model.head_size if scale is None else scale**-2
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_activation": _hidden_act(model.activation),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "rope_theta": model.rope_theta,
        "rope_local_base_freq": model.sliding_rope_theta,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "attention_bias": model.qkv_bias and model.out_bias,
        "query_pre_attn_scalar": round(scalar),
        "sliding_window": max(filter(None, windows), default=4096),
        "layer_types": [LAYER_TYPES[not window] for window in windows],
    }


def _verified(model: Transformer, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration where it gives the model back; raise elsewhere."""
    windows = _per_layer(model)
    again = transformer_from(config)
    differing = [
        field.name
        for field in dataclasses.fields(model)
        if field.name not in _RUNNING
        and getattr(again, field.name) != getattr(model, field.name)
    ]
    if _per_layer(again) != windows:
        differing.append("sliding_window")
    if differing:
        raise ValueError(
            f"{name} is the nearest Hugging Face architecture, but it cannot have "
            + ", ".join(f"{x}={getattr(model, x)}" for x in differing)
        )
    return config


def _hidden_act(activation: str) -> str:
    return next(name for name, x in ACTIVATIONS.items() if x == activation)


def _architecture(model: Transformer) -> str:
    if model.post_norms:
        return "Gemma3ForCausalLM"
    if model.positions is not None:
        return "GPT2LMHeadModel"
    if model.experts:
        return "Qwen3MoeForCausalLM"
    if model.qk_norm:
        return "Qwen3ForCausalLM"
    if model.qkv_bias and not model.out_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if model.sliding_window else "LlamaForCausalLM"


def _per_layer(model: Transformer) -> tuple:
    window = model.sliding_window
    return window if isinstance(window, tuple) else (window,) * model.layers
