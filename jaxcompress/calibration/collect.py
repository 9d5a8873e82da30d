"""`collect_moments`: the moments of every kernel's inputs, over real batches."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.calibration.moments import Moments
from jaxcompress.progress import each_item
from jaxcompress.tracing.interpreter import Sums, trace_uses
from jaxcompress.tracing.layouts import Where, flat_weights, matching, warn_unseen
from jaxcompress.tracing.modules import model_function
from jaxcompress.tracing.options import fix_options, with_options
from jaxcompress.tracing.same_inputs import SameInputs
from jaxcompress.tracing.uses import Use
from jaxcompress.tree.layouts import Layout, check_layout, trailing
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import VECTORS, is_float, roots, shape_of
from jaxcompress.tree.selection import SMALLEST
from jaxcompress.types import Model, Params, Progress


def collect_moments(
    model: Model,
    params: Params,
    batches: Iterable[Any],
    *,
    where: Where = None,
    variables: Mapping[str, Any] | None = None,
    progress: Progress = False,
) -> dict[str, Moments]:
    """Return the `Moments` of the inputs of each selected kernel, by the kernel's name.

    Reads the traced program, so it needs nothing of the model: looped, scanned and
    rematerialized layers, attention, NNX, convolutions (windows are the inputs; groups
    of channels share one set of moments) and embeddings (`tokens` counts the rows read)
    are all seen. Activations are summed where they arise and never stored. Memory: for
    each input `4 * inputs**2` bytes, twice while a batch is added; kernels that read
    one input (queries, keys and values) share its arrays. Sums are float32 or wider,
    products in the highest precision of the device. Batches of one shape share one
    compilation.

    Args:
      model: a Linen module or a function of `(params, batch)`, as for `layout`.
      params: pytree of arrays and leaves; a compressed leaf counts as one kernel.
      batches: iterable of batches, as for `layout`. If a batch is a dict with "mask",
        `[batch]` or `[batch, tokens]`, positions where it is 0 do not count. Inputs of
        a kernel whose axes begin with (batch, ...) and have a later axis of `tokens`
        are masked by position, likewise where both axes are merged into one; inputs of
        whole examples (pooled, or one step of a recurrent layer) count where any
        position of the example is real.
      where: pattern that fully matches names, or a function of a name; by default all
        floating-point arrays of 4 096 weights or more that the model multiplies or
        looks up. Only arrays of two axes or more have inputs.
      variables: further collections of a Linen module, as `{"batch_stats": ...}`.
      progress: as in `compress`, of the batches.

    Warns with the number of tokens needed where they are fewer than a kernel's inputs,
    and of large arrays that are not seen (`find_layouts`).

    Raises:
      ValueError: nothing selected, no batches, a selected weight whose inputs were
        never seen, inputs that are NaN or infinite, a mask that does not fit.
      TypeError: `batches` is one batch.

    Example:
      >>> moments = jc.collect_moments(model, params, batches)
      >>> moments["layer_0/mlp/down_proj/kernel"].second.shape
      (64, 64)
    """
    if isinstance(batches, Mapping):
        raise TypeError("batches is one dict; pass an iterable of them: [batch]")
    function = with_options(model_function(model, variables))
    names = selected(params, where)
    shapes, rebuild = flat_weights(params)

    layouts: dict[str, Layout] = {}  # in the order in which the model uses them
    leaders: dict[str, str] = {}  # the one whose sums a weight shares

    def sums(params: Params, batch: Any) -> Sums:
        weights = {name: dense(x) for name, x in roots(params)}
        mask = batch.get("mask") if isinstance(batch, Mapping) else None
        same = SameInputs()

        def visit(use: Use) -> dict[str, jax.Array]:
            layouts[use.name] = use.layout
            check_layout(use.name, shapes[use.name].shape, use.layout)
            same.note(use)
            if leaders.get(use.name, use.name) != use.name:
                return {}
            return row_sums(use, shapes[use.name].shape, mask)

        traced = trace_uses(
            lambda weights, batch: function(rebuild(weights), batch),
            weights,
            batch,
            visit,
            tagged=names,
        )
        now = same.leaders()
        changed = [n for n, lead in leaders.items() if now.get(n, lead) != lead]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: other inputs than on the batches before, since "
                "the model takes another way on this batch; pass batches of one shape"
            )
        leaders.update(now)
        return {name: named for name, named in traced.items() if named}

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: dict[str, Moments], params: Params, batch: Any) -> Any:
        more = averages(sums(params, batch), layouts)
        return {n: m + more[n] if n in more else m for n, m in total.items()}

    total = None
    for batch in each_item(batches, progress, label="calibrating", unit="batches"):
        batch = fix_options(batch)
        if total is None:
            probe = jax.eval_shape(sums, params, batch)
            check_seen(names if where is not None or not probe else [], probe)
            warn_unseen({n: shapes[n] for n in names if n not in probe}, shapes)
            probe = {n: x for n, x in probe.items() if leaders[n] == n}
            empty = jax.eval_shape(lambda x: averages(x, layouts), probe)
            total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty)
        total = add(total, params, batch)
        if progress:
            jax.block_until_ready(total)
    if total is None:
        raise ValueError("there are no batches; pass at least one")
    for name in layouts:
        if name in total:
            check_finite(name, total[name])
    moments = {
        name: dataclasses.replace(total[leaders[name]], layout=trailing(layout))
        for name, layout in layouts.items()
    }
    warn_few(moments)
    return moments


def selected(params: Params, where: Where = None) -> list[str]:
    """Return names of the weights whose moments are wanted, as `collect_moments` says.

    Raises ValueError where there are none.
    """
    shapes = {name: shape_of(x) for name, x in roots(params)}
    arrays = {name: x for name, x in shapes.items() if x.ndim > 1 and is_float(x)}
    if where is not None:
        return matching(list(arrays), where)
    names = [name for name, x in arrays.items() if x.size >= SMALLEST]
    if not names:
        raise ValueError(
            f"no array of two axes or more has {SMALLEST} weights; the largest are "
            f"{', '.join(list(arrays)[:3])}. Name what you want with where="
        )
    return names


def row_sums(
    use: Use, shape: tuple[int, ...], mask: Any, drifted: Use | None = None
) -> dict[str, jax.Array]:
    """Return sums over the rows of one use, stack axes first.

    `drifted` is the same use in the compressed model, where that is wanted too.
    """
    x, stack = use.inputs, use.inputs.shape[: use.stack]
    rows = x.shape[use.stack :] if use.lookup else x.shape[use.stack : -1]
    real = _real_rows(use.name, rows, mask if use.ordered else None)
    if use.real is not None:
        real = real & jnp.broadcast_to(use.real, rows).reshape(-1)
    if use.lookup:
        size = math.prod(shape[axis] for axis in use.layout.outputs)
        count = functools.partial(_count_rows, real=real, size=size)
        for _ in stack:
            count = jax.vmap(count)
        return {"tokens": count(x.reshape(*stack, -1))}

    def flat(x: jax.Array) -> jax.Array:
        x = x.reshape(*stack, -1, x.shape[-1])
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if mask is None and use.real is None:
            return x
        # where, not a product: padding may hold NaN
        return jnp.where(jnp.expand_dims(real, (*range(len(stack)), -1)), x, 0)

    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        each = tuple(range(len(stack)))
        contract = (((len(stack),), (len(stack),)), (each, each))
        return jax.lax.dot_general(a, b, contract, precision=jax.lax.Precision.HIGHEST)

    x = flat(x)
    count = jnp.broadcast_to(real.sum(dtype=jnp.float32), stack)
    sums = {"count": count, "sum": x.sum(-2), "second": products(x, x)}
    if drifted is not None:
        other = flat(drifted.inputs)
        sums |= {"drifted": products(other, other), "cross": products(x, other)}
    return sums


def _count_rows(rows: jax.Array, real: jax.Array, size: int) -> jax.Array:
    rows = jnp.where(rows < 0, size, rows)  # outside, and not counted from the end
    return jnp.zeros(size).at[rows].add(real.astype(jnp.float32), mode="drop")


def _real_rows(name: str, rows: tuple[int, ...], mask: Any) -> jax.Array:
    """Return whether each row is real, flat; `rows` are the axes before the inputs."""
    if mask is None:
        return jnp.ones(math.prod(rows), bool)
    mask = mask > 0
    wrong = ValueError(
        f"{name}: its inputs have axes {rows} before the last, and the mask of shape "
        f"{mask.shape} does not say which of them are padding; drop the mask and leave "
        "the padding out of the batches, or this weight out with where="
    )
    if mask.ndim not in (1, 2) or not rows:
        raise wrong
    if mask.ndim == 2 and rows[0] == mask.size and rows[0] != mask.shape[0]:
        mask, where = mask.reshape(-1), (0,)
    elif rows[0] != mask.shape[0]:
        raise wrong
    elif mask.ndim == 2 and mask.shape[1] in rows[1:]:
        where = (0, 1 + rows[1:].index(mask.shape[1]))
    else:
        mask, where = mask.reshape(mask.shape[0], -1).any(1), (0,)
    others = [axis for axis in range(len(rows)) if axis not in where]
    return jnp.broadcast_to(jnp.expand_dims(mask, others), rows).reshape(-1)


def averages(sums: Sums, layouts: Mapping[str, Layout]) -> dict[str, Moments]:
    """Return the moments of sums over rows, each with the layout of its weight."""
    moments = {}
    for name, named in sums.items():
        tokens, layout = named.get("tokens"), trailing(layouts[name])
        if "second" not in named:
            moments[name] = Moments(tokens.sum(-1), tokens=tokens, layout=layout)
            continue
        count = named["count"]
        scale = 1 / jnp.maximum(count, 1)  # a batch of padding alone
        matrices = {
            field: named[field] * scale[..., None, None]
            for field in ("second", "drifted", "cross")
            if field in named
        }
        mean = named["sum"] * scale[..., None]
        moments[name] = Moments(count, mean, tokens=tokens, layout=layout, **matrices)
    return moments


def check_seen(names: list[str], seen: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that the trace did not see; vectors by name, as the
    bias of several heads, do not count where there are others.
    """
    missing = [name for name in names if name not in seen]
    others = [name for name in missing if name.rsplit("/", 1)[-1] not in VECTORS]
    missing = others if others or seen else missing
    if missing:
        raise ValueError(
            f"the inputs of {', '.join(missing)} were never seen: the model does not "
            "use them on these batches, or not by a plain product, convolution or "
            "lookup (a weight that another weight multiplies first is not "
            "recognized). Leave them out with where="
        )


def check_finite(name: str, moments: Moments) -> None:
    if moments.second is not None and not bool(_all_finite(moments)):
        raise ValueError(
            f"{name}: its inputs are NaN or infinite on these batches; check the "
            "batches and the weights before it (names are checked in the order of the "
            "model, so this is the first)"
        )


def warn_few(moments: Mapping[str, Moments]) -> None:
    """Warn where a second moment cannot have full rank, naming the worst kernel."""
    few = {
        name: (int(jnp.min(m.count)), m.second.shape[-1])
        for name, m in moments.items()
        if m.second is not None and bool(jnp.any(m.count < m.second.shape[-1]))
    }
    if not few:
        return
    name, (count, inputs) = max(few.items(), key=lambda item: item[1][1])
    warnings.warn(
        f"too few calibration tokens: {len(few)} of {len(moments)} weights have more "
        f"inputs than tokens; {name} has {inputs} inputs and saw {count} tokens. Its "
        f"second moment needs {inputs} at the least, and {10 * inputs} to be reliable; "
        "pass more batches",
        stacklevel=3,
    )


@jax.jit
def _all_finite(moments: Moments) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(moments)]))
