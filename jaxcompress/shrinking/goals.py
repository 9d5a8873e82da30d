"""Goals of a caller: a size of the file, or a divergence from the model."""

import dataclasses

from jaxcompress import checks
from jaxcompress.planning.budget import parse_bytes

REACHED = 0.99  # of the size asked: what counts as reached


@dataclasses.dataclass(frozen=True)
class Goal:
    """One of the two: `file_bytes`, an upper limit, or `kl`, an upper limit in nats."""

    file_bytes: int | None
    kl: float | None


def parse_goal(
    size: int | str | None,
    bits_per_weight: float | None,
    kl: float | None,
    weights: int,
) -> Goal:
    """Read the one goal that was given.

    Args:
      size: of the finished file; see `parse_bytes`.
      bits_per_weight: of the finished file, over all weights of the model.
      kl: mean KL(model || small) in nats per prediction.
      weights: of the model.

    Raises:
      ValueError: none given, or more than one, or one out of range.
    """
    named = {"size": size, "bits_per_weight": bits_per_weight, "kl": kl}
    goals = {name: value for name, value in named.items() if value is not None}
    if len(goals) != 1:
        received = ", ".join(f"{name}={value!r}" for name, value in goals.items())
        raise ValueError(
            "shrink takes exactly one of size=, bits_per_weight= and kl=, not "
            f"{received or 'none'}; for instance size='60MB'"
        )
    if size is not None:
        return Goal(parse_bytes(size), None)
    (name, value), *_ = goals.items()
    checks.positive("shrink", name, value)
    if kl is not None:
        return Goal(None, float(kl))
    if value > 64:
        raise ValueError(f"shrink takes at most 64 bits per weight, not {value!r}")
    return Goal(int(value * weights / 8), None)
