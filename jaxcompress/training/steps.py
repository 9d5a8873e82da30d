"""Training steps: compressed or dense parameters, one compiled update at a time.

Only floating-point arrays train (`partition`): codes, masks and tables are never shown
to the gradient or the optimizer. What a step draws depends on the state's key and step
number alone, so that a run that stops and resumes ends with the same bits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompress import checks
from jaxcompress.tree.partitions import combine, partition
from jaxcompress.tree.paths import is_float
from jaxcompress.types import Batch, DType, Params

Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]

OWN_METRICS = ("loss", "gradient_norm", "update_norm", "finite")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps.

    `step` counts the updates done, int32. `optimizer` is Optax's state of the
    parameters that train. `key` is that of the run and never changes.

    Example:
      >>> state = jc.distillation.init_state(params, optax.adam(1e-3), key=key)
      >>> int(state.step)
      0
    """

    step: jax.Array
    params: Params
    optimizer: Any
    key: jax.Array


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DType | None = None,
    where: str | None = None,
    key: jax.Array,
) -> TrainState:
    """Build the state before the first step; it holds copies, as steps donate their
    state.

    Args:
      params: dense or compressed.
      optimizer: of Optax.
      dtype: of the parameters that train, None as they are. Scales are stored in
        bfloat16, where a small step is rounded away: train them in float32, and
        `cast_like(state.params, params)` afterwards.
      where: what trains, as for `partition`; the step needs the same.
      key: of the run.

    Raises ValueError where nothing in the tree trains.

    Example:
      >>> state = jc.distillation.init_state(params, optax.adam(1e-3), key=key)
    """
    copies = jax.tree.map(jnp.array, params)
    trainable, frozen = partition(copies, where)
    if dtype is not None:
        trainable = jax.tree.map(lambda x: x.astype(dtype), trainable)
        copies = combine(trainable, frozen)
    if not jax.tree.leaves(trainable):
        raise ValueError(
            "nothing here trains: the tree has no floating-point array (code_floats() "
            "makes floats of a file; running.decoding.decoded undoes it)"
        )
    copy = jax.random.wrap_key_data(jnp.array(jax.random.key_data(key)))
    return TrainState(jnp.int32(0), copies, optimizer.init(trainable), copy)


def cast_like(params: Params, like: Params) -> Params:
    """Cast parameters to the dtypes of others of the same structure.

    Args:
      params: to cast.
      like: of the dtypes wanted.

    Example:
      >>> half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
      >>> small = jc.distillation.cast_like(params, half)
    """
    return jax.tree.map(lambda x, y: x.astype(y.dtype), params, like)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: DType | None = None,
    where: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile a function `step(state, batch) -> (state, metrics)`; it donates `state`.

    A step whose loss, gradient or update is not finite, or whose `weight` is zero,
    changes nothing, not even the step number, and says so: `metrics["finite"]` is
    false. `train` stops there.

    Over several devices: `place` the state on a mesh and `shard_batch` each batch; the
    step returns a state sharded as the one it was given.

    Args:
      loss_fn: `(params, batch, key) -> (scalar, metrics)`, the metrics scalars. The key
        is another one in each step. Where `metrics["weight"]` is given, it is how much
        the loss counts (its tokens, say), for accumulation, and is summed; other
        metrics are averaged. Arrays that the function needs besides, a teacher's
        parameters above all, are bound with `jax.tree_util.Partial(function, arrays)`,
        whose bound arguments are first: they are passed to the compiled step, stay as
        they are, and may be sharded. In a plain closure they would be compiled in.
      optimizer: of Optax. It sees the parameters that train, None elsewhere, and is
        given the loss as `value` and the gradients as `gradients`, where it asks.
      accumulate: parts that a batch is cut into, one after the other, to save memory;
        part i has the examples i, i + accumulate, ...
      compute_dtype: bfloat16 casts floating-point parameters for the loss, while those
        kept, gradients and optimizer stay as they are. A Flax model whose own `dtype`
        is float32 casts back: `model.clone(dtype=jnp.bfloat16)`.
      where: what trains, as for `partition`, and as `init_state` was given it.

    Raises:
      ValueError: options out of range; when called, an empty batch, examples that
        `accumulate` does not divide, metrics that are not scalars or are called as one
        of the step's own.

    Example:
      >>> step = jc.make_train_step(loss_fn, optax.adam(1e-3))
    """
    checks.integer("make_train_step", "accumulate", accumulate)
    if compute_dtype is not None:
        compute_dtype = jnp.dtype(compute_dtype)
        if compute_dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(
                f"compute_dtype is {compute_dtype}; use bfloat16 or float32"
            )
    is_bound = isinstance(loss_fn, jax.tree_util.Partial)
    bound = loss_fn if is_bound else jax.tree_util.Partial(loss_fn)
    update = optax.with_extra_args_support(optimizer).update

    def step(
        state: TrainState, batch: Batch, loss_fn: LossFn
    ) -> tuple[TrainState, Metrics]:
        parts = partition(state.params, where)
        key = jax.random.fold_in(state.key, state.step)
        result = _differentiate(loss_fn, parts, batch, key, accumulate, compute_dtype)
        return _advance(update, state, parts, *result)

    compiled: dict[Any, Any] = {}

    def call(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch, accumulate)
        shardings = _shardings(state)
        where = None if shardings is None else tuple(jax.tree.leaves(shardings))
        if where not in compiled:
            compiled[where] = jax.jit(
                step, donate_argnums=0, out_shardings=(shardings, None)
            )
        return compiled[where](state, batch, bound)

    return call


def _differentiate(
    loss_fn: LossFn,
    parts: tuple[Params, Params],
    batch: Batch,
    key: jax.Array,
    accumulate: int,
    compute_dtype: DType | None,
) -> tuple[jax.Array, Metrics, Params]:
    """Return loss, metrics and gradient on a batch; `parts` are of `partition`."""
    trainable, frozen = parts

    def loss_of(trainable: Params, batch: Batch, key: jax.Array) -> Any:
        params = _cast(combine(trainable, frozen), compute_dtype)
        loss, metrics = loss_fn(params, batch, key)
        _check_metrics(loss, metrics)
        return loss.astype(jnp.float32), metrics

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate > 1:
        pieces = _parts(batch, accumulate)
        return _accumulated(gradient_of, trainable, pieces, key)
    (loss, metrics), gradients = gradient_of(trainable, batch, key)
    return loss, metrics, gradients


def _advance(
    update: Callable[..., Any],
    state: TrainState,
    parts: tuple[Params, Params],
    loss: jax.Array,
    metrics: Metrics,
    gradients: Params,
) -> tuple[TrainState, Metrics]:
    """Return the state after an update, the same where one is not finite; metrics."""
    trainable, frozen = parts
    updates, optimizer_state = update(
        gradients, state.optimizer, trainable, value=loss, gradients=gradients
    )
    chex.assert_trees_all_equal_shapes(updates, trainable)  # apply_updates broadcasts
    norms = {"gradient_norm": _norm(gradients), "update_norm": _norm(updates)}
    finite = jnp.isfinite(jnp.stack([loss, *norms.values()])).all()
    finite &= jnp.asarray(metrics.get("weight", 1)) > 0
    moved = optax.apply_updates(trainable, updates)
    step = optax.safe_increment(state.step)
    after = TrainState(step, combine(moved, frozen), optimizer_state, state.key)

    def choose(new: Any, old: Any) -> Any:
        return old if new is old else jnp.where(finite, new, old)

    after = jax.tree.map(choose, after, state)
    return after, metrics | {"loss": loss, **norms, "finite": finite}


def check_batch(batch: Batch, parts: int = 1) -> None:
    """Raise ValueError where a batch is empty, wholly masked, or cannot be cut into
    parts.

    A mask already on a device is not looked at.
    """
    arrays = jax.tree.leaves(batch)
    shapes = [np.shape(x) for x in arrays]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"a batch with arrays of shapes {shapes} is empty or uneven; every array "
            "needs the same number of examples along its first axis, at least one"
        )
    size = sizes.pop()
    if size % parts:
        raise ValueError(
            f"{size} examples cannot be cut into {parts} equal parts; choose a batch "
            "that accumulate divides"
        )
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, np.ndarray) and not mask.any():
        raise ValueError("an empty batch: its mask is false everywhere; leave it out")


def place(state: TrainState, mesh: Mesh, *, axis: str | None = None) -> TrainState:
    """Place the state on a mesh: a copy on every device, or large arrays sharded.

    Args:
      state: of any run.
      mesh: with axis types Auto.
      axis: of the mesh; arrays of the parameters and of the optimizer are cut along
        their largest axis that it divides, whatever has none is copied. None copies
        all.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> state = jc.distillation.init_state(params, optax.adam(1e-3), key=key)
      >>> state = jc.distillation.place(state, mesh)
    """
    if axis is not None and axis not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, not {axis!r}")

    def sharding(x: Any) -> NamedSharding:
        spec: list[str | None] = [None] * x.ndim
        fits = [i for i, n in enumerate(x.shape) if axis and n % mesh.shape[axis] == 0]
        if fits and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            spec[max(fits, key=lambda i: x.shape[i])] = axis
        return NamedSharding(mesh, PartitionSpec(*spec))

    # A copy even where it is there already: steps donate their state.
    copies = jax.tree.map(jnp.copy, state)
    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), copies)


def shard_batch(batch: Batch, mesh: Mesh, *, axis: str | None = None) -> Batch:
    """Shard the examples of a batch over an axis of a mesh, the first if None.

    With several processes each gives its own share. Raises ValueError where the axis
    does not divide the examples of this process.

    Args:
      batch: dict of arrays whose first axis is the examples.
      mesh: with axis types Auto.
      axis: of the mesh; None: the first.

    Example:
      >>> batch = jc.distillation.shard_batch(batches[0], mesh)
    """
    axis = mesh.axis_names[0] if axis is None else axis
    rows = NamedSharding(mesh, PartitionSpec(axis))
    parts = mesh.local_mesh.shape[axis]
    check_batch(batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % parts:
        raise ValueError(
            f"{size} examples cannot be shared out over {parts} devices; choose a "
            "batch that they divide"
        )
    put = lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x))  # noqa: E731
    return jax.tree.map(put, batch)


def _accumulated(
    gradient_of: Callable[..., Any], trainable: Params, parts: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics, Params]:
    """Return loss, metrics and gradient of all parts, each counted by its weight."""
    count = jax.tree.leaves(parts)[0].shape[0]

    def one(total: Any, part: tuple) -> tuple[Any, None]:
        batch, key = part
        (loss, metrics), gradients = gradient_of(trainable, batch, key)
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        rest = {name: x for name, x in metrics.items() if name != "weight"}
        more = jax.tree.map(
            lambda x: weight * x.astype(jnp.float32), (loss, rest, gradients)
        )
        return jax.tree.map(jnp.add, total, (*more, weight)), None

    first = jax.tree.map(lambda x: x[0], parts)
    (loss, metrics), _ = jax.eval_shape(gradient_of, trainable, first, key)
    rest = {name: x for name, x in metrics.items() if name != "weight"}
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), (loss, rest, trainable)
    )
    keys = jax.random.split(key, count)
    total, _ = jax.lax.scan(one, (*zeros, jnp.float32(0)), (parts, keys))
    loss, rest, gradients, weight = total
    scale = 1 / jnp.where(weight > 0, weight, 1)
    gradients = jax.tree.map(
        lambda g, x: (scale * g).astype(x.dtype), gradients, trainable
    )
    averages = {name: scale * x for name, x in rest.items()}
    if "weight" in metrics:
        averages["weight"] = weight
    return scale * loss, averages, gradients


def _parts(batch: Batch, count: int) -> Batch:
    """Split into `[count, examples / count, ...]`; examples sharded over devices stay
    there.
    """

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def _cast(params: Params, dtype: DType | None) -> Params:
    if dtype is None:
        return params
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, params)


def _norm(tree: Params) -> jax.Array:
    """Return the Euclidean norm of all arrays together."""
    squares = [jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def _check_metrics(loss: jax.Array, metrics: Metrics) -> None:
    if jnp.shape(loss) or not is_float(loss):
        raise ValueError(
            f"the loss is {loss.dtype} {jnp.shape(loss)}; it must be one "
            "floating-point number: distillation.mean(values, mask)"
        )
    for name, value in metrics.items():
        if name in OWN_METRICS:
            raise ValueError(
                f"the step reports {', '.join(OWN_METRICS)} itself; call the metric "
                f"{name!r} of the loss function otherwise"
            )
        if jnp.shape(value):
            raise ValueError(
                f"the metric {name!r} has shape {jnp.shape(value)}; it must be a scalar"
            )


def _shardings(state: TrainState) -> TrainState | None:
    """Return the shardings of a state on several devices; None on one."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    several = any(len(s.device_set) > 1 for s in jax.tree.leaves(shardings))
    return shardings if several else None
