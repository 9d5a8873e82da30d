"""The Transformer that a Hugging Face `config.json` describes."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxcompress.models import bert
from jaxcompress.models.families import FAMILIES
from jaxcompress.models.settings import agree, check
from jaxcompress.models.shared_settings import ROPE_TABLES
from jaxcompress.models.transformer import Transformer

SOURCE = "config.json"
# What makes a Transformer a GPT-2.
GPT2 = {
    "rope_theta": None,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated": False,
    "norm": "layer",
}
ENCODER = "BertModel"
MODEL_TYPES = {  # by which transformers chooses the architecture
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": ENCODER,
}
LAYER_TYPES = ("sliding_attention", "full_attention")
# transformers' names of activations; ours may have several.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Name the family of a configuration; raises ValueError on an unknown one.

    The type of the model decides where no architecture is named.
    """
    kind = config.get("model_type")
    named = config.get("architectures") or MODEL_TYPES.get(str(kind))
    if not named:
        raise ValueError(
            f"the configuration names no architecture, and its model_type is {kind!r}; "
            f"add one to its architectures: {', '.join(FAMILIES)}"
        )
    name = named if isinstance(named, str) else named[0]
    if name not in FAMILIES:
        raise ValueError(
            f"architecture {name!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return name


def model_from(
    config: Mapping[str, Any], *, ignore: Collection[str] = (), source: str = SOURCE
) -> Transformer | bert.Bert:
    """Build the Transformer, or the encoder, that a `config.json` describes."""
    name = architecture_of(config)
    if "model_type" not in ignore:
        other = MODEL_TYPES.get(config.get("model_type", ""), name)
        agree([("architectures", name), ("model_type", other)], source=source)
    if not {"dtype", "torch_dtype"} & {*ignore}:
        dtypes = [(key, config.get(key)) for key in ("dtype", "torch_dtype")]
        agree(dtypes, source=source)
    try:
        return _model_of(name, config, ignore, source)
    except KeyError as error:
        raise ValueError(f"{source} ({name}) has no {error.args[0]}") from error


def _model_of(
    name: str, config: Mapping[str, Any], ignore: Collection[str], source: str
) -> Transformer | bert.Bert:
    if name != ENCODER:
        return transformer_from(config, ignore=ignore, source=source)
    check(config, FAMILIES[ENCODER].table, of=ENCODER, source=source, ignore=ignore)
    return bert.bert_from(config)


def transformer_from(
    config: Mapping[str, Any], *, ignore: Collection[str] = (), source: str = SOURCE
) -> Transformer:
    """Build the Transformer that a Hugging Face `config.json` describes.

    Args:
      config: the file's contents.
      ignore: keys to pass over that would be refused because no table has them.
      source: the file, for messages.

    Raises:
      ValueError: an unknown architecture or key, a value that is not supported, two
        spellings of one setting that differ; each is named.
    """
    name = architecture_of(config)
    family = FAMILIES[name]
    config = {k: x for k, x in config.items() if x is not None and k not in ignore}
    check(config, family.table, of=name, source=source)
    config = {**family.defaults, **config}
    if name == "Gemma3ForCausalLM":
        return _gemma(config, ignore, source)
    if name == "GPT2LMHeadModel":
        return _gpt2(config, source)
    heads = config["num_attention_heads"]
    theta, scaling = _rope(config, ignore, source)
    bias = bool(config.get("attention_bias")) and name != "MistralForCausalLM"
    qwen2 = name == "Qwen2ForCausalLM"
    model = Transformer(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=bool(config.get("mlp_bias")) and name == "LlamaForCausalLM",
        qk_norm=name.startswith("Qwen3"),
        sliding_window=_windows(name, config),
        activation=_activation(config.get("hidden_act", "silu"), source),
    )
    return _experts(model, config) if name == "Qwen3MoeForCausalLM" else model


def _experts(model: Transformer, config: Mapping[str, Any]) -> Transformer:
    """Return the model with mixtures of experts in all layers but some."""
    step, dense = config["decoder_sparse_step"], config.get("mlp_only_layers") or ()
    layers = range(model.layers)
    dense = tuple(i for i in layers if i in dense or (i + 1) % step)
    if not config["num_experts"] or len(dense) == model.layers:
        return model
    return model.clone(
        experts=config["num_experts"],
        chosen_experts=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        normalized_experts=config["norm_topk_prob"],
        dense_layers=dense,
    )


def _gpt2(config: Mapping[str, Any], source: str) -> Transformer:
    """Build GPT-2: learned positions, norms with means, plain feed-forward layers."""
    heads, width = config["n_head"], config["n_embd"]
    return Transformer(
        vocab_size=config["vocab_size"],
        width=width,
        layers=config["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        mlp_width=config.get("n_inner") or 4 * width,
        positions=config["n_positions"],
        norm_eps=config["layer_norm_epsilon"],
        tied=config["tie_word_embeddings"],
        activation=_activation(config["activation_function"], source),
        **GPT2,
    )


def _gemma(
    config: Mapping[str, Any], ignore: Collection[str], source: str
) -> Transformer:
    """Build Gemma 3: global layers and local ones, each with a rotation of its own."""
    parts = config.get("rope_parameters") or {}
    if strange := sorted(set(parts) - set(LAYER_TYPES)):
        raise ValueError(
            f"{source}: rope_parameters of Gemma 3 holds one rotation for each of "
            f"{', '.join(LAYER_TYPES)}; it has {strange}"
        )
    common = {k: x for k, x in config.items() if not k.startswith("rope_")}
    whole = {
        "rope_parameters": parts.get("full_attention"),
        "rope_scaling": config.get("rope_scaling"),
        "rope_theta": config.get("rope_theta"),
    }
    local = {
        "rope_parameters": parts.get("sliding_attention"),
        "rope_theta": config.get("rope_local_base_freq"),
    }
    theta, scaling = _rope(common | whole, ignore, source, 1e6)
    local_theta, local_scaling = _rope(common | local, ignore, source)
    if local_scaling or (scaling and dict(scaling)["rope_type"] != "linear"):
        raise ValueError(
            f"{source}: rotations {dict(scaling or ())} of global layers and "
            f"{dict(local_scaling or ())} of local ones; only linear scaling of the "
            "global ones is supported"
        )
    layers, size = config["num_hidden_layers"], config["head_dim"]
    kinds = config.get("layer_types") or [
        LAYER_TYPES[(i + 1) % config["sliding_window_pattern"] == 0]
        for i in range(layers)
    ]
    scalar = config["query_pre_attn_scalar"]
    bias = bool(config.get("attention_bias"))
    return Transformer(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=size,
        mlp_width=config["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_rope_theta=local_theta,
        sliding_window=_by_kind(kinds, config["sliding_window"], layers),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config["tie_word_embeddings"],
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        attention_scale=None if scalar == size else scalar**-0.5,
        activation=_activation(config["hidden_activation"], source),
        post_norms=True,
        scaled_embedding=True,
    )


def _activation(name: str, source: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{source}: activation {name!r} is not supported; supported are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rope(
    config: Mapping[str, Any],
    ignore: Collection[str],
    source: str,
    default: float = 10000.0,
) -> tuple[float, tuple | None]:
    """Base and scaling; recent files keep both in `rope_parameters`."""
    dicts = {
        name: _rope_dict(config.get(name), f"{source}, {name}", ignore)
        for name in ("rope_parameters", "rope_scaling")
    }
    bases = [
        (f"{name}.rope_theta", x.pop("rope_theta", None)) for name, x in dicts.items()
    ]
    theta = agree([*bases, ("rope_theta", config.get("rope_theta"))], source=source)
    options = agree([(name, x or None) for name, x in dicts.items()], source=source)
    theta = float(theta or default)
    return theta, _scaling(dict(options or {}), config, source)


def _rope_dict(
    entries: Mapping[str, Any] | None, source: str, ignore: Collection[str]
) -> dict[str, Any]:
    """Check a dict that describes the rotation; `rope_type` is in it, `type` is not."""
    options = {k: x for k, x in (entries or {}).items() if x is not None}
    if not options:
        return {}
    spellings = [(key, options.pop(key, None)) for key in ("rope_type", "type")]
    options["rope_type"] = kind = agree(spellings, source=source) or "default"
    if kind not in ROPE_TABLES:
        raise ValueError(
            f"{source}: rotation of type {kind!r} is not supported; supported are "
            f"{', '.join(ROPE_TABLES)}"
        )
    options = {k: x for k, x in options.items() if k not in ignore}
    check(options, ROPE_TABLES[kind], of=f"rotation of type {kind!r}", source=source)
    options.pop("finetuned", None)
    options.pop("partial_rotary_factor", None)
    return options


def _scaling(
    options: dict[str, Any], config: Mapping[str, Any], source: str
) -> tuple[tuple[str, Any], ...] | None:
    """Return pairs of `rope_scaling`, with the original length where it is needed."""
    kind = options.get("rope_type", "default")
    if kind == "default":
        return None
    if kind in ("llama3", "yarn"):
        key, longest = "original_max_position_embeddings", "max_position_embeddings"
        length = agree([(key, options.get(key)), (key, config.get(key))], source=source)
        options[key] = length or config.get(longest)
        if kind == "yarn" and options.get("factor") is None and length:
            options["factor"] = config[longest] / length
    return tuple(sorted(options.items()))


def _windows(name: str, config: Mapping[str, Any]) -> Any:
    """Return sliding window: None, one number, or a tuple with one entry per layer."""
    window = config.get("sliding_window")
    if name == "LlamaForCausalLM" or not window:
        return None
    if name == "MistralForCausalLM":
        return window
    if name == "Qwen3MoeForCausalLM":
        return window if config.get("use_sliding_window") else None
    if not config.get("use_sliding_window", False):
        return None
    layers = range(config["num_hidden_layers"])
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= config["max_window_layers"] else "full_attention"
        for i in layers
    ]
    return _by_kind(kinds, window, config["num_hidden_layers"])


def _by_kind(kinds: list[str], window: int, layers: int) -> Any:
    window_of = dict(zip(LAYER_TYPES, (window, None), strict=True))
    if len(kinds) != layers or set(kinds) - set(window_of):
        raise ValueError(
            f"layer_types has {len(kinds)} entries for {layers} layers, of types "
            f"{sorted(set(kinds))}; supported are {', '.join(window_of)}"
        )
    windows = tuple(window_of[kind] for kind in kinds)
    return windows[0] if len(set(windows)) == 1 else windows
