"""Rotary positions: the angles by which queries and keys turn, and the turning."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Scaling = tuple[tuple[str, Any], ...]

ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


def rope_frequencies(
    head_size: int, theta: float, scaling: Scaling | None = None
) -> tuple[np.ndarray, float]:
    """Return rotation speeds in radians per position, and the scale of sines and
    cosines.

    `scaling` holds the (key, value) pairs of Hugging Face's `rope_scaling`. Returns
    float64 [head_size / 2] and a float, which is 1 for all kinds but "yarn". Raises
    ValueError on an odd head size, an unknown kind or a missing key.
    Source: Su et al., 2021, arXiv 2104.09864; "linear": Chen et al., 2023, 2306.15595;
    "yarn": Peng et al., 2023, 2309.00071, section 3; "llama3": the Llama 3.1 release.
    """
    if head_size % 2:
        raise ValueError(
            f"head_size is {head_size}; rotary embeddings need an even one"
        )
    speeds = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    options = dict(scaling or ())
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"rope_scaling kind {kind!r} is not supported; known: {ROPE_SCALINGS}"
        )
    if kind == "default":
        return speeds, 1.0
    needed = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        "yarn": ("factor", "original_max_position_embeddings"),
    }[kind]
    missing = [key for key in needed if options.get(key) is None]
    if missing:
        raise ValueError(f"rope_scaling of kind {kind!r} lacks {missing}")
    factor = float(options["factor"])
    if kind == "linear":
        return speeds / factor, 1.0
    length = float(options["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        turns = length * speeds / (2 * math.pi)  # within the original context
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * speeds + (1 - keep) * speeds / factor, 1.0
    return _yarn(speeds, theta, factor, length, options)


def _yarn(speeds, theta, factor, length, options):
    def dimension(turns):  # the (real) index of the pair that makes this many turns
        return len(speeds) * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    def magnitude(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    first = dimension(options.get("beta_fast") or 32)
    last = dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(speeds) - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp of no width
    stretch = np.clip((np.arange(len(speeds)) - first) / (last - first), 0, 1)
    speeds = (1 - stretch) * speeds + stretch * speeds / factor
    scale = options.get("attention_factor")
    if scale is None:
        numerator, denominator = options.get("mscale"), options.get("mscale_all_dim")
        if numerator and denominator:
            scale = magnitude(numerator) / magnitude(denominator)
        else:
            scale = magnitude(1.0)
    return speeds, float(scale)


def rotate(x: jax.Array, angles: jax.Array, scale: float = 1.0) -> jax.Array:
    """Rotate the pairs (i, i + D/2) of x [B, T, H, D] by angles [B, T, D/2].

    This is Hugging Face's pairing; a GGUF file pairs (2i, 2i + 1) and is permuted when
    it is loaded. Computed in float32, returned in x's type.
    """
    cos = scale * jnp.cos(angles)[:, :, None, :]
    sin = scale * jnp.sin(angles)[:, :, None, :]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return turned.astype(x.dtype)
