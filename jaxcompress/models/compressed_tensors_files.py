"""Tensors of compressed-tensors directories as `Quantized` leaves.

Source: compressed-tensors 0.20; the layout is described in
`export.compressed_tensors_layout`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.models.kept_codes import symmetric_leaf
from jaxcompress.models.packed_words import unpack_words
from jaxcompress.quantization.grids import Quantized, Scheme, Steps, quantized

SUFFIXES = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "weight_global_scale",
)
NVFP4 = "nvfp4-pack-quantized"
# Formats, and the ways in which their scales are laid out.
FORMATS = {
    "pack-quantized": ("group", "channel"),
    "int-quantized": ("group", "channel"),
    "float-quantized": ("group", "channel"),
    NVFP4: ("tensor_group",),
}

Fetch = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Codes:
    """The quantized layers of one directory.

    Attributes:
      schemes: the entry of `config_groups` of each quantized layer, by module.
    """

    schemes: Mapping[str, Mapping[str, Any]]

    def available(self, tensors: Iterable[str]) -> set[str]:
        """Return names as a dense directory has them: `P.weight` for each quantized
        layer.
        """
        suffixes = (*SUFFIXES, "input_scale")
        owned = {f"{module}.{suffix}" for module in self.schemes for suffix in suffixes}
        return (set(tensors) - owned) | {f"{module}.weight" for module in self.schemes}


def find_codes(
    settings: Mapping[str, Any], tensors: Iterable[str], source: str
) -> Codes:
    """Find the quantized layers of a directory and the scheme of each.

    Args:
      settings: the `quantization_config` of its `config.json`.
      tensors: names of all tensors.
      source: what errors call the directory.

    Raises:
      ValueError: another tool's codes, a format that is not read, a layer of no scheme.
    """
    if settings.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"{source}: codes of {settings.get('quant_method')!r}; only those of "
            "compressed-tensors are read"
        )
    names = set(tensors)
    modules = {
        name.removesuffix(".weight_scale")
        for name in names
        if name.endswith(".weight_scale")
    }
    schemes = {}
    for module in sorted(modules):
        if f"{module}.weight_g_idx" in names:
            raise ValueError(f"{source}: {module} has inputs in another order (g_idx)")
        scheme = _scheme(module, settings, source)
        kind = scheme.get("format") or settings.get("format")
        weights = scheme["weights"]
        supported = weights.get("strategy") in FORMATS.get(kind, ())
        if not supported or (
            kind == "pack-quantized" and weights["num_bits"] not in (4, 8)
        ):
            raise ValueError(
                f"{source}: {module} is {kind} of {weights['num_bits']} bits, "
                f"strategy {weights.get('strategy')}; read are {', '.join(FORMATS)} in "
                "groups or per channel (nvfp4: tensor_group), pack-quantized with 4 or "
                "8 bits"
            )
        schemes[module] = {**scheme, "format": kind}
    return Codes(schemes)


def _scheme(module: str, settings: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return group that names a module, by its name or a pattern, else by its class."""
    groups = list(settings["config_groups"].values())
    for group in groups:
        if any(_names(target, module) for target in group["targets"]):
            return group
    for group in groups:
        if "Linear" in group["targets"]:
            return group
    raise ValueError(
        f"{source}: {module} has scales, but no group of the configuration"
    )


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def read_leaf(
    module: str, scheme: Mapping[str, Any], fetch: Fetch, tensors: Any, dtype: Any
) -> Quantized:
    """Return the kernel `[inputs, outputs]` of one layer; `tensors` are the file's
    names.
    """
    if scheme["format"] == NVFP4:
        return _read_nvfp4(module, fetch, dtype)
    weights, scale = scheme["weights"], fetch(f"{module}.weight_scale")
    bits = weights["num_bits"]
    grouped = weights["strategy"] == "group"
    block = weights["group_size"] if grouped else None
    scale = scale.reshape(len(scale), -1)
    if scheme["format"] == "float-quantized":
        codes = fetch(f"{module}.weight").view(np.uint8)
        return quantized(
            codes.T,
            Steps(scale.T),
            Scheme("e4m3", 8, block, scale.dtype),
            dtype=dtype,
        )
    if scheme["format"] == "int-quantized":
        codes = fetch(f"{module}.weight").astype(np.int16)
    else:
        _, inputs = fetch(f"{module}.weight_shape")
        words = fetch(f"{module}.weight_packed")
        codes = unpack_words(words, bits, int(inputs)).astype(np.int16)
        codes -= 2 ** (bits - 1)
    if f"{module}.weight_zero_point" not in tensors:
        leaf = symmetric_leaf(codes, scale, "", bits=bits, block=block, dtype=dtype)
        assert isinstance(leaf, Quantized)
        return leaf
    if scheme["format"] != "pack-quantized":
        raise ValueError(f"{module} has a zero point; {scheme['format']} is symmetric")
    packed = fetch(f"{module}.weight_zero_point")
    zero = unpack_words(np.ascontiguousarray(packed.T), bits, len(codes))
    return quantized(
        (codes + 2 ** (bits - 1)).astype(np.uint8).T,
        Steps(scale.T, zero),
        Scheme("asymmetric", bits, block, scale.dtype),
        dtype=dtype,
    )


def _read_nvfp4(module: str, fetch: Fetch, dtype: Any) -> Quantized:
    """Return codes of e2m1, and scales of e4m3 under the reciprocal of the stored
    divisor.
    """
    pairs = fetch(f"{module}.weight_packed")
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
    divisor = fetch(f"{module}.weight_global_scale").astype(np.float32).reshape(1, 1)
    scale = quantized(
        np.ascontiguousarray(fetch(f"{module}.weight_scale").view(np.uint8).T),
        Steps(_multiplier(divisor)),
        Scheme("e4m3", 8, "tensor", np.float32),
        dtype=np.float32,
    )
    leaf = quantized(
        np.ascontiguousarray(codes.T),
        Steps(np.ones(scale.shape, np.float32)),
        Scheme("e2m1", 4, 16, np.float32),
        dtype=dtype,
    )
    return dataclasses.replace(leaf, scale=scale)


def _multiplier(divisor: np.ndarray) -> np.ndarray:
    """Return the float32 number nearest to `1 / divisor` whose reciprocal it is."""
    one = np.float32(1)
    near = one / divisor
    for number in (near, np.nextafter(near, 0 * one), np.nextafter(near, 2 * near)):
        if one / number == divisor:
            return number
    return near


def raw_tensor(path: Any, name: str) -> np.ndarray:
    """Return one tensor of a `.safetensors` file, in types that its NumPy reader lacks
    too.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        data = file.read(end - start)
    kind = {"F8_E4M3": "float8_e4m3fn"}[entry["dtype"]]
    return np.frombuffer(data, jnp.dtype(kind)).reshape(entry["shape"])
