"""Hugging Face's model families: defaults, names of tensors, tables of settings.

Every `affects` carries an alternative, recorded with transformers by
`scripts/record_settings.py`: a change of `BASE` under which the key matters.
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
from jaxcompress.models.shared_settings import (
    BASE,
    COMMON,
    DECODER,
    NOT_GEMMA,
    QWEN_WINDOWS,
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
THIRDS = {f"attention/{x}_proj": (i, 3) for i, x in enumerate("qkv")}
IGNORABLE = r".*rotary_emb\.inv_freq|.*\.masked_bias"


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of `config.json`.

    Attributes:
      table: every key that its configurations may have.
      defaults: what transformers assumes where the configuration is silent.
      modules: the file's names of our modules.
      ignorable: pattern of tensors that are not needed.
      norm_offset: what is added to the stored scales of norms.
      conv1d: kernels are stored as [inputs, outputs].
      fused: for modules that share a tensor, which part of how many of its outputs.
      base: the configuration from which the recorded alternatives differ.
    """

    table: Table
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: MODULES)
    ignorable: str = IGNORABLE
    norm_offset: float = 0.0
    conv1d: bool = False
    fused: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    base: Mapping[str, Any] = dataclasses.field(default_factory=lambda: BASE)


def _ignored(*keys: str) -> dict[str, Setting]:
    """Return keys that this family's implementation does not read, and others' do."""
    return dict.fromkeys(keys, HARMLESS)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        {
            **DECODER,
            **_ignored("sliding_window", "use_sliding_window", "max_window_layers"),
            "attention_bias": affects(attention_bias=True),
            "mlp_bias": affects(mlp_bias=True),
        },
    ),
    "MistralForCausalLM": Family(
        {
            **DECODER,
            **_ignored("attention_bias", "mlp_bias", "use_sliding_window"),
            "sliding_window": affects(sliding_window=3),
        },
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        {
            **DECODER,
            **QWEN_WINDOWS,
            **_ignored("attention_bias", "mlp_bias"),
            "use_mrope": only(False, reason="multimodal rotation is not supported"),
        },
        {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        {
            **DECODER,
            **QWEN_WINDOWS,
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
            **{k: x for k, x in DECODER.items() if k not in NOT_GEMMA},
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
    "Qwen3MoeForCausalLM": Family(
        {
            **DECODER,
            **_ignored("mlp_bias", "max_window_layers"),
            **harmless("output_router_logits router_aux_loss_coef"),
            "attention_bias": affects(attention_bias=True),
            "intermediate_size": affects(intermediate_size=24, mlp_only_layers=[0]),
            "use_sliding_window": affects(use_sliding_window=True, sliding_window=3),
            "sliding_window": affects(use_sliding_window=True, sliding_window=5),
            "num_experts": affects(num_experts=3),
            "num_experts_per_tok": affects(num_experts_per_tok=1),
            "moe_intermediate_size": affects(moe_intermediate_size=16),
            "norm_topk_prob": affects(norm_topk_prob=False),
            "decoder_sparse_step": affects(decoder_sparse_step=2),
            "mlp_only_layers": affects(mlp_only_layers=[1]),
        },
        {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        modules={
            **MODULES,
            "mlp/router": "mlp.gate",
            **{
                f"experts/{x}_proj": f"mlp.experts.{{}}.{x}_proj"
                for x in ("gate", "up", "down")
            },
        },
        base={
            **BASE,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "GPT2LMHeadModel": Family(
        {
            **COMMON,
            **harmless(
                "n_ctx summary_type summary_use_proj summary_activation "
                "summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn"
            ),
            "vocab_size": affects(vocab_size=48),
            "n_embd": affects(n_embd=24),
            "n_inner": affects(n_inner=24),
            "n_layer": affects(n_layer=1),
            "n_head": affects(n_head=8),
            "n_positions": affects(n_positions=32),
            "activation_function": affects(activation_function="relu"),
            "layer_norm_epsilon": affects(layer_norm_epsilon=0.3),
            "tie_word_embeddings": affects(tie_word_embeddings=False),
            "scale_attn_weights": only(True, reason="scores must be scaled"),
            "scale_attn_by_inverse_layer_idx": only(
                False, reason="layers scale their scores alike here"
            ),
        },
        {
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        modules={
            "embed": "transformer.wte",
            "positions_embed": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
            "layer": "transformer.h.{}",
            "attention_norm": "ln_1",
            "mlp_norm": "ln_2",
            **{f"attention/{x}_proj": "attn.c_attn" for x in "qkv"},
            "attention/o_proj": "attn.c_proj",
            "mlp/up_proj": "mlp.c_fc",
            "mlp/down_proj": "mlp.c_proj",
        },
        ignorable=r".*attn\.(masked_)?bias",
        conv1d=True,
        fused=THIRDS,
        base={
            "vocab_size": 64,
            "n_embd": 32,
            "n_inner": 40,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
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
