"""A model to shrink, of whatever library: how it runs and how it is written."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.models import saved
from jaxcompress.models.loading import load
from jaxcompress.models.stacking import stack_layers
from jaxcompress.models.transformer import Transformer
from jaxcompress.storage import checkpoint
from jaxcompress.tracing.modules import NOT_INPUTS, model_function
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params

PER_LAYER = ("heads", "kv_heads", "mlp_width", "sliding_window")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its parameters, and the function `(params, batch) -> outputs`.

    `language`: outputs are next-token logits of `batch["tokens"]`, and the model can
    write. Other outputs are taken for logits over their last axis.
    """

    model: Any
    params: Params
    tokenizer: Any
    function: Callable[[Params, Any], Any]
    language: bool

    @property
    def weights(self) -> int:
        """Numbers in the dense parameters."""
        return sum(int(np.prod(x.shape)) for _, x in roots(self.params))

    def function_to_train(self) -> Callable[[Params, Any], Any]:
        """Return the function, for gradients: layers of ours run again on the way back.

        What a backward pass would keep of dequantized weights is several times the
        model; fresh memory for it costs more time than the layers do.
        """
        if not isinstance(self.model, Transformer):
            return self.function
        return model_function(self.model.clone(remat=True))

    def with_params(self, params: Params) -> Any:
        """Return the model to run with these parameters: a copy of an NNX module."""
        nnx = _nnx(self.model)
        return self.model if nnx is None else nnx.with_params(self.model, params)

    def save(self, path: str | Path, params: Params, metadata: Mapping) -> None:
        """Write parameters, and what a language model of ours needs to load."""
        if isinstance(self.model, Transformer):
            saved.save(path, self.model, params, self.tokenizer, metadata)
        else:
            checkpoint.save(path, params, metadata=metadata)


def read_subject(model: Any, params: Params = None, tokenizer: Any = None) -> Subject:
    """Find out what kind of model it is given.

    Args:
      model: a Linen module; an NNX module, which brings its parameters; a function of
        `(params, batch)`; or what `models.load` takes: a name or a path.
      params: pytree of dense arrays; None for an NNX module, a name or a path.
      tokenizer: of a language model; a loaded one brings its own.

    Raises:
      ValueError: parameters that are missing, or given twice.
      TypeError: a model of no known kind.
    """
    if isinstance(model, str | Path):
        if params is not None:
            raise ValueError(
                f"params were passed together with the path {str(model)!r}, which "
                "brings its own; pass the model, or leave params out"
            )
        model, params, own = load(model)
        tokenizer = own if tokenizer is None else tokenizer
        model, params = stacked(model, params)
    nnx = _nnx(model)
    if nnx is not None:
        own_params = params
        params = nnx.params_of(model) if own_params is None else own_params
        return Subject(model, params, tokenizer, _nnx_function(nnx, model), False)
    if params is None:
        raise ValueError(
            f"a {type(model).__name__} needs its params: shrink(model, params, ...); "
            "only NNX modules and paths bring their own"
        )
    language = isinstance(model, Transformer) and model.logits
    return Subject(model, params, tokenizer, model_function(model), language)


def stacked(model: Any, params: Params) -> tuple[Any, Params]:
    """Return scanned form of a looped Transformer, which compiles once for all layers.

    A model whose layers differ stays as it is.
    """
    if not isinstance(model, Transformer) or model.scan:
        return model, params
    layers = [getattr(model, field) for field in PER_LAYER]
    if any(isinstance(x, tuple) and len(set(x)) > 1 for x in layers):
        return model, params
    try:
        return model.clone(scan=True), stack_layers(params)
    except ValueError:  # layers of different structure
        return model, params


def _nnx(model: Any) -> Any:
    """Import `running.nnx` where the model is an NNX module, and only there."""
    flax_nnx = sys.modules.get("flax.nnx")
    if flax_nnx is None or not isinstance(model, flax_nnx.Module):
        return None
    return importlib.import_module("jaxcompress.running.nnx")


def _nnx_function(nnx: Any, model: Any) -> Callable[[Params, Any], Any]:
    def run(params: Params, batch: Any) -> Any:
        module = nnx.with_params(model, params)
        if not isinstance(batch, Mapping):
            return module(batch)
        inputs = {key: x for key, x in batch.items() if key not in NOT_INPUTS}
        if len(inputs) == 1:
            return module(*inputs.values())
        return module(**inputs)

    return run
