"""Running an unmodified NNX model on compressed parameters.

Import it as `from jaxcompress.running import nnx`; the package itself does not, so that
only those who use NNX pay for it:

    params = nnx.params_of(module)
    ready = nnx.with_params(module, jc.compress(params, "symmetric(bits=8)"))
"""

from jaxcompress.tracing.modules_nnx import (
    CompressedParam,
    params_of,
    stored,
    with_params,
)

__all__ = ["CompressedParam", "params_of", "stored", "with_params"]
