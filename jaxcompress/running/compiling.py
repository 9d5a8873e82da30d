"""Options of the compiler for models that dequantize their weights while they run."""

import functools

import jax
import jax.numpy as jnp

# Available from an XLA on which operations do not wait for their turn by default.
IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options() -> dict[str, str]:
    """Return options for `jax.jit` with which a CPU dequantizes a layer when its turn
    is there.

    By default newer XLA on CPUs dequantizes all layers of a looped model at once, into
    as much fresh memory as the float32 model takes. With these options a step of
    SmolLM2 in 8 bits has 108 MiB of temporaries (its head) in place of 517, outside
    of `low_memory` and `compressed_matmul`, which need no options.

    Returns:
      `{}` on other devices, and where XLA has no such option.

    Example:
      >>> options = jc.running.compiling.compiler_options()
      >>> forward = jax.jit(lambda p, b: model.apply(p, b), compiler_options=options)
    """
    on_cpu = jax.default_backend() == "cpu"
    return dict(IN_ORDER) if on_cpu and _is_option() else {}


@functools.cache
def _is_option() -> bool:
    """Check whether XLA takes them, by compiling a program of nothing."""
    program = jax.jit(lambda x: x, compiler_options=IN_ORDER)
    try:
        program.lower(jnp.zeros(())).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
