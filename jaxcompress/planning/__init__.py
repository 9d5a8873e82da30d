"""Planners: one budget in, one recipe of Python numbers out."""

from jaxcompress.planning.bits import plan_bits
from jaxcompress.planning.ranks import plan_ranks
from jaxcompress.planning.rates import plan_rates

__all__ = ["plan_bits", "plan_ranks", "plan_rates"]
