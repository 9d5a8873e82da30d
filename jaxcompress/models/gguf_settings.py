"""Tables of the metadata of GGUF files, one for each architecture.

A setting that `affects` names the case in Hugging Face's table (`like`) whose recorded
logits a file with the alternative must give. llama.cpp reads keys of the architecture
and of the tokenizer; what other tools write under other names is harmless.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxcompress.models.families import THIRDS
from jaxcompress.models.settings import HARMLESS, Setting, Table, check, harmless, only


def like(case: str, **alternative: Any) -> Setting:
    """Mark a key that the loader reads; dots in keys are written as two underscores."""
    changes = {key.replace("__", "."): x for key, x in alternative.items()}
    return Setting("affects", alternative=changes, like=case)


_YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0,
    "rope__scaling__yarn_beta_fast": 4.0,
    "rope__scaling__original_context_length": 16,
}
_HEADS = {
    "attention__key_length": 12,
    "attention__value_length": 12,
    "rope__dimension_count": 12,
}
_LINEAR = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
_NO_LENGTH = {k: x for k, x in _YARN.items() if "original" not in k}

_DECODER: Table = {
    **harmless("vocab_size tensor_data_layout rope.scaling.finetuned"),
    "context_length": like("max_position_embeddings", **_NO_LENGTH, context_length=16),
    "embedding_length": like("hidden_size", embedding_length=24),
    "block_count": like("num_hidden_layers", block_count=1),
    "feed_forward_length": like("intermediate_size", feed_forward_length=24),
    "attention.head_count": like("num_attention_heads", attention__head_count=8),
    "attention.head_count_kv": like("num_key_value_heads", attention__head_count_kv=1),
    "attention.key_length": like("head_dim", **_HEADS),
    "attention.value_length": like("head_dim", **_HEADS),
    "rope.dimension_count": like("head_dim", **_HEADS),
    "attention.layer_norm_rms_epsilon": like(
        "rms_norm_eps", attention__layer_norm_rms_epsilon=0.3
    ),
    "attention.causal": only(True, reason="only causal attention is supported"),
    "rope.freq_base": like("rope_theta", rope__freq_base=100.0),
    "rope.scale_linear": like("rope_scaling", rope__scale_linear=4.0),
    "rope.scaling.type": like("rope_scaling", **_LINEAR),
    "rope.scaling.factor": like("rope_scaling", **_LINEAR),
    "rope.scaling.original_context_length": like(
        "original_max_position_embeddings", **_YARN
    ),
    "rope.scaling.attn_factor": like(
        "yarn.attention_factor",
        **_YARN,
        rope__scaling__attn_factor=2 / (1 + 0.1 * math.log(4)),
    ),
    "rope.scaling.yarn_attn_factor": like(
        "yarn.attention_factor",
        **_YARN,
        rope__scaling__yarn_attn_factor=2 / (1 + 0.1 * math.log(4)),
    ),
    "rope.scaling.yarn_beta_fast": like(
        "yarn.beta_fast", **_YARN | {"rope__scaling__yarn_beta_fast": 2.0}
    ),
    "rope.scaling.yarn_beta_slow": like(
        "yarn.beta_slow", **_YARN, rope__scaling__yarn_beta_slow=0.01
    ),
    "rope.scaling.yarn_ext_factor": only(
        -1.0, 1.0, reason="only full extrapolation is supported"
    ),
    "rope.scaling.yarn_log_multiplier": only(
        0.0, reason="another magnitude of rotations is not supported"
    ),
    "expert_count": only(0, reason="mixtures of experts are not supported here"),
    "expert_used_count": only(0, reason="mixtures of experts are not supported here"),
}


MODULES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "layer": "blk.{}",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    **{f"attention/{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"attention/{x}_proj": f"attn_{x}" for x in "qkv"},
    "attention/o_proj": "attn_output",
    **{f"mlp/{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files.

    Attributes:
      table: every key that may follow the architecture's name in the metadata.
      family: the Hugging Face family whose recorded logits the tests compare.
      interleaved: heads rotate pairs (2i, 2i + 1), not (i, i + D/2).
      modules: the file's names of our modules.
      fused: for modules that share a tensor, which part of how many of its outputs.
      defaults: what llama.cpp assumes where the metadata are silent.
    """

    table: Table
    family: str
    interleaved: bool = False
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: MODULES)
    fused: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_DECODER, "LlamaForCausalLM", interleaved=True),
    "mistral": Architecture(
        {
            **_DECODER,
            "attention.sliding_window": like(
                "sliding_window", attention__sliding_window=3
            ),
        },
        "MistralForCausalLM",
        interleaved=True,
    ),
    "qwen2": Architecture(_DECODER, "Qwen2ForCausalLM"),
    "qwen3": Architecture(_DECODER, "Qwen3ForCausalLM"),
    "qwen3moe": Architecture(
        {
            **_DECODER,
            "feed_forward_length": HARMLESS,  # of dense layers, which it has not
            "expert_count": like("num_experts", expert_count=3),
            "expert_used_count": like("num_experts_per_tok", expert_used_count=1),
            "expert_feed_forward_length": like(
                "moe_intermediate_size", expert_feed_forward_length=16
            ),
        },
        "Qwen3MoeForCausalLM",
        modules={
            **MODULES,
            "mlp/router": "ffn_gate_inp",
            **{f"experts/{x}_proj": f"ffn_{x}_exps" for x in ("gate", "up", "down")},
        },
    ),
    "gpt2": Architecture(
        {
            **harmless("attention.head_count_kv vocab_size"),
            "context_length": like("n_positions", context_length=32),
            "embedding_length": like("n_embd", embedding_length=24),
            "block_count": like("n_layer", block_count=1),
            "feed_forward_length": like("n_inner", feed_forward_length=24),
            "attention.head_count": like("n_head", attention__head_count=8),
            "attention.layer_norm_epsilon": like(
                "layer_norm_epsilon", attention__layer_norm_epsilon=0.3
            ),
            "attention.causal": only(True, reason="only causal attention is supported"),
        },
        "GPT2LMHeadModel",
        modules={
            **MODULES,
            "positions_embed": "position_embd",
            **{f"attention/{x}_proj": "attn_qkv" for x in "qkv"},
        },
        fused=THIRDS,
    ),
    "gemma3": Architecture(
        {
            **{k: x for k, x in _DECODER.items() if "yarn" not in k},
            "context_length": HARMLESS,
            "rope.scaling.original_context_length": HARMLESS,
            "rope.freq_base": like("rope_theta", rope__freq_base=50.0),
            "rope.freq_base_swa": like(
                "rope_local_base_freq", rope__freq_base_swa=50.0
            ),
            "attention.sliding_window": like(
                "sliding_window", attention__sliding_window=3
            ),
            "attention.sliding_window_pattern": like(
                "sliding_window_pattern", attention__sliding_window_pattern=1
            ),
            "final_logit_softcapping": only(0.0, reason="soft caps are not supported"),
            "attn_logit_softcapping": only(0.0, reason="soft caps are not supported"),
        },
        "Gemma3ForCausalLM",
        modules={
            **MODULES,
            "attention_post_norm": "post_attention_norm",
            "mlp_post_norm": "post_ffw_norm",
        },
        defaults={
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
            "attention.sliding_window_pattern": 6,
        },
    ),
}

_IDS = (
    "bos eos unknown padding separator seperator mask cls eot eom prefix suffix middle "
    "fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep"
)
TOKENIZER: Table = {
    **{f"tokenizer.ggml.{name}_token_id": HARMLESS for name in _IDS.split()},
    **{
        f"tokenizer.ggml.{name}_token_id": Setting("affects")
        for name in ("bos", "eos", "eot", "eom")
    },
    **{
        f"tokenizer.ggml.{name}": Setting("affects")
        for name in (
            "model",
            "pre",
            "tokens",
            "scores",
            "token_type",
            "merges",
            "add_bos_token",
            "add_eos_token",
            "add_space_prefix",
        )
    },
    "tokenizer.ggml.add_sep_token": only(False, reason="texts have no separators here"),
    "tokenizer.ggml.remove_extra_whitespaces": only(
        False, reason="text would be changed before it is segmented"
    ),
    **harmless("tokenizer.ggml.token_type_count tokenizer.huggingface.json"),
}
_TEMPLATES = r"tokenizer\.chat_templates?(\..*)?"


def check_metadata(
    metadata: Mapping[str, Any], *, source: str, ignore: Collection[str] = ()
) -> None:
    """Raise ValueError on metadata that a loader of this architecture must not skip."""
    name = metadata["general.architecture"]
    if (what := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{source} holds no model, but what it calls {what!r}")
    prefix = f"{name}."
    settings = {k: x for k, x in metadata.items() if k.startswith(prefix)}
    table = {prefix + key: x for key, x in ARCHITECTURES[name].table.items()}
    options = {"source": source, "ignore": ignore}
    check(settings, table, of=f"GGUF architecture {name!r}", **options)
    words = {
        key: x
        for key, x in metadata.items()
        if key.startswith("tokenizer.") and not re.fullmatch(_TEMPLATES, key)
    }
    check(words, TOKENIZER, of="tokenizers of GGUF files", **options)
