"""Activation-aware scaling: rows that large inputs meet are rounded more finely."""

import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import each_slice, layer_loss
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.quantization.grids import Block, Scheme, Steps, quantized, round_to
from jaxcompress.quantization.nearest import asymmetric, store_step, symmetric
from jaxcompress.tree.leaf import (
    Arithmetic,
    Leaf,
    contract,
    dense,
    dense_cost,
    leaf,
    product_cost,
    static,
    unboxed,
)
from jaxcompress.tree.methods import method, only

NEAREST = {"symmetric": symmetric, "asymmetric": asymmetric}
DAMPING = 0.01  # of the target under drift, as in `gptq`
SMALLEST = 1e-4  # of the largest root mean square; a dead input counts as that


@leaf
class Scaled(Leaf):
    """A weight whose rows are each multiplied by a factor of their own.

    Invariant: `weight` is a float32 weight `[..., inputs, outputs]` of any leaf type,
    `factors` are floating point, `[..., inputs]`, above zero. `dtype` is that of
    the product.

    Example:
      >>> jc.awq(x, of_x, bits=4).factors.shape
      (64,)
    """

    weight: Any
    factors: Any
    dtype: np.dtype = static()

    weights: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def inner_moments(self, field: str, moments: Moments | None) -> Any:
        """Return the moments of the inputs times the factors."""
        del field
        return moments.stretch(dense(self.factors))

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Return the inputs are scaled instead of the rows."""
        factors = unboxed(self.factors).astype(jnp.float32)
        factors = factors.reshape((1,) * (x.ndim - 1) + factors.shape)
        scaled = (x.astype(jnp.float32) * factors).astype(x.dtype)
        return contract(scaled, self.weight, how)

    def product_cost(self, rows: int) -> int:
        return product_cost(self.weight, rows)

    def dense_cost(self) -> int:
        return dense_cost(self.weight)

    def materialize(self) -> jax.Array:
        factors = dense(self.factors).astype(jnp.float32)
        product = dense(self.weight) * factors[..., :, None]
        return round_to(product, self.dtype).astype(self.dtype)


def _without_data(options: dict[str, Any]) -> Any:
    """Return the nearest method of the grid, with the same width, blocks and steps."""
    nearest = NEAREST.get(options.get("grid", "asymmetric"), asymmetric)
    search = options.get("search", True)
    return nearest(**only(options, "bits", "block", "scale_dtype", search=search))


@method(data=True, without_data=_without_data)
def awq(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: int,
    block: Block = None,
    grid: Literal["symmetric", "asymmetric"] = "asymmetric",
    candidates: int = 20,
    search: bool = True,
    scale_dtype: str = "bfloat16",
) -> Scaled:
    """AWQ: round to nearest after scaling each input row by a power of its inputs'
    size.

    Row j is multiplied by `s_j = rms_j^a`, rounded, and divided by `s_j` again when it
    is used: the errors of rows that large inputs meet shrink by `s_j`. The exponent is
    the one of `candidates` even ones from 0 of least expected squared change of the
    layer's output; 0 is rounding to nearest, so the output is never worse than that.
    The factors `1 / s_j` are stored with the codes, `16 / outputs` bits per weight,
    instead of being folded into the layer before: any layer may precede, and it stays
    untouched.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs, `second`; or `drifted` and `cross` (the target is then
        corrected for the compressed prefix, as in `gptq`).
      bits: as the grid's nearest method takes them.
      block: inputs that share a step; None: all; "tensor": the matrix.
      grid: "asymmetric" (zero point) or "symmetric".
      candidates: exponents to try.
      search: try each exponent also with the steps of least squared weight error.
      scale_dtype: of the stored steps and factors.

    Raises:
      ValueError: no moments, moments that do not fit, an option out of range.

    Example:
      >>> small = jc.compress(params, "awq(bits=4, block=32)", moments)

    Source: Lin et al. 2023, "AWQ" (arXiv 2306.00978, section 3.2), with the root mean
    square in place of the mean magnitude, and the full second moment in the error.
    """
    checks.one_of("awq", "grid", grid, NEAREST)
    checks.integer("awq", "number of candidates", candidates)
    moment = require(moments, x, "awq", fields=())
    target, second = moment.target_problem(x, "awq", damping=DAMPING)
    scheme = Scheme(grid, bits, block, scale_dtype)
    one = functools.partial(
        _best_scaling,
        scheme=scheme,
        candidates=candidates,
        searches=(False, True) if search else (False,),
    )
    codes, steps, factors = each_slice(one, target.astype(jnp.float32), second)
    weight = quantized(
        codes,
        steps,
        scheme,
        dtype=jnp.float32,
    )
    factors = factors[..., 0, :].astype(scale_dtype)
    return Scaled(weight, factors, dtype=jnp.dtype(x.dtype))


@functools.partial(
    jax.jit,
    static_argnames=("scheme", "candidates", "searches"),
)
def _best_scaling(
    x: jax.Array,
    second: jax.Array,
    *,
    scheme: Scheme,
    candidates: int,
    searches: tuple[bool, ...],
) -> tuple[jax.Array, Steps, jax.Array]:
    """Return codes, steps and factors `[1, inputs]` of least output error, of one
    slice.
    """
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(second), 0))
    largest = jnp.max(norms)
    norms = jnp.where(largest > 0, jnp.maximum(norms, SMALLEST * largest), 1)
    # Around 1, so that steps keep their size.
    logs = jnp.log(norms) - jnp.mean(jnp.log(norms))
    grid, bits, block, scale_dtype = scheme
    options = {"bits": bits, "block": block, "scale_dtype": scale_dtype}

    def scaled(exponent: jax.Array, search: bool) -> tuple[jax.Array, Any]:
        factors = store_step(jnp.exp(-exponent * logs), dtype=scale_dtype)[:, None]
        leaf = NEAREST[grid](x / factors, search=search, **options)
        candidate = (dense(leaf.codes), leaf.steps, factors.T)
        return layer_loss(x, leaf.materialize() * factors, second), candidate

    def better(best: tuple, exponent: jax.Array) -> tuple[tuple, None]:
        for search in searches:
            new = scaled(exponent, search)
            wins = new[0] < best[0]
            best = jax.tree.map(lambda a, b, w=wins: jnp.where(w, a, b), new, best)
        return best, None

    exponents = jnp.arange(candidates, dtype=jnp.float32) / candidates
    (_, chosen), _ = jax.lax.scan(better, scaled(exponents[0], False), exponents)
    return chosen
