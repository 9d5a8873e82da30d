"""Means of any metric over batches, on one device or many.

Compressed parameters are arguments like any others; each layer materializes its own
weights. Sums over one example are float32 on the device, sums over examples float64.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcompress.running.interception import mode
from jaxcompress.types import Batch, Params

Metrics = dict[str, tuple[jax.Array, jax.Array]]
MetricsFn = Callable[[Params, Batch], Metrics]


def evaluate(
    metrics_fn: MetricsFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    devices: Sequence[jax.Device] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Evaluate means over all examples of all batches, each the ratio of two sums.

    Args:
      metrics_fn: `(params, batch) -> {name: (sum, weight)}`, both `[examples]`:
        for each example what to add up, and how much it counts (its tokens, or 1).
        Pass the same function to evaluate again without compiling again.
      params: dense or compressed parameters.
      batches: dicts of arrays whose first axis is the examples. A batch that is
        smaller than the first, or does not divide over the devices, is padded here
        with examples that count nothing. `reporting.track` shows their progress.
      devices: run with `pmap` over these; by default over all local devices. Several
        processes then evaluate their own batches, each for itself.
      mesh: run with `jit` over this mesh instead, examples sharded over its first
        axis. With several processes each gives its share of every batch, and every
        process gets the totals of all.

    Raises:
      ValueError: no batches, a metric without weight, NaN or Inf (names the metric,
        the batch and the example), metrics of the wrong shape.

    Example:
      >>> metrics_fn = jc.evaluation.LanguageModelMetrics(apply_fn)
      >>> loss = jc.evaluate(metrics_fn, params, windows)["loss"]
    """
    sums = totals(metrics_fn, params, batches, devices=devices, mesh=mesh)
    return {name: total / weight for name, (total, weight) in sums.items()}


def totals(
    metrics_fn: MetricsFn,
    params: Params,
    batches: Iterable[Batch],
    *,
    devices: Sequence[jax.Device] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, tuple[float, float]]:
    """Sum metrics over all batches, as `evaluate` divides them: `{name: (sum,
    weight)}`, float64.

    Args:
      metrics_fn, params, batches, devices, mesh: as for `evaluate`.

    Example:
      >>> metrics_fn = jc.evaluation.LanguageModelMetrics(apply_fn)
      >>> total, weight = jc.evaluation.totals(metrics_fn, params, windows)["loss"]
    """
    sums: dict[str, np.ndarray] = {}
    for metrics in per_example(metrics_fn, params, batches, devices, mesh):
        for name, values in metrics.items():
            sums[name] = sums.get(name, 0.0) + values.sum(axis=1)
    for name, (_, weight) in sums.items():
        if not weight > 0:
            raise ValueError(
                f"the weights of {name!r} add up to {weight}; every example is masked"
            )
    return {
        name: (float(total), float(weight)) for name, (total, weight) in sums.items()
    }


def per_example(
    metrics_fn: MetricsFn,
    params: Params,
    batches: Iterable[Batch],
    devices: Sequence[jax.Device] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield sums and weights of each example, float64 `[2, examples]`, batch by batch.


    Args:
      metrics_fn, params, batches, devices, mesh: as for `evaluate`.

    Example:
      >>> metrics_fn = jc.evaluation.LanguageModelMetrics(apply_fn)
      >>> sums = list(jc.evaluation.per_example(metrics_fn, params, windows))
    """
    if mesh is not None and devices is not None:
        raise ValueError("pass devices or a mesh, not both; a mesh has its devices")
    if mesh is None:
        devices = tuple(jax.local_devices() if devices is None else devices)
        if not devices:
            raise ValueError("devices is empty; leave it out to use all local ones")
        shards, whole = len(devices), Mesh(np.array(devices), ("examples",))
    else:
        _check_mesh(mesh)
        shards, whole = mesh.local_mesh.devices.shape[0], mesh
    params = _place(params, whole)
    slots = number = -1
    for number, batch in enumerate(batches):
        batch = {key: np.asarray(value) for key, value in batch.items()}
        count = _examples(batch, number)
        if check := getattr(metrics_fn, "check_batch", None):
            check(batch, number)
        slots = max(slots, count + -count % shards)
        batch = {key: _pad(value, slots) for key, value in batch.items()}
        valid = np.arange(slots) < count
        if mesh is None:
            step = _replicated_step(metrics_fn, devices, mode())
            split = lambda x: x.reshape(shards, -1, *x.shape[1:])  # noqa: E731
        else:
            step = _sharded_step(metrics_fn, mesh, mode())
            rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
            split = functools.partial(jax.make_array_from_process_local_data, rows)
        metrics = jax.device_get(step(params, *jax.tree.map(split, (batch, valid))))
        sums = {}
        for name, values in metrics.items():
            values = np.stack([np.float64(value).reshape(-1) for value in values])
            _check_finite(name, values, number)
            sums[name] = values
        yield sums
    if number < 0:
        raise ValueError("no batches to evaluate; is the text shorter than one window?")


@functools.lru_cache(maxsize=16)
def _replicated_step(
    metrics_fn: MetricsFn, devices: tuple[jax.Device, ...], how: str | None
) -> Any:
    del how  # a key: the mode in which it is traced
    step = functools.partial(_masked, metrics_fn)
    return jax.pmap(step, in_axes=(None, 0, 0), devices=devices)


@functools.lru_cache(maxsize=16)
def _sharded_step(metrics_fn: MetricsFn, mesh: Mesh, how: str | None) -> Any:
    del how
    step = functools.partial(_masked, metrics_fn)
    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _masked(
    metrics_fn: MetricsFn, params: Params, batch: Batch, valid: jax.Array
) -> Metrics:
    masked = {}
    for name, pair in metrics_fn(params, batch).items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"metric {name!r} is not a pair (sum, weight)")
        for value in pair:
            if jnp.shape(value) != valid.shape:
                raise ValueError(
                    f"metric {name!r} has shape {jnp.shape(value)}; it needs one "
                    f"number per example, {valid.shape}: sum over the other axes"
                )
        masked[name] = tuple(
            jnp.where(valid, value.astype(jnp.float32), 0.0) for value in pair
        )
    return masked


def _place(params: Params, mesh: Mesh) -> Params:
    """Return parameters on every device of the mesh; those sharded over it stay so."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    wanted = set(mesh.devices.flat)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.device_set == wanted:
            return x
        return jax.device_put(x, everywhere)

    return jax.tree.map(place, params)


def _check_mesh(mesh: Mesh) -> None:
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"the mesh has axis types {mesh.axis_types}, which break unmodified Flax "
            "models; make it with axis_types=(jax.sharding.AxisType.Auto,) * n"
        )


def _examples(batch: dict[str, np.ndarray], number: int) -> int:
    counts = {key: x.shape[0] if x.ndim else None for key, x in batch.items()}
    if len(set(counts.values())) != 1 or not next(iter(counts.values())):
        raise ValueError(
            f"batch {number} has {counts} examples; every array needs the same number "
            "along its first axis, at least one"
        )
    return next(iter(counts.values()))


def _pad(x: np.ndarray, slots: int) -> np.ndarray:
    missing = slots - x.shape[0]
    return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x


def _check_finite(name: str, values: np.ndarray, number: int) -> None:
    bad = ~np.isfinite(values).all(axis=0)
    if bad.any():
        example = int(np.argmax(bad))
        raise ValueError(
            f"{name} is {values[0, example]} (weight {values[1, example]}) in example "
            f"{example} of batch {number}; look for NaN or overflow in the parameters, "
            "or use more bits"
        )
