"""Losses of a student against labels and a teacher's logits, per position.

Logits are `[..., vocabulary]`, and every loss is `[...]`, in nats: one number for each
position that is predicted. A `mask` `[...]` is true where a position counts; elsewhere
the loss and its gradient are zero, whatever the inputs. `mean` makes one number of
it. Computed in float32, or wider where the logits are. Soft losses are multiplied by
the square of the temperature, so that their gradients keep their size (Hinton, Vinyals
and Dean 2015, arXiv 1503.02531, section 2.1).
"""

import math

import jax
import jax.numpy as jnp

from jaxcompress import checks
from jaxcompress.evaluation.language import divergence


def loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float = 1.0,
    soft_weight: float = 0.5,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `(1 - a) CE(labels, student) + a T^2 KL(teacher / T || student / T)`,
    `[...]`.

    Args:
      student_logits, teacher_logits: `[..., vocabulary]`.
      labels: integers `[...]`.
      temperature: T, of both softmaxes in the soft part; above 0.
      soft_weight: a, from 0 (labels only) to 1 (teacher only).
      mask: `[...]`.

    Raises:
      ValueError: vocabularies or shapes that differ, an option out of range.

    Example:
      >>> logits, labels = jnp.zeros((2, 8)), jnp.array([1, 2])
      >>> jc.distillation.loss(logits, logits, labels, temperature=2.0).shape
      (2,)

    Source: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531).
    """
    checks.fraction("loss", "soft_weight", soft_weight, zero=True, one=True)
    soft = forward_kl(
        student_logits, teacher_logits, temperature=temperature, mask=mask
    )
    if soft_weight == 1:  # labels may then be anything: 0 * NaN is NaN
        return soft
    hard = cross_entropy(student_logits, labels, mask=mask)
    return (1 - soft_weight) * hard + soft_weight * soft


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Compute `-log softmax(logits)[label]`, `[...]`; NaN where a label is out of
    range.

    Raises ValueError where labels are not integers of shape `[...]`.

    Args:
      logits: `[..., vocabulary]`.
      labels: integers `[...]`.
      mask: `[...]`.

    Example:
      >>> values = jc.distillation.cross_entropy(jnp.zeros((2, 8)), jnp.array([1, 2]))
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(
        labels.dtype, jnp.integer
    ):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; logits {logits.shape} need "
            f"integers {logits.shape[:-1]}"
        )
    mine = log_probs(logits, mask=mask)
    if mask is not None:
        labels = jnp.where(check_mask(mask, labels.shape), labels, 0)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    picked = take(mine, jnp.where(valid, labels, 0)[..., None])[..., 0]
    return only(jnp.where(valid, -picked, jnp.nan), mask)


def forward_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `T^2 KL(teacher / T || student / T)`, `[...]`: mode-covering.

    Raises ValueError on vocabularies or shapes that differ, or a temperature not
    above 0.

    Args:
      student_logits, teacher_logits: `[..., vocabulary]`.
      temperature: T, of both softmaxes; above 0.
      mask: `[...]`.

    Example:
      >>> student, teacher = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> values = jc.distillation.forward_kl(student, teacher, temperature=2.0)
    """
    return _kl(student_logits, teacher_logits, temperature, mask)


def reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `T^2 KL(student / T || teacher / T)`, `[...]`: mode-seeking.

    Errors as `forward_kl`. Source: Gu et al. 2024, MiniLLM (arXiv 2306.08543).

    Args:
      student_logits, teacher_logits, temperature, mask: as for `forward_kl`.

    Example:
      >>> values = jc.distillation.reverse_kl(jnp.zeros((2, 8)), jnp.ones((2, 8)))
    """
    return _kl(student_logits, teacher_logits, temperature, mask, reverse=True)


def soft_cross_entropy(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `-T^2 sum softmax(teacher / T) log softmax(student / T)`, `[...]`.

    `forward_kl` plus what the student cannot change, the entropy of the teacher. Errors
    as `forward_kl`.

    Args:
      student_logits, teacher_logits, temperature, mask: as for `forward_kl`.

    Example:
      >>> student, teacher = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> values = jc.distillation.soft_cross_entropy(student, teacher)
    """
    student, teacher = _both(student_logits, teacher_logits, temperature, mask)
    p = jnp.exp(teacher)
    terms = p * jnp.where(p > 0, student, 0)
    return only(-(temperature**2) * terms.sum(axis=-1), mask)


def jensen_shannon(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `T^2 (b KL(p || m) + (1 - b) KL(q || m))`, `m = b p + (1 - b) q`,
    `[...]`.

    p is the teacher, q the student. Divided by b it tends to the forward KL for b near
    0, divided by 1 - b to the reverse KL for b near 1.

    Errors as `forward_kl`, and `beta` not inside (0, 1).

    Args:
      student_logits, teacher_logits, temperature, mask: as for `forward_kl`.
      beta: b, the weight of the teacher in m; inside (0, 1).

    Example:
      >>> student, teacher = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> values = jc.distillation.jensen_shannon(student, teacher, beta=0.5)

    Source: Agarwal et al. 2024, GKD (arXiv 2306.13649, equation 1).
    """
    checks.fraction("jensen_shannon", "beta", beta)
    student, teacher = _both(student_logits, teacher_logits, temperature, mask)
    middle = _mixture(teacher, student, beta)
    both = beta * divergence(teacher, middle) + (1 - beta) * divergence(student, middle)
    return only(temperature**2 * both, mask)


def skewed_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `T^2 KL(p || a p + (1 - a) q)`, `[...]`: bounded by `-T^2 log a`.

    p is the teacher, q the student. Errors as `forward_kl`, and `alpha` not inside
    (0, 1). Source: Ko et al. 2024, DistiLLM (arXiv 2402.03898, equation 4).

    Args:
      student_logits, teacher_logits, temperature, mask: as for `forward_kl`.
      alpha: a, the weight of the teacher in the mixture; inside (0, 1).

    Example:
      >>> student, teacher = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> values = jc.distillation.skewed_kl(student, teacher, alpha=0.1)
    """
    checks.fraction("skewed_kl", "alpha", alpha)
    return _kl(student_logits, teacher_logits, temperature, mask, alpha=alpha)


def skewed_reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `T^2 KL(q || a q + (1 - a) p)`, `[...]`: the student's side of
    `skewed_kl`.

    Args:
      student_logits, teacher_logits, temperature, mask: as for `forward_kl`.
      alpha: a, the weight of the student in the mixture; inside (0, 1).

    Example:
      >>> student, teacher = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> values = jc.distillation.skewed_reverse_kl(student, teacher, alpha=0.1)
    """
    checks.fraction("skewed_reverse_kl", "alpha", alpha)
    return _kl(
        student_logits, teacher_logits, temperature, mask, alpha=alpha, reverse=True
    )


def mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Average a loss `[...]` over the positions that count; 0 where none does.

    Raises ValueError on an empty batch.

    Args:
      values: `[...]`.
      mask: `[...]`.

    Example:
      >>> float(jc.distillation.mean(jnp.array([1.0, 3.0])))
      2.0
    """
    if not values.size:
        raise ValueError(
            f"an empty batch: losses of shape {values.shape} have no mean; leave such "
            "batches out"
        )
    return only(values, mask).sum() / jnp.maximum(count(values, mask), 1)


def count(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Count the positions of a loss `[...]` that are not masked, float32.

    Args:
      values: `[...]`.
      mask: `[...]`.

    Example:
      >>> float(jc.distillation.count(jnp.ones(3), jnp.array([1, 0, 1])))
      2.0
    """
    if mask is None:
        return jnp.float32(values.size)
    return check_mask(mask, values.shape).sum(dtype=jnp.float32)


def log_probs(
    logits: jax.Array, *, temperature: float = 1.0, mask: jax.Array | None = None
) -> jax.Array:
    """Compute `log softmax(logits / T)` in float32 or wider; uniform where masked.

    Masked logits are replaced before anything is computed from them: a product with
    zero afterwards would leave the NaN of padding in the gradients.
    """
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")
    if mask is not None:
        counts = check_mask(mask, logits.shape[:-1])[..., None]
        logits = jnp.where(counts, logits, jnp.zeros((), logits.dtype))
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.nn.log_softmax(wide / temperature, axis=-1)


def check_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the mask as booleans; ValueError where it is not one per position."""
    if jnp.shape(mask) != shape:
        raise ValueError(
            f"the mask has shape {jnp.shape(mask)}; it needs one entry per position, "
            f"{shape}"
        )
    return jnp.asarray(mask) > 0


def only(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zero where the mask is not true."""
    if mask is None:
        return values
    return jnp.where(check_mask(mask, values.shape), values, 0)


def take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """Take `values [..., V]` at `indices [..., n]` of the last axis."""
    return jnp.take_along_axis(values, indices.astype(jnp.int32), axis=-1)


def check_vocabulary(student: int, teacher: int) -> None:
    """Raise ValueError, with both sizes, where they differ."""
    if student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} entries, the teacher's {teacher}; "
            "logits can be compared only over the same tokens: give the student the "
            "teacher's tokenizer, or align hidden states instead"
        )


def _both(
    student: jax.Array, teacher: jax.Array, temperature: float, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities of student and teacher."""
    check_vocabulary(student.shape[-1], teacher.shape[-1])
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {student.shape}, the teacher's "
            f"{teacher.shape}; both must predict the same positions"
        )
    return (
        log_probs(student, temperature=temperature, mask=mask),
        log_probs(teacher, temperature=temperature, mask=mask),
    )


def _kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float,
    mask: jax.Array | None,
    *,
    alpha: float = 0.0,
    reverse: bool = False,
) -> jax.Array:
    """Compute `T^2 KL(p || a p + (1 - a) q)`, `[...]`; p is the teacher, or reversed
    q.
    """
    q, p = _both(student_logits, teacher_logits, temperature, mask)
    if reverse:
        p, q = q, p
    if alpha:
        q = _mixture(p, q, alpha)
    return only(temperature**2 * divergence(p, q), mask)


def _mixture(first: jax.Array, second: jax.Array, weight: float) -> jax.Array:
    """Log of `weight exp(first) + (1 - weight) exp(second)`."""
    return jnp.logaddexp(math.log(weight) + first, math.log1p(-weight) + second)
