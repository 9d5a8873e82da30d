"""Hugging Face model directories: read into a Transformer, and written back.

A directory holds `config.json`, weights in one or several `.safetensors` files, and
the tokenizer as `tokenizer.json` (or SentencePiece's `tokenizer.model`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxcompress import tokenization
from jaxcompress.models import bert
from jaxcompress.models.assembly import (
    Assembled,
    assemble,
    foreign_name,
    parameter_shapes,
)
from jaxcompress.models.transformer import Transformer, unstack_layers
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tokenization.huggingface import added_marks
from jaxcompress.tokenization.piece_models import without_begin_mark
from jaxcompress.tree.leaf import dense
from jaxcompress.types import Params

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

# What each architecture assumes where its config.json is silent.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_window_layers": 28},
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_window_layers": 28,
    },
}


def read_huggingface(
    directory: str | Path, *, scan: bool = False, dtype: Any = None
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Model, parameters and tokenizer of a Hugging Face directory.

    The tokenizer is None where the directory has none. `dtype=None` keeps the type of
    every weight; the computation is float32 all the same (`model.clone(dtype=...)`).
    Raises ValueError on an architecture, an option or a tensor that is not understood,
    naming it, and FileNotFoundError on a missing file.
    """
    model, params, tokenizer = open_huggingface(directory, scan=scan, dtype=dtype)
    return model, params.read_all(), tokenizer


def open_huggingface(
    directory: str | Path, *, scan: bool = False, dtype: Any = None
) -> tuple[Transformer, Assembled, Tokenizer | None]:
    """As `read_huggingface`, but each weight is read when it is asked for."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    places = _tensor_places(directory)
    model = model_from(config).clone(scan=scan)
    encoder = isinstance(model, bert.Bert)
    if not encoder and model.tied:  # some files repeat the embedding as the head
        places.pop("lm_head.weight", None)

    def fetch(name: str, _: str) -> np.ndarray:
        with safe_open(places[name], framework="np") as file:
            return file.get_tensor(name)

    def kind(name: str) -> str:
        with safe_open(places[name], framework="np") as file:
            stored = file.get_slice(name).get_dtype()
        return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")

    params = assemble(
        model,
        places,
        fetch,
        bert.MODULES if encoder else MODULES,
        kind=kind,
        ignorable=bert.IGNORABLE if encoder else IGNORABLE,
        dtype=dtype,
        source=str(directory),
    )
    return model, params, read_tokenizer(directory)


def model_from(config: Mapping[str, Any]) -> Transformer | bert.Bert:
    """The Transformer, or the encoder, that a `config.json` describes."""
    if config.get("architectures") == ["BertModel"]:
        return bert.bert_from(config)
    return transformer_from(config)


def transformer_from(config: Mapping[str, Any]) -> Transformer:
    """The Transformer that a Hugging Face `config.json` describes."""
    names = config.get("architectures") or ["none named"]
    if names[0] not in ARCHITECTURES:
        raise ValueError(
            f"architecture {names[0]!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)} and BertModel"
        )
    name = names[0]
    config = ARCHITECTURES[name] | dict(config)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r}: only silu is supported")
    heads = config["num_attention_heads"]
    theta, scaling = _rope(config)
    every_bias = bool(config.get("attention_bias")) and name != "MistralForCausalLM"
    return Transformer(
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
        qkv_bias=every_bias or name == "Qwen2ForCausalLM",
        out_bias=every_bias and name != "Qwen2ForCausalLM",
        mlp_bias=bool(config.get("mlp_bias")) and name == "LlamaForCausalLM",
        qk_norm=name == "Qwen3ForCausalLM",
        sliding_window=_windows(name, config),
    )


def _rope(config: Mapping[str, Any]) -> tuple[float, tuple | None]:
    """Base and scaling; recent files keep both in `rope_parameters`."""
    options = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = options.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    for source in (options, config):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor {source['partial_rotary_factor']}: only "
                "rotation of whole heads is supported"
            )
    options.pop("partial_rotary_factor", None)
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind == "yarn":
        length = config.get("max_position_embeddings")
        options.setdefault("original_max_position_embeddings", length)
    pairs = sorted(options.items())
    return float(theta), tuple(
        (key, tuple(value) if isinstance(value, list) else value)
        for key, value in pairs
    )


def _windows(name: str, config: Mapping[str, Any]) -> Any:
    """The sliding window: None, one number, or a tuple with one entry per layer."""
    window = config.get("sliding_window")
    if name == "LlamaForCausalLM" or not window:
        return None
    if name == "MistralForCausalLM":
        return window
    if not config.get("use_sliding_window", False):
        return None
    layers = range(config["num_hidden_layers"])
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= config["max_window_layers"] else "full_attention"
        for i in layers
    ]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows[0] if len(set(windows)) == 1 else windows


def _tensor_places(directory: Path) -> dict[str, Path]:
    """The file each tensor lies in, by the files' own headers."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [directory / file for file in sorted(set(listed.values()))]
        if absent := [path.name for path in files if not path.exists()]:
            raise FileNotFoundError(
                f"{index} lists {', '.join(absent)}, which {directory} does not hold"
            )
    else:
        files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{directory} has {len(files)} .safetensors files and no "
                "model.safetensors or index of shards; other formats (.bin, .pth) are "
                "not read: convert them with transformers' save_pretrained"
            )
    places = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                places |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole .safetensors file: {error}") from (
                error
            )
    return places


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer, with its begin and end marks, or None.

    Texts have the marks that `add_bos_token` and `add_eos_token` in
    tokenizer_config.json say; where they do not, those that the post-processor of
    tokenizer.json adds.
    """
    described, pieces = directory / "tokenizer.json", directory / "tokenizer.model"
    settings, known = directory / "tokenizer_config.json", {}
    if settings.exists():
        known = json.loads(settings.read_text(encoding="utf-8"))
    if described.exists():
        text = tokenization.read_text(described)
        added = added_marks(text)
        marks: dict[str, Any] = {}
        for mark, place in (("bos", 0), ("eos", -1)):
            token = known.get(f"{mark}_token")
            token = token["content"] if isinstance(token, dict) else token
            add = known.get(f"add_{mark}_token")
            if add is None:
                add = bool(added) and added[place] == token
            marks |= {mark: token, f"add_{mark}": add}
        return tokenization.from_huggingface_json(text, **marks)
    if pieces.exists():
        model = pieces.read_bytes()
        if known.get("add_bos_token") is False:
            model = without_begin_mark(model)
        return tokenization.from_bytes(model)
    return None


def export_huggingface(
    directory: str | Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    context: int = 8192,
) -> None:
    """Write a model as a Hugging Face directory that transformers loads.

    Compressed leaves are written dense: the size of the directory is that of the dense
    model. `context` is the number of tokens it calls the model's maximum, which a
    Transformer does not record. Raises ValueError where no supported architecture has
    the model's settings (heads or widths that differ between layers, for one).
    """
    directory = Path(directory)
    config = config_from(model) | {"max_position_embeddings": context}
    for key in ("bos_id", "eos_id"):
        config[f"{key[:3]}_token_id"] = getattr(tokenizer, key, None)
    flat = flatten_dict(unstack_layers(params) if model.scan else params, sep="/")
    wanted = parameter_shapes(model)
    if set(flat) != set(wanted):
        strange = sorted(set(flat) ^ set(wanted))
        raise ValueError(
            f"params do not belong to this model: {strange[0]} is in one of them only"
        )
    tensors = {}
    for name, leaf in flat.items():
        array = dense(leaf)
        tensors[foreign_name(name, MODULES)] = (
            array.T if name.endswith("/kernel") else jnp.asarray(array)
        )
    config["dtype"] = str(tensors["model.embed_tokens.weight"].dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if tokenizer is not None:
        _write_tokenizer(directory, tokenizer)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    stored = tokenizer.to_bytes()
    if not stored.startswith(b"{"):  # a SentencePiece model
        (directory / "tokenizer.model").write_bytes(stored)
        return
    contents = json.loads(stored)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for mark in ("bos", "eos"):
        if contents[mark] is not None:
            settings[f"{mark}_token"] = contents[mark]
            settings[f"add_{mark}_token"] = contents.get(f"add_{mark}", mark == "bos")
    (directory / "tokenizer.json").write_bytes(contents["tokenizer"].encode())
    text = json.dumps(settings, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def config_from(model: Transformer) -> dict[str, Any]:
    """What `config.json` says of a model; the inverse of `transformer_from`."""
    for field in ("heads", "kv_heads", "mlp_width"):
        if not isinstance(getattr(model, field), int):
            raise ValueError(
                f"{field} is {getattr(model, field)}, one number per layer, which "
                "Hugging Face's configurations cannot say; keep the model in a file "
                "of models.save_model"
            )
    name = _architecture(model)
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
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "rope_theta": model.rope_theta,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "attention_bias": model.qkv_bias and model.out_bias,
        "mlp_bias": model.mlp_bias,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    windows = model.sliding_window
    if not isinstance(windows, tuple):
        windows = (windows,) * model.layers
    if any(windows):
        config["sliding_window"] = max(filter(None, windows))
        config["use_sliding_window"] = True
        if name != "MistralForCausalLM":  # which has one window for all layers
            config["layer_types"] = [
                "sliding_attention" if window else "full_attention"
                for window in windows
            ]
    again = transformer_from(config)
    fields = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied", "head_size")
    differing = [x for x in fields if getattr(again, x) != getattr(model, x)]
    if _per_layer(again) != windows:
        differing.append("sliding_window")
    if differing:
        raise ValueError(
            f"{name} is the nearest Hugging Face architecture, but it cannot have "
            + ", ".join(f"{x}={getattr(model, x)}" for x in differing)
        )
    return config


def _architecture(model: Transformer) -> str:
    if model.qk_norm:
        return "Qwen3ForCausalLM"
    if model.qkv_bias and not model.out_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if model.sliding_window else "LlamaForCausalLM"


def _per_layer(model: Transformer) -> tuple:
    window = model.sliding_window
    return window if isinstance(window, tuple) else (window,) * model.layers
