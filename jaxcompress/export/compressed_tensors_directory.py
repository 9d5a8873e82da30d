"""Directories in the format of compressed-tensors, which vLLM and transformers read.

Symmetric 4-bit integers in groups of 32 to 128, with fused layers of one scheme and
dense embeddings and head, are the layout that vLLM on GPU, transformers, and
tpu-inference 0.32 on TPU all read. The other layouts load in fewer of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.export import compressed_tensors_layout as layout
from jaxcompress.export.huggingface_directory import (
    SHARD_BYTES,
    described,
    write_generation,
    write_tokenizer,
)
from jaxcompress.export.named_leaves import (
    ExportedLeaf,
    NamedLeaf,
    dense_tensor,
    is_compressed,
    named_leaves,
)
from jaxcompress.export.requests import Changes, float_dtype
from jaxcompress.export.sharded_files import Shards, new_directory, write_json
from jaxcompress.models.transformer import Transformer
from jaxcompress.quantization.grids import Quantized
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import DType, Params

# Layers that readers multiply by as one matrix, and so in one scheme.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def compressed_tensors(
    directory: str | Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    activations: str | None = None,
    dense: str | None = None,
    requantize: Sequence[tuple[str, Any]] = (),
    group: int | None = None,
    dtype: DType | None = None,
    context: int = 8192,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[ExportedLeaf]:
    """Write a model for readers of compressed-tensors, codes and scales unchanged.

    What a leaf becomes:

    | leaf | format |
    |---|---|
    | symmetric codes (`symmetric`, `gptq`, `learned`) | pack-quantized, 4 or 8 bits |
    | the same with `activations="dynamic"` | int-quantized, 8 bits (W8A8) |
    | `fp8` (e4m3), one scale per output | float-quantized |
    | `nvfp4` | nvfp4-pack-quantized |
    | array, or losslessly coded array | dense |

    Args:
      directory: must not exist, or be empty. It appears when it is complete.
      model: a Transformer, looped or scanned.
      params: its parameters, or an open checkpoint that is read leaf by leaf.
      tokenizer: written as `tokenizer.json` or `tokenizer.model`.
      activations: "dynamic": readers round activations to 8 bits per token as well
        (W8A8, FP8); None: they do not.
      dense: a pattern on leaf names; compressed leaves that it matches are written
        dense. Embeddings and the head must be among them, for readers lack kernels.
      requantize: rules (pattern on leaf names, method) for compressed leaves that have
        no counterpart. The error that each adds is returned.
      group: inputs per scale (32, 64 or 128) of all leaves with blocks: one size for
        readers that take one scheme only. None: the largest that fits each.
      dtype: of what is dense, and of scales where it holds them exactly (readers
        compute weights in the dtype of the scales); None: that of each weight.
      context, generation, shard_bytes: as in `export.huggingface`.

    Returns:
      One `ExportedLeaf` for each leaf.

    Raises:
      TypeError: a model of another class.
      ValueError: a leaf without a counterpart, layers that readers fuse in different
        schemes, or settings of the model that no architecture has; names the leaf. A
        pattern that matches no leaf.
      FileExistsError: the directory exists.

    Example:
      >>> rules = [(".*_proj/kernel", "symmetric(bits=4, block=32)")]
      >>> small = jc.compress(params, rules)
      >>> leaves = jc.export.compressed_tensors("out", model, small, dtype="bfloat16")
    """
    if activations not in (None, "dynamic"):
        raise ValueError(f"activations must be None or 'dynamic', not {activations!r}")
    if group not in (None, *layout.GROUPS):
        raise ValueError(f"group must be 32, 64 or 128, not {group!r}")
    groups = layout.GROUPS if group is None else (group,)
    dtype, changes = float_dtype(dtype), Changes.of(dense, requantize)
    config, family = described(model, tokenizer, context)
    if family.fused:
        raise ValueError(
            f"{config['architectures'][0]} stores several kernels in one tensor, which "
            "cannot keep their codes; write it dense with export.huggingface"
        )
    schemes: dict[str, layout.Scheme | None] = {}  # by their name of the layer
    written: list[ExportedLeaf] = []
    with new_directory(directory) as partial:
        shards = Shards(partial, shard_bytes)
        with named_leaves(
            model,
            params,
            family.modules,
            norm_offset=family.norm_offset,
            check_names=changes.check_names,
        ) as leaves:
            for leaf in leaves:
                leaf, error = changes.apply(leaf)
                module, _, suffix = leaf.tensor.rpartition(".")
                scheme = None
                if is_compressed(leaf.value):
                    scheme, tensors = _stored(
                        leaf, activations == "dynamic", groups, dtype
                    )
                else:
                    tensors = {suffix: dense_tensor(leaf.name, leaf.value, dtype)}
                for name, array in tensors.items():
                    shards.add(f"{module}.{name}", array)
                if leaf.name.endswith("/kernel"):
                    schemes[module] = scheme
                stored = str(scheme or tensors[suffix].dtype.name)
                size = sum(array.nbytes for array in tensors.values())
                row = ExportedLeaf(leaf.name, leaf.tensor, stored, size, error)
                written.append(row)
                if leaf.name == "embed/embedding":
                    config["dtype"] = stored
        _check_fused(schemes)
        shards.finish()
        config["quantization_config"] = _describe(schemes)
        write_json(partial / "config.json", config)
        write_tokenizer(partial, tokenizer)
        write_generation(partial, tokenizer, generation)
    return written


def _stored(
    leaf: NamedLeaf, dynamic: bool, groups: tuple[int, ...], dtype: DType | None
) -> tuple[layout.Scheme, dict[str, np.ndarray]]:
    advice = (
        f"pass dense={leaf.name!r} to write it dense, or "
        f"requantize=[({leaf.name!r}, 'symmetric(bits=4, block=64)')]"
    )
    if leaf.name.split("/")[0] in ("embed", "head"):
        raise ValueError(
            f"{leaf.name} is compressed, and readers take embeddings and the head "
            "dense only; pass dense='(embed|head)/.*' to write them so"
        )
    if not isinstance(leaf.value, Quantized) or not leaf.name.endswith("/kernel"):
        raise ValueError(
            f"{leaf.name} is a {type(leaf.value).__name__}, which compressed-tensors "
            f"has no counterpart for; {advice}"
        )
    try:
        scheme, tensors = layout.store(leaf.value, dynamic=dynamic, groups=groups)
    except ValueError as error:
        raise ValueError(f"{leaf.name}: {error}. Or {advice}") from error
    scale = tensors["weight_scale"]
    if scale.dtype != layout.FLOAT8:
        wanted = scale.astype(leaf.value.dtype if dtype is None else dtype)
        exact = np.array_equal(wanted.astype(np.float64), scale.astype(np.float64))
        tensors["weight_scale"] = wanted if exact else scale
    return scheme, tensors


def _check_fused(schemes: Mapping[str, layout.Scheme | None]) -> None:
    """Raise ValueError where layers that readers fuse have different schemes."""
    for module in schemes:
        parent, _, last = module.rpartition(".")
        for names in FUSED:
            if last != names[0]:
                continue
            shards = {f"{parent}.{name}": schemes[f"{parent}.{name}"] for name in names}
            if len(set(shards.values())) > 1:
                listed = "; ".join(
                    f"{name}: {x or 'dense'}" for name, x in shards.items()
                )
                raise ValueError(
                    "readers multiply by these layers as one matrix, in one scheme, "
                    f"but they have several: {listed}. Give them one method"
                )


def _describe(schemes: Mapping[str, layout.Scheme | None]) -> dict[str, Any]:
    """Return the entry `quantization_config` of `config.json`.

    Dense layers are listed by name. The head is one also where it is the embedding.
    """
    used = sorted({x for x in schemes.values() if x is not None}, key=str)
    if not used:
        raise ValueError(
            "no leaf is compressed; write a dense directory with export.huggingface"
        )
    groups = {}
    for i, scheme in enumerate(used):
        targets = [name for name, x in schemes.items() if x == scheme]
        targets = ["Linear"] if len(used) == 1 else sorted(targets)
        groups[f"group_{i}"] = scheme.describe(targets)
    formats = {scheme.format for scheme in used}
    ignored = {name for name, scheme in schemes.items() if scheme is None}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": sorted(ignored | {"lm_head"}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }
