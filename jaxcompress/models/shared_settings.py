"""Settings that several of Hugging Face's model families share."""

from jaxcompress.models.settings import Table, affects, harmless, only

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
        "model, convert it to dense weights with that tool, or (compressed-tensors) "
        "pass keep_quantized=True"
    ),
    "compression_config": only(
        reason="the weights are stored as codes of another tool; load the original "
        "model, convert it to dense weights with that tool, or (compressed-tensors) "
        "pass keep_quantized=True"
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
DECODER = {
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
QWEN_WINDOWS = {
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

NOT_GEMMA = ("hidden_act", "original_max_position_embeddings")

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
