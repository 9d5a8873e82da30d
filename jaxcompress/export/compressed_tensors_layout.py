"""The tensors of compressed-tensors for one `Quantized` leaf.

Source: compressed-tensors 0.20 (`PackedQuantizationCompressor`,
`NaiveQuantizationCompressor`, `NVFP4PackedCompressor`) and the readers named in
`compressed_tensors_directory`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress.models.packed_words import pack_words
from jaxcompress.quantization.grids import Quantized
from jaxcompress.tree.leaf import dense

GROUPS = (128, 64, 32)  # inputs per scale that the readers' kernels take
NV_GROUP = 16
FLOAT8 = jnp.dtype("float8_e4m3fn")


class Scheme(NamedTuple):
    """Layout of a stored layer; layers that a reader fuses must have equal ones.

    `group` is the number of inputs per scale, None for one scale per output.
    """

    format: str
    bits: int
    type: str
    group: int | None
    dynamic_activations: bool = False

    def describe(self, targets: list[str]) -> dict[str, Any]:
        """Return the entry of `config_groups` in `config.json`."""
        weights = {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": True,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }
        if self.format == "nvfp4-pack-quantized":
            weights |= {
                "strategy": "tensor_group",
                "scale_dtype": "torch.float8_e4m3fn",
            }
        inputs = {
            "num_bits": 8,
            "type": self.type,
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        return {
            "targets": targets,
            "format": self.format,
            "weights": weights,
            "input_activations": inputs if self.dynamic_activations else None,
            "output_activations": None,
        }

    def __str__(self) -> str:
        group = "per channel" if self.group is None else f"groups of {self.group}"
        inputs = ", dynamic activations" if self.dynamic_activations else ""
        return f"{self.format} {self.bits}-bit {self.type}, {group}{inputs}"


def store(
    leaf: Quantized, *, dynamic: bool, groups: tuple[int, ...] = GROUPS
) -> tuple[Scheme, dict[str, np.ndarray]]:
    """Return scheme and tensors, by suffix, of a 2-D leaf `[inputs, outputs]`.

    The values that a reader computes from them are those of the leaf: codes of fewer
    bits are widened to 4 or 8, scales of larger blocks are repeated; none is rounded.
    `dynamic`: the reader rounds activations too, at run time, to 8 bits per token.
    `groups`: inputs per scale, of which the largest that fits is taken.

    Raises:
      ValueError: the format has no counterpart; says what it has.
    """
    if leaf.grid == "symmetric":
        return _integers(leaf, dynamic, groups)
    if leaf.grid == "e4m3":
        return _float8(leaf, dynamic)
    if leaf.grid == "e2m1" and _is_nvfp4(leaf):
        return _nvfp4(leaf, dynamic)
    raise ValueError(
        f"the grid {leaf.grid!r} with blocks of {leaf.block} has no counterpart; "
        "counterparts exist for symmetric codes, fp8 (e4m3) and nvfp4"
    )


def signed_codes(leaf: Quantized) -> np.ndarray:
    """Return integers, int8 `[outputs, inputs]`, that the scales of a leaf multiply."""
    codes = np.asarray(dense(leaf.codes)).astype(np.int16)
    signed = 2 * codes - 1 if leaf.bits == 1 else codes - 2 ** (leaf.bits - 1)
    return np.ascontiguousarray(signed.astype(np.int8).T)


def channel_scales(leaf: Quantized) -> np.ndarray:
    """Return scales `[outputs, blocks]` in the dtype that the leaf stores."""
    scale = np.asarray(dense(leaf.scale)).T
    outputs = leaf.shape[-1]
    return np.ascontiguousarray(np.broadcast_to(scale, (outputs, scale.shape[1])))


def repeat_scales(
    scale: np.ndarray, block: Any, inputs: int, groups: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Return scales per group of the largest size in `groups` that divides the leaf's
    blocks.

    Raises ValueError where none does.
    """
    size = block if isinstance(block, int) else inputs
    whole = min(size, inputs)
    for group in groups:
        if whole % group == 0 and inputs % group == 0:
            return np.repeat(scale, whole // group, axis=1)[:, : inputs // group], group
    raise ValueError(
        f"blocks of {block} along {inputs} inputs; the format has groups of "
        f"{', '.join(map(str, sorted(groups)))} that divide both. Compress again "
        f"with one of these as block="
    )


def _integers(
    leaf: Quantized, dynamic: bool, groups: tuple[int, ...]
) -> tuple[Scheme, dict[str, np.ndarray]]:
    codes, scale = signed_codes(leaf), channel_scales(leaf)
    outputs, inputs = codes.shape
    per_channel = not isinstance(leaf.block, int)
    if dynamic and not per_channel:
        raise ValueError(
            f"blocks of {leaf.block}; int8 products with dynamic activations take one "
            "scale per output: compress with block=None"
        )
    if dynamic:
        scheme = Scheme("int-quantized", 8, "int", None, True)
        return scheme, {"weight": codes, "weight_scale": scale}
    bits, group = 4 if leaf.bits <= 4 else 8, None
    if not per_channel:
        scale, group = repeat_scales(scale, leaf.block, inputs, groups)
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return Scheme("pack-quantized", bits, "int", group), {
        "weight_packed": pack_words(unsigned, bits),
        "weight_scale": scale,
        "weight_shape": np.array([outputs, inputs], np.int64),
    }


def _float8(leaf: Quantized, dynamic: bool) -> tuple[Scheme, dict[str, np.ndarray]]:
    scale = channel_scales(leaf)
    if isinstance(leaf.block, int):
        raise ValueError(
            f"blocks of {leaf.block}; 8-bit floating point has one scale per output: "
            "compress with fp8(block=None)"
        )
    codes = np.ascontiguousarray(np.asarray(dense(leaf.codes)).astype(np.uint8).T)
    scheme = Scheme("float-quantized", 8, "float", None, dynamic)
    weight = codes.view(FLOAT8)
    return scheme, {"weight": weight, "weight_scale": scale}


def _is_nvfp4(leaf: Quantized) -> bool:
    scale = leaf.scale
    nested = isinstance(scale, Quantized) and scale.grid == "e4m3"
    return leaf.block == NV_GROUP and nested and scale.block == "tensor"


def _nvfp4(leaf: Quantized, dynamic: bool) -> tuple[Scheme, dict[str, np.ndarray]]:
    """Return the global scale is a divisor: the only number that rounds, once in
    float32.
    """
    codes = np.asarray(dense(leaf.codes)).astype(np.uint8).T
    inputs = codes.shape[1]
    if inputs % NV_GROUP:
        raise ValueError(
            f"{inputs} inputs are not a multiple of {NV_GROUP}, which nvfp4 groups are"
        )
    if dynamic:
        raise ValueError(
            "nvfp4 with rounded activations needs a measured input scale, which is not "
            "written; pass activations=None"
        )
    scales = np.ascontiguousarray(np.asarray(dense(leaf.scale.codes)).T)
    whole = np.asarray(dense(leaf.scale.scale), np.float32).reshape(1)
    return Scheme("nvfp4-pack-quantized", 4, "float", NV_GROUP), {
        "weight_packed": codes[:, 0::2] | codes[:, 1::2] << np.uint8(4),
        "weight_scale": scales.astype(np.uint8).view(FLOAT8),
        "weight_global_scale": (1 / whole).astype(np.float32),
    }
