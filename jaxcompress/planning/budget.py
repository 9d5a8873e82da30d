"""One budget, said in one of three ways, for every planner."""

import math
import re
from typing import Any

from jaxcompress import checks

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes: an integer, or a string with a unit.

    1 MB is 10^6 bytes, 1 MiB 2^20.

        parse_bytes("60MB")  # 60 000 000

    Args:
      size: above 0; units are B, kB, MB, GB, KiB, MiB and GiB in any case.

    Raises:
      ValueError: another form, or not above 0.
    """
    wrong = f"{size!r} is not a size; write bytes as an integer, or '60MB', '57.2MiB'"
    if not (checks.is_integer(size) or isinstance(size, str)):
        raise ValueError(wrong)
    if not isinstance(size, str):
        count = int(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", size.lower())
        unit = (_UNITS | _BINARY).get(match[2]) if match else None
        if match is None or unit is None:
            raise ValueError(wrong)
        count = math.floor(float(match[1]) * unit)
    if count <= 0:
        raise ValueError(wrong)
    return count


def byte_limit(
    planner: str,
    *,
    bits_per_weight: float | None,
    nbytes: int | str | None,
    fraction: float | None,
    weights: int,
    total: int,
) -> int:
    """Convert the one budget that was given to bytes.

    Args:
      planner: its name, for the message.
      bits_per_weight: over the planned leaves.
      nbytes: of the planned leaves; see `parse_bytes`.
      fraction: of the bytes that the planned leaves take now, above 0 and at most 1.
      weights: how many the planned leaves have.
      total: bytes that they take now.

    Raises:
      ValueError: none given, or more than one, or one out of range.
    """
    named: dict[str, Any] = {
        "bits_per_weight": bits_per_weight,
        "nbytes": nbytes,
        "fraction": fraction,
    }
    budgets = {name: value for name, value in named.items() if value is not None}
    if len(budgets) != 1:
        received = ", ".join(f"{name}={value!r}" for name, value in budgets.items())
        raise ValueError(
            f"{planner} takes exactly one of bits_per_weight=, nbytes= and fraction=, "
            f"not {received or 'none'}; for instance nbytes='60MB'"
        )
    if nbytes is not None:
        return parse_bytes(nbytes)
    name, value = next(iter(budgets.items()))
    if fraction is not None:
        checks.fraction(planner, f"a {name} of the bytes now", value, one=True)
        return int(value * total)
    if not (checks.is_number(value) and 0 < value <= 64):
        raise ValueError(
            f"{planner} takes bits per weight above 0 and at most 64, not "
            f"{name}={value!r}"
        )
    return int(value * weights / 8)
