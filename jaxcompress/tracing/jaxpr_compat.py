"""Differences between versions of JAX in a traced program."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core


def bind(eqn: Any, values: Sequence) -> list:
    """Return the results of one operation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # Older versions (0.7.2) return functions to call with the parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def closed_of(jaxpr: Any) -> Any:
    """Return an inner program with its constants: remat holds it without."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr
    return core.ClosedJaxpr(jaxpr, ())


def called(eqn: Any) -> Any:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return closed_of(eqn.params[key])
    return None


def scan_sizes(params: Mapping[str, Any], count: int) -> tuple[int, int]:
    """Return how many operands of a scan are constants and carries; the rest is
    scanned.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From jax 0.12 the operands' structure replaces them.
    consts, carry, _ = params["ft_in"].update(range(count)).unpack()
    return len(list(consts)), len(list(carry))


def is_vmapped(eqn: Any) -> bool:
    """Return whether `vmap` made this operation, by the names that JAX gives for
    profiles.
    """
    source = getattr(eqn, "source_info", None)
    return "vmap(" in str(getattr(source, "name_stack", ""))
