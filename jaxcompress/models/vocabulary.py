"""A language model with fewer pieces: tokenizer, embedding and head together."""

import warnings
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from jaxcompress import tokenization
from jaxcompress.models.transformer import Transformer
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.types import Params


def trim_vocabulary(
    model: Transformer, params: Params, tokenizer: Tokenizer, keep: Iterable[int]
) -> tuple[Transformer, Params, Tokenizer]:
    """Return the model that knows only these pieces, and what they need, renumbered.

    Text encoded in kept pieces only is segmented as before (`tokenization.trim`) and
    has the same hidden states and the same logits of the kept pieces. Probabilities
    grow by a common factor, because those of dropped pieces are absent: the loss of a
    token falls by `-log(1 - p)` where they had `p`. To keep the loss what it was, keep
    the pieces that the model finds likely, too.

    Args:
      model: the model.
      params: its parameters, looped or stacked; embedding and head dense. Unchanged.
      tokenizer: of the model.
      keep: ids to keep; marks, symbols, bytes and parts of pieces stay besides.

    Raises:
      ValueError: where embedding or head are compressed (trim first, then compress), or
        the tokenizer has more ids than the model.

    Example:
      >>> keep = tokenizer.encode("a small text")
      >>> smaller = jc.models.trim_vocabulary(model, params, tokenizer, keep)
      >>> smaller[0].vocab_size < model.vocab_size
      True
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{model.vocab_size}; they do not belong together"
        )
    small, kept = tokenization.trim(tokenizer, keep)
    new = {**params, "embed": dict(params["embed"])}
    embedding = _dense("embed/embedding", params["embed"]["embedding"])
    new["embed"]["embedding"] = embedding[kept]
    if not model.tied:
        kernel = _dense("head/kernel", params["head"]["kernel"])
        new["head"] = {**params["head"], "kernel": kernel[:, kept]}
    return model.clone(vocab_size=len(kept)), new, small


def warn_of_rows(model: Any, tokenizer: Tokenizer | None, source: str) -> None:
    """Warn where a tokenizer has ids for which the model has no row."""
    if tokenizer is None or tokenizer.vocab_size <= model.vocab_size:
        return
    warnings.warn(
        f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model rows for "
        f"{model.vocab_size}: texts that have the ids from {model.vocab_size} on "
        "cannot be run. Replace the wrong file, or remove the tokens that were added",
        stacklevel=3,
    )


def _dense(name: str, x: Any) -> Any:
    if is_leaf(x):
        raise ValueError(
            f"{name} is a {type(x).__name__}; trim the vocabulary first, then "
            "compress, or materialize it"
        )
    return jnp.asarray(x)
