"""Dense Hugging Face directories: settings, tokenizer, sharded weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.export.named_leaves import ExportedLeaf, dense_tensor, named_leaves
from jaxcompress.export.requests import check_model, float_dtype
from jaxcompress.export.sharded_files import Shards, new_directory, write_json
from jaxcompress.models.families import FAMILIES, Family
from jaxcompress.models.transformer import Transformer
from jaxcompress.models.written_configurations import config_from
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import DType, Params

SHARD_BYTES = 2 * 10**9


def huggingface(
    directory: str | Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: DType | None = None,
    context: int = 8192,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[ExportedLeaf]:
    """Write a model, dense, as a Hugging Face directory that transformers loads.

    Compressed leaves are written dense: the directory has the size of the dense model.
    `export.compressed_tensors` keeps codes.

    Args:
      directory: must not exist, or be empty. It appears when it is complete.
      model: a Transformer, looped or scanned.
      params: its parameters, or an open checkpoint (`models.open_weights`), which is
        read leaf by leaf.
      tokenizer: written as `tokenizer.json` or `tokenizer.model`, with its settings.
      dtype: of all weights; None keeps the dtype of each.
      context: tokens that the model takes at most, which a Transformer does not record.
      generation: entries of `generation_config.json`; begin and end marks are added.
      shard_bytes: of tensors in one file at most, and held in memory.

    Returns:
      One `ExportedLeaf` for each tensor.

    Raises:
      TypeError: a model of another class.
      ValueError: no supported architecture has the model's settings, or `params` are
        of another model.
      FileExistsError: the directory exists.

    Example:
      >>> leaves = jc.export.huggingface("out", model, small, dtype="bfloat16")
      >>> leaves[0].stored
      'bfloat16'
    """
    config, family = described(model, tokenizer, context)
    dtype = float_dtype(dtype)
    written = []
    with new_directory(directory) as partial:
        shards = Shards(partial, shard_bytes)
        with named_leaves(
            model,
            params,
            family.modules,
            norm_offset=family.norm_offset,
            fused=family.fused,
        ) as leaves:
            for name, tensor, value in leaves:
                array = dense_tensor(name, value, dtype)
                if family.conv1d and re.fullmatch(r"layer_.*/kernel", name):
                    array = np.ascontiguousarray(array.T)
                shards.add(tensor, array)
                kind = array.dtype.name
                written.append(ExportedLeaf(name, tensor, kind, array.nbytes))
                if name == "embed/embedding":
                    config["dtype"] = kind
        shards.finish()
        write_json(partial / "config.json", config)
        write_tokenizer(partial, tokenizer)
        write_generation(partial, tokenizer, generation)
    return written


def described(
    model: Transformer, tokenizer: Tokenizer | None, context: int
) -> tuple[dict[str, Any], Family]:
    """Return the `config.json`, its dtype left out, and the family it names."""
    check_model(model, context)
    config = config_from(model)
    if model.positions is None:
        config["max_position_embeddings"] = context
    for mark in ("bos", "eos"):
        config[f"{mark}_token_id"] = getattr(tokenizer, f"{mark}_id", None)
    return config, FAMILIES[config["architectures"][0]]


def write_generation(
    directory: Path, tokenizer: Tokenizer | None, generation: Mapping[str, Any] | None
) -> None:
    """Write `generation_config.json`: greedy decoding unless `generation` differs."""
    marks = {
        f"{mark}_token_id": getattr(tokenizer, f"{mark}_id", None)
        for mark in ("bos", "eos")
    }
    marks = {key: value for key, value in marks.items() if value is not None}
    if len(ends := getattr(tokenizer, "end_ids", ())) > 1:
        marks["eos_token_id"] = list(ends)
    settings = {"do_sample": False, **marks, **(generation or {})}
    write_json(directory / "generation_config.json", settings)


def write_tokenizer(directory: Path, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer's own file and `tokenizer_config.json`; nothing for None."""
    if tokenizer is None:
        return
    stored = tokenizer.to_bytes()
    if not stored.startswith(b"{"):  # a SentencePiece model
        (directory / "tokenizer.model").write_bytes(stored)
        return
    contents = json.loads(stored)
    if "tokenizer" not in contents:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no counterpart in Hugging Face's "
            "tokenizers; pass tokenizer=None, or train a byte-pair or unigram one"
        )
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for mark in ("bos", "eos"):
        if contents[mark] is not None:
            settings[f"{mark}_token"] = contents[mark]
            settings[f"add_{mark}_token"] = contents.get(f"add_{mark}", mark == "bos")
    (directory / "tokenizer.json").write_bytes(contents["tokenizer"].encode())
    write_json(directory / "tokenizer_config.json", settings)
