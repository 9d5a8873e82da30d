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

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcompress import tokenization
from jaxcompress.models.assembly import (
    Assembled,
    assemble,
)
from jaxcompress.models.configurations import (
    architecture_of,
    model_from,
)
from jaxcompress.models.families import FAMILIES
from jaxcompress.models.transformer import Transformer
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tokenization.huggingface import added_marks
from jaxcompress.tokenization.piece_models import without_begin_mark
from jaxcompress.types import Params


def read_huggingface(
    directory: str | Path,
    *,
    scan: bool = False,
    dtype: Any = None,
    ignore: Collection[str] = (),
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Read model, parameters and tokenizer of a Hugging Face directory.

    The tokenizer is None where the directory has none. `dtype=None` keeps the type of
    every weight; the computation is float32 all the same (`model.clone(dtype=...)`).
    `ignore` are keys of the configuration to pass over. Raises ValueError on an
    architecture, an option or a tensor that is not understood, naming it, and
    FileNotFoundError on a missing file. Warns where the configuration ties a head that
    the file holds apart, and keeps both.
    """
    model, params, tokenizer = open_huggingface(
        directory, scan=scan, dtype=dtype, ignore=ignore
    )
    return model, params.read_all(), tokenizer


def open_huggingface(
    directory: str | Path,
    *,
    scan: bool = False,
    dtype: Any = None,
    ignore: Collection[str] = (),
) -> tuple[Transformer, Assembled, Tokenizer | None]:
    """As `read_huggingface`, but each weight is read when it is asked for."""
    model, params = open_model(directory, scan=scan, dtype=dtype, ignore=ignore)
    return model, params, read_tokenizer(Path(directory))


def open_model(
    directory: str | Path,
    *,
    scan: bool = False,
    dtype: Any = None,
    ignore: Collection[str] = (),
) -> tuple[Transformer, Assembled]:
    """As `open_huggingface`, without the tokenizer."""
    directory = Path(directory)
    source = directory / "config.json"
    config = json.loads(source.read_text(encoding="utf-8"))
    family = FAMILIES[architecture_of(config)]
    model = model_from(config, ignore=ignore, source=str(source)).clone(scan=scan)
    places = _tensor_places(directory)
    dtypes = _dtypes(places)
    _refuse_codes(dtypes, family.ignorable, str(directory))

    def fetch(name: str, ours: str) -> np.ndarray:
        with safe_open(places[name], framework="np") as file:
            array = file.get_tensor(name)
        if family.norm_offset and ours.endswith("norm/scale"):
            array = array.astype(np.float32) + np.float32(family.norm_offset)
        return array

    embedding, head = (f"{family.modules.get(x)}.weight" for x in ("embed", "head"))
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
        offset = family.norm_offset and re.search(r"norm\.weight$", name)
        return "float32" if offset else _FLOATS[dtypes[name]]

    params = assemble(
        model,
        places,
        fetch,
        family.modules,
        kind=kind,
        ignorable=family.ignorable,
        dtype=dtype,
        source=str(directory),
    )
    return model, params


_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


def _dtypes(places: Mapping[str, Path]) -> dict[str, str]:
    """The type of each tensor, as safetensors spells it; headers only."""
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
