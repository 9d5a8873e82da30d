"""Hugging Face's model families: defaults, names of tensors, tables of settings.

Every `affects` carries an alternative, recorded with transformers by
`experiments/record_settings.py`: a change of `BASE` under which the key matters.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcompress.models import bert
from jaxcompress.models.settings import (
    HARMLESS,
    Setting,
    Table,
    affects,
    harmless,
    only,
)

MODULES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention/{x}": f"self_attn.{x}" for x in ("q_norm", "k_norm")},
    **{f"attention/{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp/{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
IGNORABLE = r".*rotary_emb\.inv_freq|.*\.masked_bias"

# The configuration from which the recorded alternatives differ.
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

COMMON = {
    **harmless(
        "architectures model_type transformers_version torch_dtype dtype use_cache "
        "initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop "
        "attn_pdrop hidden_dropout_prob attention_probs_dropout_prob "
        "classifier_dropout bos_token_id eos_token_id pad_token_id sep_token_id "
        "cls_token_id _name_or_path name_or_path _commit_hash _attn_implementation "
        "attn_implementation _attn_implementation_autoset return_dict "
        "output_hidden_states output_attentions output_scores id2label label2id "
        "num_labels problem_type task_specific_params finetuning_task "
        "pretraining_tp gradient_checkpointing transformers.js_config "
        "unsloth_fixed unsloth_version torchscript use_bfloat16 is_llama_config "
        "tokenizer_class prefix decoder_start_token_id chunk_size_feed_forward "
        "tie_encoder_decoder cross_attention_hidden_size "
        # How transformers' generate samples, from the time before generation_config.
        "max_length min_length do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p typical_p repetition_penalty "
        "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "bad_words_ids num_return_sequences begin_suppress_tokens suppress_tokens "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values return_dict_in_generate"
    ),
    "is_encoder_decoder": only(False, reason="only decoders are supported"),
    "is_decoder": only(False, True, reason="must be a boolean"),
    "add_cross_attention": only(False, reason="cross attention is not supported"),
    "pruned_heads": only({}, reason="pruned heads are not supported"),
    "auto_map": only(
        reason="the model is computed by Python code in its own repository, which "
        "is not run here; convert it to a supported architecture"
    ),
    "quantization_config": only(
        reason="the weights are stored as codes of another tool; load the original "
        "model, or convert it to dense weights with that tool"
    ),
    "compression_config": only(
        reason="the weights are stored as codes of another tool; load the original "
        "model, or convert it to dense weights with that tool"
    ),
}

_WHOLE = {
    "partial_rotary_factor": only(1.0, 1, reason="whole heads must rotate"),
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0}
_ROPE = {
    "rope_theta": affects(rope_theta=100.0),
    "rope_parameters": affects(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
    ),
    "rope_scaling": affects(rope_scaling={"type": "linear", "factor": 4.0}),
    "original_max_position_embeddings": affects(
        rope_scaling=_YARN, original_max_position_embeddings=16
    ),
    "max_position_embeddings": affects(rope_scaling=_YARN, max_position_embeddings=16),
    **_WHOLE,
    "rope_interleaved": only(
        False, reason="only the pairing (i, i + D/2) is supported"
    ),
}
_DECODER = {
    **COMMON,
    **_ROPE,
    "vocab_size": affects(vocab_size=48),
    "hidden_size": affects(hidden_size=24),
    "intermediate_size": affects(intermediate_size=24),
    "num_hidden_layers": affects(num_hidden_layers=1),
    "num_attention_heads": affects(num_attention_heads=8),
    "num_key_value_heads": affects(num_key_value_heads=1),
    "head_dim": affects(head_dim=12),
    "hidden_act": affects(hidden_act="gelu_pytorch_tanh"),
    "rms_norm_eps": affects(rms_norm_eps=0.3),
    "tie_word_embeddings": affects(tie_word_embeddings=True),
}
_QWEN_WINDOWS = {
    "use_sliding_window": affects(
        use_sliding_window=True, sliding_window=3, max_window_layers=0
    ),
    "sliding_window": affects(
        use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "max_window_layers": affects(
        use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "layer_types": affects(
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    ),
}

_NOT_GEMMA = ("hidden_act", "original_max_position_embeddings")

# Keys of the dict that describes the rotation, by its kind.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN16 = _YARN | {"original_max_position_embeddings": 16}
ROPE_TABLES: dict[str, Table] = {
    "default": {**harmless("rope_type rope_theta finetuned"), **_WHOLE},
    "linear": {
        **harmless("rope_type rope_theta finetuned"),
        **_WHOLE,
        "factor": affects(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    },
    "llama3": {
        **harmless("rope_type rope_theta"),
        **_WHOLE,
        "factor": affects(rope_scaling=_LLAMA3 | {"factor": 16.0}),
        "low_freq_factor": affects(rope_scaling=_LLAMA3 | {"low_freq_factor": 0.5}),
        "high_freq_factor": affects(rope_scaling=_LLAMA3 | {"high_freq_factor": 9.0}),
        "original_max_position_embeddings": affects(
            rope_scaling=_LLAMA3 | {"original_max_position_embeddings": 32}
        ),
    },
    "yarn": {
        **harmless("rope_type rope_theta finetuned"),
        **_WHOLE,
        "factor": affects(rope_scaling=_YARN16 | {"factor": 16.0}),
        "original_max_position_embeddings": affects(
            rope_scaling=_YARN | {"original_max_position_embeddings": 32}
        ),
        "attention_factor": affects(rope_scaling=_YARN16 | {"attention_factor": 2.0}),
        "beta_fast": affects(rope_scaling=_YARN16 | {"beta_fast": 2.0}),
        "beta_slow": affects(rope_scaling=_YARN16 | {"beta_slow": 0.01}),
        "mscale": affects(
            rope_scaling=_YARN16 | {"mscale": 9.0, "mscale_all_dim": 1.0}
        ),
        "mscale_all_dim": affects(
            rope_scaling=_YARN16 | {"mscale": 1.0, "mscale_all_dim": 9.0}
        ),
        "truncate": affects(rope_scaling=_YARN16 | {"truncate": False}),
    },
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of `config.json`.

    Attributes:
      table: every key that its configurations may have.
      defaults: what transformers assumes where the configuration is silent.
      modules: the file's names of our modules.
      ignorable: pattern of tensors that are not needed.
      norm_offset: what is added to the stored scales of norms.
      base: the configuration from which the recorded alternatives differ.
    """

    table: Table
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: MODULES)
    ignorable: str = IGNORABLE
    norm_offset: float = 0.0
    base: Mapping[str, Any] = dataclasses.field(default_factory=lambda: BASE)


def _ignored(*keys: str) -> dict[str, Setting]:
    """Keys that this family's implementation does not read, and others' do."""
    return dict.fromkeys(keys, HARMLESS)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        {
            **_DECODER,
            **_ignored("sliding_window", "use_sliding_window", "max_window_layers"),
            "attention_bias": affects(attention_bias=True),
            "mlp_bias": affects(mlp_bias=True),
        },
    ),
    "MistralForCausalLM": Family(
        {
            **_DECODER,
            **_ignored("attention_bias", "mlp_bias", "use_sliding_window"),
            "sliding_window": affects(sliding_window=3),
        },
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        {
            **_DECODER,
            **_QWEN_WINDOWS,
            **_ignored("attention_bias", "mlp_bias"),
            "use_mrope": only(False, reason="multimodal rotation is not supported"),
        },
        {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        {
            **_DECODER,
            **_QWEN_WINDOWS,
            **_ignored("mlp_bias"),
            "attention_bias": affects(attention_bias=True),
        },
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_window_layers": 28,
            "sliding_window": 4096,
        },
        base={**BASE, "head_dim": 8},
    ),
    "Gemma3ForCausalLM": Family(
        {
            **{k: x for k, x in _DECODER.items() if k not in _NOT_GEMMA},
            **_ignored("cache_implementation", "_sliding_window_pattern"),
            "max_position_embeddings": HARMLESS,
            "num_hidden_layers": affects(
                num_hidden_layers=1, layer_types=["sliding_attention"]
            ),
            "head_dim": affects(head_dim=12, query_pre_attn_scalar=12),
            "rope_scaling": affects(
                rope_scaling={"rope_type": "linear", "factor": 4.0}
            ),
            "rope_theta": affects(rope_theta=50.0),
            "rope_local_base_freq": affects(rope_local_base_freq=50.0),
            "rope_parameters": affects(
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
                    "full_attention": {"rope_type": "linear", "factor": 4.0},
                }
            ),
            "hidden_activation": affects(hidden_activation="silu"),
            "tie_word_embeddings": affects(tie_word_embeddings=False),
            "attention_bias": affects(attention_bias=True),
            "query_pre_attn_scalar": affects(query_pre_attn_scalar=32),
            "sliding_window": affects(sliding_window=3),
            "layer_types": affects(layer_types=["full_attention", "sliding_attention"]),
            "sliding_window_pattern": affects(
                layer_types=None, sliding_window_pattern=1
            ),
            "use_bidirectional_attention": only(
                False, reason="only causal attention is supported"
            ),
            "attn_logit_softcapping": only(reason="soft caps are not supported"),
            "final_logit_softcapping": only(reason="soft caps are not supported"),
        },
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        modules={
            **MODULES,
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        base={
            **{k: x for k, x in BASE.items() if not k.startswith("tie")},
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "BertModel": Family(
        {
            **COMMON,
            "vocab_size": affects(vocab_size=48),
            "hidden_size": affects(hidden_size=24),
            "intermediate_size": affects(intermediate_size=24),
            "num_hidden_layers": affects(num_hidden_layers=1),
            "num_attention_heads": affects(num_attention_heads=8),
            "max_position_embeddings": affects(max_position_embeddings=32),
            "type_vocab_size": affects(type_vocab_size=3),
            "layer_norm_eps": affects(layer_norm_eps=0.3),
            "hidden_act": only("gelu", reason="only gelu is supported"),
            "position_embedding_type": only(
                "absolute", reason="only absolute positions are supported"
            ),
            **_ignored("tie_word_embeddings", "pooler_fc_size", "pooler_type"),
        },
        modules=bert.MODULES,
        ignorable=bert.IGNORABLE,
        base={k: x for k, x in BASE.items() if not k.startswith(("tie", "num_key"))},
    ),
}
