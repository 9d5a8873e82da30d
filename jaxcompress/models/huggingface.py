"""Hugging Face model directories, read into a Transformer.

A directory holds `config.json`, weights in one or several `.safetensors` files, and
the tokenizer as `tokenizer.json` (or SentencePiece's `tokenizer.model`).
"""

import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcompress.models.assembly import (
    Assembled,
    assemble,
)
from jaxcompress.models.compressed_tensors_files import (
    find_codes,
    raw_tensor,
    read_leaf,
)
from jaxcompress.models.configurations import architecture_of, model_from
from jaxcompress.models.families import FAMILIES
from jaxcompress.models.tokenizer_files import read_tokenizer
from jaxcompress.models.transformer import Transformer
from jaxcompress.models.vocabulary import warn_of_rows
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import DType, Params


def read_huggingface(
    directory: str | Path,
    *,
    scan: bool = False,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Read model, parameters and tokenizer of a Hugging Face directory.

    The tokenizer is None where the directory has none. `dtype=None` keeps the type of
    every weight; the computation is float32 all the same (`model.clone(dtype=...)`).
    `ignore` are keys of the configuration to pass over. `keep_quantized`: weights of a
    compressed-tensors directory become `Quantized` leaves of the same codes and
    scales. Raises ValueError on an
    architecture, an option or a tensor that is not understood, naming it, and
    FileNotFoundError on a missing file. Warns where the configuration ties a head that
    the file holds apart, and keeps both.
    """
    model, params, tokenizer = open_huggingface(
        directory,
        scan=scan,
        dtype=dtype,
        ignore=ignore,
        keep_quantized=keep_quantized,
    )
    return model, params.read_all(), tokenizer


def open_huggingface(
    directory: str | Path,
    *,
    scan: bool = False,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
) -> tuple[Transformer, Assembled, Tokenizer | None]:
    """Open a directory as `read_huggingface` reads it; weights are read when asked
    for.
    """
    model, params = open_model(
        directory,
        scan=scan,
        dtype=dtype,
        ignore=ignore,
        keep_quantized=keep_quantized,
    )
    tokenizer = read_tokenizer(directory, ignore=ignore)
    warn_of_rows(model, tokenizer, str(directory))
    return model, params, tokenizer


def open_model(
    directory: str | Path,
    *,
    scan: bool = False,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
) -> tuple[Transformer, Assembled]:
    """Open a directory as `open_huggingface`, without the tokenizer."""
    directory = Path(directory)
    source = directory / "config.json"
    if (adapter := directory / "adapter_config.json").exists():
        raise ValueError(
            f"{adapter}: an adapter (LoRA) belongs to this model and is not applied "
            "here; merge it with peft's merge_and_unload, or remove its files"
        )
    config = _configuration(directory)
    family = FAMILIES[architecture_of(config)]
    settings = config.pop("quantization_config", None) if keep_quantized else None
    model = model_from(config, ignore=ignore, source=str(source)).clone(scan=scan)
    places = _tensor_places(directory)
    dtypes = _dtypes(places)
    codes = None
    if settings is None:
        _refuse_codes(dtypes, family.ignorable, str(directory))
    else:
        codes = find_codes(settings, places, str(directory))
    kept = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"

    def fetch_tensor(name: str) -> np.ndarray:
        if dtypes[name].startswith("F8"):
            return raw_tensor(places[name], name)
        with safe_open(places[name], framework="np") as file:
            return file.get_tensor(name)

    def fetch(name: str, ours: str) -> Any:
        module = name.removesuffix(".weight")
        if codes is not None and module in codes.schemes:
            if family.conv1d or family.fused:
                raise ValueError(
                    f"{directory}: {module} holds codes of several of our weights, "
                    "which are not taken apart; load the original model"
                )
            return read_leaf(module, codes.schemes[module], fetch_tensor, places, kept)
        array = fetch_tensor(name)
        if family.conv1d and ours.startswith("layer_") and ours.endswith("/kernel"):
            array = array.T
        if part := family.fused.get(_module(ours)):
            array = np.split(array, part[1])[part[0]]
        if family.norm_offset and ours.endswith("norm/scale"):
            array = array.astype(np.float32) + np.float32(family.norm_offset)
        return array

    modules = family.modules
    if "wte.weight" in places:  # GPT-2 as it was first published
        modules = {k: x.removeprefix("transformer.") for k, x in modules.items()}
    embedding, head = (f"{modules.get(x)}.weight" for x in ("embed", "head"))
    if getattr(model, "tied", False) and head in places and embedding in places:
        if np.array_equal(fetch(embedding, ""), fetch(head, "")):
            places.pop(head)  # some files repeat the embedding
        else:
            warnings.warn(
                f"{directory}: the configuration ties the head to the embedding, but "
                f"{head} is another matrix than {embedding}; both are kept. Delete "
                "one of them from the file if that is not what it means",
                stacklevel=3,
            )
            model = model.clone(tied=False)

    def kind(name: str) -> str:
        if codes is not None and name.removesuffix(".weight") in codes.schemes:
            return jnp.dtype(kept).name
        offset = family.norm_offset and re.search(r"norm\.weight$", name)
        return "float32" if offset else _FLOATS[dtypes[name]]

    params = assemble(
        model,
        places if codes is None else codes.available(places),
        fetch,
        modules,
        kind=kind,
        ignorable=family.ignorable,
        dtype=dtype,
        source=str(directory),
    )
    return model, params


def _module(name: str) -> str:
    """Return the module of a parameter within its layer: `attention/q_proj`."""
    return "/".join(name.split("/")[1:-1])


_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


def _dtypes(places: Mapping[str, Path]) -> dict[str, str]:
    """Return the type of each tensor, as safetensors spells it; headers only."""
    dtypes = {}
    for path in sorted(set(places.values())):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                dtypes[name] = file.get_slice(name).get_dtype()
    return dtypes


def _refuse_codes(dtypes: Mapping[str, str], ignorable: str, source: str) -> None:
    """Raise ValueError where a tensor holds codes of a quantizer, not weights."""
    for name, dtype in dtypes.items():
        if dtype in _FLOATS or re.fullmatch(ignorable, name):
            continue
        scales = [x for x in (f"{name}_scale", f"{name}_scale_inv") if x in dtypes]
        if dtype.startswith("F8"):
            what = "8-bit floats, which mean nothing without their scales"
        else:
            what = "codes of a quantizer, not weights"
        beside = f"their scales are {scales[0]}" if scales else "the file has no scales"
        raise ValueError(
            f"{source}: tensor {name} is stored as {dtype}: {what} ({beside}). Load "
            "the original model, or write dense weights with the tool that quantized it"
        )


def _configuration(directory: Path) -> dict[str, Any]:
    source = directory / "config.json"
    if not source.exists():
        advice = "a model's directory is as transformers' save_pretrained writes it"
        files = sorted(directory.iterdir()) if directory.is_dir() else []
        if named := [p.name for p in files if p.suffix.lower() == ".gguf"]:
            advice = f"the directory has {named[0]}: pass the path of that file"
        raise FileNotFoundError(f"no file {source}; {advice}")
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source} holds no JSON object")
    return config


def _tensor_places(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor, by the files' own headers."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [directory / file for file in sorted(set(listed.values()))]
        if absent := [path.name for path in files if not path.exists()]:
            raise FileNotFoundError(
                f"{index} lists {', '.join(absent)}, which {directory} does not hold"
            )
    else:
        files = [
            path
            for path in sorted(directory.iterdir())
            if path.suffix.lower() == ".safetensors"
        ]
        files = [p for p in files if p.name.lower() == "model.safetensors"] or files
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
