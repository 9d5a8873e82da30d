"""GGUF files, llama.cpp's format: configuration, weights of any type, tokenizer.

Source: the GGUF specification and llama.cpp's converter, github.com/ggml-org: names of
metadata and tensors, and the order of rows that each architecture's rotation expects.
"""

import collections
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.models.assembly import Assembled, assemble
from jaxcompress.models.configurations import GPT2
from jaxcompress.models.gguf_settings import ARCHITECTURES, check_metadata
from jaxcompress.models.gguf_tokenizers import tokenizer_from
from jaxcompress.models.kept_codes import FLOATS, TYPES, gguf_leaf
from jaxcompress.models.rope import rope_frequencies
from jaxcompress.models.settings import agree
from jaxcompress.models.transformer import Transformer
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import DType, Params

ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's scaling arrives as a tensor of factors; these are its constants.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True)
class Contents:
    """Metadata and tensors of a GGUF model, of all files that it is split into."""

    source: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]


def read_gguf(
    path: str | Path,
    *,
    scan: bool = False,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Read model, parameters and tokenizer of a `.gguf` file.

    Every weight is dequantized, to float32 unless `dtype` says otherwise. Of a split
    model (`name-00001-of-00003.gguf`) any file may be named; all must be in one folder.
    Mistral and SmolLM2 files call themselves "llama". `ignore` are keys of the metadata
    to pass over. `keep_quantized`: weights of Q4_0, Q4_1 and Q8_0 become `Quantized`
    leaves of the same codes and scales. Raises ModuleNotFoundError without the `gguf`
    package, ValueError on an architecture, metadata or a tensor that is not understood,
    naming it.
    """
    model, params, tokenizer = open_gguf(
        path, scan=scan, dtype=dtype, ignore=ignore, keep_quantized=keep_quantized
    )
    return model, params.read_all(), tokenizer


def open_gguf(
    path: str | Path,
    *,
    scan: bool = False,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
) -> tuple[Transformer, Assembled, Tokenizer | None]:
    """Open a file as `read_gguf` reads it; each weight is read when it is asked for."""
    contents = _contents(path)
    model = model_of(contents, ignore=ignore).clone(scan=scan)
    kind = ARCHITECTURES[contents.metadata["general.architecture"]]

    dtype = jnp.float32 if dtype is None else dtype
    if keep_quantized:
        _warn_of_others(contents)

    def fetch(name: str, ours: str) -> Any:
        tensor = contents.tensors[name]
        rotated = "/q_proj/" in ours or "/k_proj/" in ours
        rows = None
        if part := kind.fused.get("/".join(ours.split("/")[1:-1])):
            rows = np.split(np.arange(int(tensor.shape[-1])), part[1])[part[0]]
        if rotated and kind.interleaved:
            rows = _halves(np.arange(int(tensor.shape[-1])), model.head_size)
        if keep_quantized and tensor.tensor_type.name in TYPES:
            return gguf_leaf(tensor, ours, dtype, rows)
        array = dequantize(tensor)
        return array if rows is None else array[rows]

    params = assemble(
        model,
        contents.tensors,
        fetch,
        kind.modules,
        ignorable=ROPE_FACTORS,
        dtype=dtype,
        source=str(path),
    )
    return model, params, tokenizer_from(contents.metadata)


def _warn_of_others(contents: Contents) -> None:
    """Warn where tensors are quantized in types that no leaf holds exactly."""
    others = collections.Counter(
        kind
        for tensor in contents.tensors.values()
        if (kind := tensor.tensor_type.name) not in (*TYPES, *FLOATS)
    )
    if others:
        listed = ", ".join(f"{count} of {kind}" for kind, count in others.items())
        warnings.warn(
            f"{contents.source}: tensors whose types have no leaf ({listed}) are "
            f"dequantized; kept are {', '.join(TYPES)}",
            stacklevel=4,
        )


def read_model(path: str | Path, *, ignore: Collection[str] = ()) -> Transformer:
    """Build the Transformer of a `.gguf` file from its header; no weight is read."""
    return model_of(_contents(path), ignore=ignore)


def model_of(contents: Contents, *, ignore: Collection[str] = ()) -> Transformer:
    """Build the Transformer that a file's metadata, all of it known, describes."""
    name = contents.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"GGUF architecture {name!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    check_metadata(contents.metadata, source=contents.source, ignore=ignore)
    passed = {k: x for k, x in contents.metadata.items() if k not in ignore}
    return transformer_from(passed, contents.tensors)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return a `.gguf` file's metadata, the chat template included, but not its
    tokens.
    """
    metadata = _contents(path).metadata
    return {key: x for key, x in metadata.items() if not isinstance(x, list)}


def dequantize(tensor: Any) -> np.ndarray:
    """Return a GGUF tensor as a dense float32 array, rows first as NumPy has them."""
    from gguf import quants

    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except RuntimeError as error:  # its way to say that a type is unknown
        raise ValueError(
            f"tensor {tensor.name} is stored as {tensor.tensor_type.name}, which the "
            "gguf package does not dequantize; update it, or convert the file to F16"
        ) from error


def transformer_from(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Transformer:
    """Return Transformer that a file's metadata, and which tensors it has, describe."""
    kind = metadata["general.architecture"]

    def get(key: str, *default: Any) -> Any:
        name = f"{kind}.{key}"
        present = name in metadata or key in ARCHITECTURES[kind].defaults
        if not present and not default:
            raise ValueError(f"the GGUF file lacks {name}; it is incomplete")
        value = metadata.get(name, ARCHITECTURES[kind].defaults.get(key, *default))
        return tuple(value) if isinstance(value, list) else value

    width, heads = get("embedding_length"), get("attention.head_count")
    head_size = get("attention.key_length", None)
    if head_size is None:
        head_size = width // (heads if isinstance(heads, int) else heads[0])
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_size) != head_size:
            raise ValueError(
                f"{kind}.{key} is {get(key)}, but heads have {head_size} dimensions; "
                "only equal sizes are supported"
            )
    theta = float(get("rope.freq_base", 10000.0))
    model = Transformer(
        vocab_size=int(tensors["token_embd.weight"].shape[-1])
        if "token_embd.weight" in tensors
        else len(metadata.get("tokenizer.ggml.tokens", ())),
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_size=head_size,
        mlp_width=get("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(get, tensors, head_size, theta),
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon", 1e-6)),
        tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        sliding_window=get("attention.sliding_window", None) or None,
    )
    special = {"gemma3": _gemma, "qwen3moe": _experts, "gpt2": _gpt2}.get(kind)
    return special(model, get) if special else model


def _experts(model: Transformer, get: Callable[..., Any]) -> Transformer:
    """Build Qwen3-MoE: every layer is a mixture, its weights scaled to add up to 1."""
    return model.clone(
        experts=get("expert_count"),
        chosen_experts=get("expert_used_count"),
        expert_width=get("expert_feed_forward_length"),
        normalized_experts=True,
    )


def _gpt2(model: Transformer, get: Callable[..., Any]) -> Transformer:
    """Build GPT-2 as llama.cpp does."""
    return model.clone(
        kv_heads=model.heads,
        positions=get("context_length"),
        norm_eps=_shortest(get("attention.layer_norm_epsilon")),
        activation="gelu_tanh",
        **GPT2,
    )


def _gemma(model: Transformer, get: Callable[..., Any]) -> Transformer:
    """Build Gemma 3 as llama.cpp does."""
    pattern = get("attention.sliding_window_pattern")
    if isinstance(pattern, int):
        pattern = [bool((i + 1) % pattern) for i in range(model.layers)]
    window = model.sliding_window
    windows = tuple(window if local else None for local in pattern)
    scale = None
    if model.layers == 62:  # the 27B model, of which the file does not say it
        scale = (model.width / model.heads) ** -0.5
    return model.clone(
        sliding_window=windows[0] if len(set(windows)) == 1 else windows,
        sliding_rope_theta=float(get("rope.freq_base_swa")),
        attention_scale=scale,
        activation="gelu_tanh",
        post_norms=True,
        scaled_embedding=True,
    )


def _rope_scaling(get, tensors, head_size, theta):
    if ROPE_FACTORS in tensors:
        return _llama3_scaling(dequantize(tensors[ROPE_FACTORS]), head_size, theta)
    kind = get("rope.scaling.type", None)
    factors = {
        f"rope.{key}": float(get(f"rope.{key}", 0.0)) or None
        for key in ("scaling.factor", "scale_linear")  # the latter in old files
    }
    factor = agree(factors.items(), source="the GGUF file")
    if kind == "none" or factor is None:
        return None
    kind = kind or "linear"  # as llama.cpp assumes
    options = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return None if factor == 1.0 else tuple(sorted(options.items()))
    if kind != "yarn":
        raise ValueError(
            f"rope.scaling.type {kind!r} is not supported; known are none, linear, yarn"
        )
    length = get("rope.scaling.original_context_length", get("context_length"))
    options["original_max_position_embeddings"] = length
    for side in ("fast", "slow"):
        if turns := _shortest(get(f"rope.scaling.yarn_beta_{side}", 0.0)):
            options[f"beta_{side}"] = turns
    # The factor multiplies YaRN's own magnitude (ggml, rope_yarn).
    names = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    magnitudes = [float(get(name, 0.0)) or 1.0 for name in names]
    if (scale := math.prod(magnitudes)) != 1.0:
        options["attention_factor"] = scale * (1 + 0.1 * math.log(factor))
    return tuple(sorted(options.items()))


def _llama3_scaling(factors: np.ndarray, head_size: int, theta: float) -> tuple:
    """Return settings of Llama 3's scaling that give these factors [head_size / 2]."""
    plain, _ = rope_frequencies(head_size, theta)
    options = {"rope_type": "llama3", "factor": _shortest(factors.max()), **LLAMA3}
    scaling = tuple(sorted(options.items()))
    scaled, _ = rope_frequencies(head_size, theta, scaling)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, 1e-4):
        raise ValueError(
            f"{ROPE_FACTORS} of shape {factors.shape}, up to {factors.max():g}, are "
            "not the factors of Llama 3's scaling of an 8192-token context; load the "
            "model from its Hugging Face directory"
        )
    return scaling


def _halves(array: np.ndarray, head_size: int) -> np.ndarray:
    """Return rows of each head from pairs (2i, 2i + 1) to halves (i, i + D/2)."""
    pairs = array.reshape(-1, head_size // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _shortest(x: Any) -> float:
    """Return shortest decimal that float32 rounds to x: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(x)))


def _contents(path: str | Path) -> Contents:
    """Open a file, and with it the others that the model is split into."""
    reader = _open(path)
    metadata = _metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    count = metadata.get("split.count", 1)
    if count > 1:
        for number, other in enumerate(_split_paths(Path(path), count)):
            part = _open(other)
            if number == 0:
                metadata = _metadata(part)
            tensors |= {tensor.name: tensor for tensor in part.tensors}
        wanted = metadata.get("split.tensors.count", len(tensors))
        if len(tensors) != wanted:
            raise ValueError(
                f"{path}: its {count} files hold {len(tensors)} tensors and should "
                f"hold {wanted}; they are not of one model"
            )
    return Contents(str(path), metadata, tensors)


def _split_paths(path: Path, count: int) -> list[Path]:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if not match or int(match[3]) != count:
        raise ValueError(
            f"{path} is one of {count} files of a split model, whose names must end "
            f"in -00001-of-{count:05d}.gguf and so on; give it its name back"
        )
    paths = [
        path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}{match[4]}")
        for i in range(1, count + 1)
    ]
    if missing := [other.name for other in paths if not other.is_file()]:
        raise FileNotFoundError(
            f"{path} is one of {count} files of a split model; missing in its folder: "
            f"{', '.join(missing)}"
        )
    return paths


def _open(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading .gguf files needs the gguf package: "
            "pip install 'jaxcompress[models]'"
        ) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error


def _metadata(reader: Any) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}
