"""`measure_sensitivities`: how much a loss grows with the error of each leaf."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.damage import relative_square
from jaxcompress.calibration.moments import Moments
from jaxcompress.checks import check_concrete
from jaxcompress.progress import each_item
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import map_entries
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Params, Progress


def measure_sensitivities(
    loss_fn: Callable[[Params], Any],
    params: Params,
    *,
    sizes: Sequence[float] = (0.1, 0.2),
    moments: Mapping[str, Moments] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
    key: jax.Array,
    progress: Progress = False,
) -> dict[str, float]:
    """Measure how much a loss grows per relative squared error of each leaf, the others
    exact.

    Gaussian noise is added to one leaf at a time, and the growth of the loss regressed
    on the squared relative size of the noise, through zero. It calls `loss_fn`
    `1 + leaves * len(sizes)` times.

    Args:
      loss_fn: of parameters, a number; a divergence from the original model, as
        `lambda tree: compare(apply_fn, params, tree, batches).kl`.
      params: concrete.
      sizes: of the noise, relative to the leaf (norm over norm; of the layer's outputs
        where the leaf has a second moment). About those of the expected errors: 0.2 is
        what 3 bits make, 0.1 is 4.
      moments, layouts, where: as for `plan_bits`.
      key: of the noise.
      progress: as in `compress`.

    Returns:
      Sensitivities by name, in units of the loss.

    Raises:
      ValueError: sizes out of range, a loss that is not finite.

    Example:
      >>> loss = lambda tree: jc.tree.norm(tree)
      >>> where = "layer_0/mlp/down_proj/kernel"
      >>> grown = jc.measure_sensitivities(loss, params, where=where, key=key)
    """
    check_concrete(params, "measure_sensitivities")
    if not sizes or not all(checks.is_number(n) and n > 0 for n in sizes):
        raise ValueError(
            f"measure_sensitivities takes sizes of noise above 0, not {sizes!r}"
        )
    sensitivities: dict[str, float] = {}
    base = float(loss_fn(params))
    planned = planned_entries(params, moments, where, layouts)
    turns = iter(
        each_item([entry.name for entry in planned], progress, label="sensitivities")
    )
    for number, entry in enumerate(planned):
        next(turns, None)
        x = dense(entry.value)
        noise = jax.random.normal(jax.random.fold_in(key, number), x.shape, jnp.float32)
        unit = relative_square(entry, x + noise.astype(x.dtype))
        growth = []
        for size in sizes:
            scaled = x + (noise * (size / unit**0.5)).astype(x.dtype)
            noisy = map_entries(
                lambda e, name=entry.name, new=scaled: (
                    new if e.name == name else e.value
                ),
                params,
            )
            growth.append(float(loss_fn(noisy)) - base)
        squares = np.square(np.asarray(sizes, np.float64))
        slope = float(squares @ np.asarray(growth) / (squares @ squares))
        if not np.isfinite(slope):
            raise ValueError(
                f"{entry.name}: the loss is {base} without noise and "
                f"{[base + g for g in growth]} with noise of sizes {list(sizes)}; "
                "make sizes smaller, or look for NaN in the batches"
            )
        sensitivities[entry.name] = slope
    for _ in turns:
        pass
    return sensitivities
