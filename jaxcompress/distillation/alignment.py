"""Losses between hidden states, attention maps and relations of two models.

Hidden states are `[batch, tokens, width]`, attention maps `[batch, heads, tokens,
keys]`; every loss is `[batch, tokens]`, float32 or wider, zero where the `mask`
`[batch, tokens]` is not true. `over_layers` applies one of them to mapped layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.distillation.losses import check_mask, only
from jaxcompress.evaluation.language import divergence

Layers = Literal["uniform", "last"] | Mapping[int, int]


def layer_pairs(students: int, teachers: int, layers: Layers) -> list[tuple[int, int]]:
    """List pairs (student's layer, teacher's layer), counted from 0.

    Args:
      students, teachers: how many layers each has.
      layers: "uniform": layer i looks at layer `ceil((i + 1) teachers / students) - 1`,
        so that the last looks at the last; "last": that pair alone; or a dict from
        student's to teacher's layers, negative ones counted from the end.

    Raises:
      ValueError: a layer that does not exist, an empty dict, an unknown word.

    Example:
      >>> jc.distillation.layer_pairs(2, 4, "uniform")
      [(0, 1), (1, 3)]
    """
    if students < 1 or teachers < 1:
        raise ValueError(f"{students} student and {teachers} teacher layers: none")
    if layers == "last":
        return [(students - 1, teachers - 1)]
    if layers == "uniform":
        return [(i, -(-(i + 1) * teachers // students) - 1) for i in range(students)]
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            f"layers is {layers!r}; give 'uniform', 'last', or a dict from student's "
            "layers to teacher's"
        )
    pairs = []
    for mine, teacher_layer in layers.items():
        for who, layer, size in (
            ("student", mine, students),
            ("teacher", teacher_layer, teachers),
        ):
            if not -size <= layer < size:
                raise ValueError(
                    f"the mapping {mine} -> {teacher_layer} points nowhere: the {who} "
                    f"has {size} layers, 0 to {size - 1}, not {layer}"
                )
        pairs.append((mine % students, teacher_layer % teachers))
    return pairs


def over_layers(
    loss: Callable[..., jax.Array],
    students: Sequence[Any],
    teachers: Sequence[Any],
    *,
    layers: Layers = "uniform",
    **options: Any,
) -> jax.Array:
    """Average `loss(student, teacher, **options)` over pairs of layers.

    Args:
      loss: of this module, or any function that returns `[batch, tokens]`.
      students, teachers: one array a layer, or one array with the layers first, as a
        scanned model gives them.
      layers: as for `layer_pairs`, which lists the errors.
      options: passed on; a list or tuple of projections has one for each pair.

    Example:
      >>> states = jnp.ones((2, 1, 4, 8))
      >>> jc.distillation.over_layers(
      ...     jc.distillation.hidden_states, states, states
      ... ).shape
      (1, 4)
    """
    pairs = layer_pairs(len(students), len(teachers), layers)
    projections = options.pop("projection", None)
    if not isinstance(projections, list | tuple):
        projections = [projections] * len(pairs)
    if len(projections) != len(pairs):
        raise ValueError(
            f"{len(projections)} projections for {len(pairs)} pairs of layers; give "
            "one for each, or one for all"
        )
    total = 0.0
    for (mine, teacher_layer), projection in zip(pairs, projections, strict=True):
        extra = {} if projection is None else {"projection": projection}
        total += loss(students[mine], teachers[teacher_layer], **options, **extra)
    return total / len(pairs)


def hidden_states(
    student: jax.Array,
    teacher: jax.Array,
    *,
    projection: jax.Array | None = None,
    kind: Literal["squared", "relative", "cosine"] = "squared",
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute the distance of hidden states, `[batch, tokens]`.

    Args:
      student: `[batch, tokens, width]`.
      teacher: `[batch, tokens, teacher's width]`.
      projection: `[width, teacher's width]`, applied to the student's, and trained
        with it (`initial_projection`); needed where the widths differ.
      kind: "squared": mean squared difference over features; "relative": the same over
        the mean square of the teacher's; "cosine": 1 - cosine, from 0 to 2, and 1 where
        a state is zero.
      mask: `[batch, tokens]`.

    Raises:
      ValueError: shapes that do not fit, an unknown kind.

    Example:
      >>> states = jnp.ones((1, 4, 8))
      >>> jc.distillation.hidden_states(states, states, kind="cosine").shape
      (1, 4)

    Source: Jiao et al. 2020, TinyBERT (arXiv 1909.10351, equation 8); Sanh et al. 2019,
    DistilBERT (arXiv 1910.01108), for the cosine.
    """
    student, teacher = _wide(student, mask), _wide(teacher, mask)
    if projection is not None:
        if projection.shape != (student.shape[-1], teacher.shape[-1]):
            raise ValueError(
                f"the projection has shape {projection.shape}; states of widths "
                f"{student.shape[-1]} and {teacher.shape[-1]} need "
                f"{(student.shape[-1], teacher.shape[-1])}"
            )
        student = student @ projection.astype(student.dtype)
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's states have shape {student.shape}, the teacher's "
            f"{teacher.shape}; widths that differ need a projection"
        )
    if kind == "cosine":
        return only(1 - (_unit(student) * _unit(teacher)).sum(axis=-1), mask)
    if kind not in ("squared", "relative"):
        raise ValueError(f"kind is {kind!r}; it is 'squared', 'relative' or 'cosine'")
    squared = jnp.square(student - teacher).mean(axis=-1)
    if kind == "relative":  # a state of zeros has no scale
        size = jnp.square(teacher).mean(axis=-1)
        squared = squared / jnp.where(size > 0, size, 1)
    return only(squared, mask)


def initial_projection(width: int, teacher_width: int, *, key: jax.Array) -> jax.Array:
    """Draw a matrix `[width, teacher's width]` with orthonormal rows or columns.

    Args:
      width, teacher_width: features of the student and of the teacher.
      key: of the random matrix.

    Example:
      >>> matrix = jc.distillation.initial_projection(8, 16, key=key)
    """
    return jax.nn.initializers.orthogonal()(key, (width, teacher_width))


def attention_maps(
    student: jax.Array,
    teacher: jax.Array,
    *,
    heads: Sequence[int] | None = None,
    kind: Literal["kl", "squared"] = "kl",
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute the distance of attention maps, a mean over heads, `[batch, tokens]`.

    Args:
      student: `[batch, heads, tokens, keys]`, rows that add up to 1.
      teacher: the same with its own heads.
      heads: for each of the student's heads the teacher's head that it imitates; needed
        where their numbers differ.
      kind: "kl": KL(teacher || student) over keys, in nats; "squared": summed squared
        difference over keys.
      mask: `[batch, tokens]`, of the queries.

    Raises:
      ValueError: shapes or head numbers that do not fit, a head that does not exist.

    Example:
      >>> maps = jnp.full((1, 2, 4, 4), 0.25)
      >>> jc.distillation.attention_maps(maps, maps).shape
      (1, 4)

    Source: Jiao et al. 2020 (arXiv 1909.10351, equation 7); Wang et al. 2020, MiniLM
    (arXiv 2002.10957), for the KL.
    """
    if heads is not None:
        heads = tuple(heads)
        if len(heads) != student.shape[1] or not all(
            0 <= head < teacher.shape[1] for head in heads
        ):
            raise ValueError(
                f"heads {heads} point nowhere: the student has {student.shape[1]} "
                f"heads, and each needs one of the teacher's 0 to "
                f"{teacher.shape[1] - 1}"
            )
        teacher = teacher[:, jnp.array(heads)]
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's maps have shape {student.shape}, the teacher's "
            f"{teacher.shape}; pass heads=, or use relations, which need no maps"
        )
    student, teacher = _wide(student), _wide(teacher)
    if mask is not None:
        queries = check_mask(mask, student.shape[:1] + student.shape[2:3])
        queries = queries[:, None, :, None]
        student, teacher = (jnp.where(queries, x, 1) for x in (student, teacher))
    if kind == "squared":
        apart = jnp.square(student - teacher).sum(axis=-1)
    elif kind == "kl":
        # A weight of zero (a key not yet written, or one that underflowed) has no log.
        tiny = jnp.finfo(student.dtype).tiny
        ratio = jnp.log(jnp.maximum(teacher, tiny)) - jnp.log(
            jnp.maximum(student, tiny)
        )
        apart = (teacher * ratio).sum(axis=-1)
    else:
        raise ValueError(f"kind is {kind!r}; it is 'kl' or 'squared'")
    return only(apart.mean(axis=1), mask)


def relations(
    student: jax.Array,
    teacher: jax.Array,
    *,
    heads: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute the KL of how tokens of a text relate, teacher against student, `[batch,
    tokens]`.

    For states A, split into heads: `softmax(A A^T / sqrt(size of a head))` over the
    other tokens; needs neither maps nor equal widths or head numbers. Give it queries,
    keys or values (the outputs of these projections), or any hidden states.

    Args:
      student, teacher: `[batch, tokens, width]`, each its own width.
      heads: relation heads, which divide both widths.
      mask: `[batch, tokens]`; others are neither compared nor related to.

    Raises:
      ValueError: a width that `heads` does not divide, other texts or lengths.

    Example:
      >>> states = jnp.ones((1, 4, 8))
      >>> jc.distillation.relations(states, states, heads=2).shape
      (1, 4)

    Source: Wang et al. 2021, MiniLMv2 (arXiv 2012.15828, section 3.1).
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"the student's states have shape {student.shape}, the teacher's "
            f"{teacher.shape}; batch and tokens must agree"
        )
    mine, teacher_relations = (_related(x, heads, mask) for x in (student, teacher))
    return only(divergence(teacher_relations, mine).mean(axis=1), mask)


def _related(states: jax.Array, heads: int, mask: jax.Array | None) -> jax.Array:
    """Return logits of the relations, `[batch, heads, tokens, tokens]`."""
    batch, tokens, width = states.shape
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} relation heads do not divide a width of {width}; try "
            f"{math.gcd(width, heads) if heads > 0 else 1}"
        )
    split = _wide(states, mask).reshape(batch, tokens, heads, width // heads)
    logits = jnp.einsum("bqhd,bkhd->bhqk", split, split) / math.sqrt(width // heads)
    if mask is None:
        return logits
    keys = check_mask(mask, (batch, tokens))[:, None, None, :]
    # The lowest number, not -inf: a text of padding only must not become NaN.
    return jnp.where(keys, logits, jnp.finfo(logits.dtype).min)


def _wide(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Cast to float32 or wider, zero where masked, so that gradients stay clean."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return x
    return jnp.where(check_mask(mask, x.shape[:-1])[..., None], x, 0)


def _unit(x: jax.Array) -> jax.Array:
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))  # a state of zeros
