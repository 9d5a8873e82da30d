"""Rounding to number formats: NF4, FP8, MXFP4, NVFP4, packed as hardware reads them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.calibration.moments import Moments
from jaxcompress.quantization.codebooks import LEVELS
from jaxcompress.quantization.grids import (
    Block,
    Quantized,
    Scheme,
    Steps,
    encode,
    quantized,
    spread,
)
from jaxcompress.quantization.nearest import (
    best_factor,
    check_weights,
    split,
    store_step,
)
from jaxcompress.tree.methods import method

MX_BLOCK, NV_BLOCK = 32, 16  # inputs per scale, part of these formats


@method()
def nf4(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    block: Block = 64,
    search: bool = False,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """NF4: round to 16 quantiles of a normal distribution; 4 bits per code.

    The scale of a block is its largest magnitude. Scales are not quantized again.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      block: inputs that share a scale, as in `symmetric`.
      search: the scale of least squared error among factors 0.3 to 1.2 of that.
      scale_dtype: as in `symmetric`.

    Raises: as `symmetric`.

    Example:
      >>> jc.nf4(x, block=64)
      Quantized(64x64, nf4 4 bits, blocks of 64, ...)

    Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314).
    """
    del moments
    check_weights(x, "nf4", block, scale_dtype)
    return _rounded(x, "nf4", block, search, scale_dtype)


@method()
def fp8(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    kind: Literal["e4m3", "e5m2"] = "e4m3",
    block: Block = None,
    search: bool = False,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """FP8: round to 8-bit floating point, scaled by a block's largest magnitude.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      kind: "e4m3" (largest 448, without infinity) or "e5m2" (largest 57 344).
      block, search, scale_dtype: as in `nf4`.

    Raises: as `symmetric`.

    Example:
      >>> small = jc.fp8(x, block=32)

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv
    2209.05433).
    """
    del moments
    if kind not in ("e4m3", "e5m2"):
        raise ValueError(f"fp8 takes kind='e4m3' or 'e5m2', not {kind!r}")
    check_weights(x, "fp8", block, scale_dtype)
    return _rounded(x, kind, block, search, scale_dtype)


@method()
def mxfp4(
    x: jax.Array, moments: Moments | None = None, *, search: bool = False
) -> Quantized:
    """MXFP4: round to e2m1 codes with a power of two for each 32 inputs; 4.25 bits.

    The power is that of the largest magnitude, so that magnitudes above six steps are
    clipped. The scale is itself a `Quantized`, of e8m0 codes.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      search: choose the power of least squared error among its neighbours.

    Raises: as `symmetric`.

    Example:
      >>> small = jc.mxfp4(x)

    Source: OCP Microscaling Formats 1.0 (2023), sections 5.3.3 and 6.3.
    """
    del moments
    check_weights(x, "mxfp4", MX_BLOCK, "float32")
    return _rounded(x, "mxfp4", MX_BLOCK, search, "float32")


@method()
def nvfp4(
    x: jax.Array, moments: Moments | None = None, *, search: bool = False
) -> Quantized:
    """NVFP4: round to e2m1 codes with an e4m3 scale for each 16 inputs; 4.5 bits.

    The scales share a float32 scale of the matrix, which maps the largest of them to
    448. The scale is itself a `Quantized`, of e4m3 codes.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      search: as in `nf4`.

    Raises: as `symmetric`.

    Example:
      >>> small = jc.nvfp4(x)

    Source: NVIDIA 2025, "Pretraining large language models with NVFP4" (arXiv
    2509.25149, section 2).
    """
    del moments
    check_weights(x, "nvfp4", NV_BLOCK, "float32")
    return _rounded(x, "nvfp4", NV_BLOCK, search, "float32")


FORMATS = ("nf4", "e4m3", "e5m2", "mxfp4", "nvfp4")
FORMAT_METHODS = {"nf4": nf4, "e4m3": fp8, "e5m2": fp8, "mxfp4": mxfp4, "nvfp4": nvfp4}


def to_format(
    x: jax.Array, name: str, *, block: Block, search: bool, scale_dtype: str
) -> Quantized:
    """Round to the format of this name; `block=None` is the format's own."""
    if name in ("mxfp4", "nvfp4"):
        own = MX_BLOCK if name == "mxfp4" else NV_BLOCK
        if block not in (None, own):
            raise ValueError(f"{name} has blocks of {own} inputs, not of {block!r}")
        return (mxfp4 if name == "mxfp4" else nvfp4)(x, search=search)
    options: dict[str, Any] = {} if block is None else {"block": block}
    options |= {"search": search, "scale_dtype": scale_dtype}
    if name == "nf4":
        return nf4(x, **options)
    options["kind"] = name
    return fp8(x, **options)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _rounded(
    x: jax.Array, name: str, block: Block, search: bool, scale_dtype: str
) -> Quantized:
    grid = {"mxfp4": "e2m1", "nvfp4": "e2m1"}.get(name, name)
    levels = LEVELS[grid]
    blocks = split(x.astype(jnp.float32), block)
    largest = jnp.max(jnp.abs(blocks), axis=-2, initial=0)
    step, nested = largest / levels.largest, None
    if name == "mxfp4":
        _, exponent = jnp.frexp(largest)  # largest < 2^exponent
        step = jnp.where(largest > 0, jnp.ldexp(1.0, exponent - 3), 0)
        step = jnp.where(jnp.isfinite(largest), step, jnp.nan)
        # 2 times 0.3 to 1.2, rounded to powers of two: half the step, itself, twice it.
        step = 2 * step if search else step
        nested = functools.partial(_scales, grid="e8m0", whole=jnp.ones_like)
    elif name == "nvfp4":
        most = LEVELS["e4m3"].largest
        whole = store_step(
            jnp.max(step, axis=(-2, -1), keepdims=True) / most, dtype="float32"
        )
        nested = functools.partial(_scales, grid="e4m3", whole=lambda _: whole)

    def stored(size: jax.Array) -> jax.Array:
        if nested is not None:
            return nested(size).materialize()
        return store_step(size, dtype=scale_dtype)

    factor: Any = 1
    if search:
        factor = best_factor(blocks, lambda f: Steps(stored(step * f)), grid, None)
    steps = Steps(stored(step * factor))
    codes = encode(x, spread(steps, block, x.shape[-2]), grid=grid, bits=levels.bits)
    leaf = quantized(
        codes,
        steps,
        Scheme(grid, levels.bits, block, scale_dtype),
        dtype=x.dtype,
    )
    if nested is None:
        return leaf
    return dataclasses.replace(leaf, scale=nested(step * factor))


def _scales(
    step: jax.Array, *, grid: str, whole: Callable[[jax.Array], jax.Array]
) -> Quantized:
    """Return steps `[..., blocks, outputs]` as codes, above zero; `whole` gives their
    scale.

    Steps of all-zero blocks become those of code 1, the rest at least that.
    """
    scale = whole(step[..., :1, :1])
    codes = encode(step, Steps(scale), grid=grid, bits=8)
    return quantized(
        jnp.maximum(codes, 1),
        Steps(scale),
        Scheme(grid, 8, "tensor"),
        dtype=jnp.float32,
    )
