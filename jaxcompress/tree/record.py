"""Reports of `compress` on each leaf: methods, bytes, errors, reasons."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tree.layouts import Layout, matricize
from jaxcompress.tree.leaf import dense, nbytes
from jaxcompress.tree.paths import Entry, entries, roots
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf before and after `compress`. Bytes are of arrays held in memory.

    Args:
      name: of the outermost leaf, as `leaf_names` gives it.
      shape: of the dense array.
      method: the methods applied, separated by " > "; empty where none was.
      bytes_before, bytes_after: of the arrays held.
      bits_per_weight: after, scales and tables included.
      relative_error: Frobenius norm of the change over that of the original; None
        where nothing changed.
      reason: why the leaf was left alone, or took another method than the recipe's;
        else empty.
      output_error: root mean square change of the layer's outputs over that of the
        outputs, by the second moment of its inputs; None where that is unknown.

    Example:
      >>> record = []
      >>> small = jc.compress(params, "symmetric(bits=4)", record=record)
      >>> record[0].method
      'symmetric(bits=4)'
    """

    name: str
    shape: tuple[int, ...]
    method: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    relative_error: float | None
    reason: str
    output_error: float | None = None


def leaf_reports(
    before: Params,
    after: Params,
    methods: Mapping[str, Sequence[str]] | None = None,
    reasons: Mapping[str, str] | None = None,
    moments: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    instead: Mapping[str, str] | None = None,
) -> list[LeafReport]:
    """Compare two trees leaf by leaf.

    Args:
      before, after: trees of the same names.
      methods: by name, what was applied, in order.
      reasons: by name, why a leaf was left alone.
      moments: by name; a second moment gives the leaf's output error.
      layouts: by name, as for `compress`.
      instead: by name, why a leaf took another method than the recipe's.

    Returns:
      One `LeafReport` per outermost leaf of `before`, in its order.
    """
    methods, reasons, layouts = methods or {}, reasons or {}, layouts or {}
    instead = instead or {}
    later = dict(roots(after))
    measured = {e.root: e for e in entries(before, moments, layouts) if not e.depth}
    reports = []
    for name, old in roots(before):
        if not hasattr(old, "dtype"):
            continue
        new, count = later[name], max(1, old.size)
        changed = new is not old
        entry = measured.get(name)
        reports.append(
            LeafReport(
                name=name,
                shape=tuple(old.shape),
                method=" > ".join(methods.get(name, ())),
                bytes_before=nbytes(old),
                bytes_after=nbytes(new),
                bits_per_weight=8 * nbytes(new) / count,
                relative_error=relative_error(old, new) if changed else None,
                reason=instead.get(name, "")
                if name in methods
                else reasons.get(name, "unchanged"),
                output_error=_output_error(entry, new) if changed else None,
            )
        )
    return reports


def relative_error(old: Any, new: Any) -> float:
    """Return frobenius norm of the change over that of the original; 0 where both
    vanish.
    """
    return float(_relative_error(dense(old), dense(new)))


@jax.jit
def _relative_error(old: jax.Array, new: jax.Array) -> jax.Array:
    a, b = old.astype(jnp.float32), new.astype(jnp.float32)
    norm = jnp.linalg.norm(a.ravel())
    error = jnp.linalg.norm((a - b).ravel())
    return jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), error)


def _output_error(entry: Entry | None, new: Any) -> float | None:
    second = None if entry is None else getattr(entry.moments, "second", None)
    if entry is None or second is None:
        return None
    return float(relative_output(entry.matrix(), entry.matrix(new), second))


def output_error(old: Any, new: Any, second: jax.Array, layout: Layout) -> float:
    """Return root mean square change of the layer's outputs over that of the outputs.

    Args:
      old, new: the weight before and after, arrays or leaves.
      second: second moment of its inputs, `[..., inputs, inputs]`.
      layout: of both.
    """
    old, new = (matricize(dense(x), layout) for x in (old, new))
    return float(relative_output(old, new, second))


@jax.jit
def relative_output(old: jax.Array, new: jax.Array, second: jax.Array) -> jax.Array:
    """Compute `output_error` of matrices `[..., inputs, outputs]`."""

    def square(x: jax.Array) -> jax.Array:
        moved = jnp.matmul(second, x, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(x * moved)

    wide = old.astype(jnp.float32)
    change, whole = square(new.astype(jnp.float32) - wide), square(wide)
    return jnp.sqrt(jnp.maximum(change, 0) / jnp.where(whole > 0, whole, 1))
