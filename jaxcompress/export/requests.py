"""Requests of an export: checked, and applied to one leaf after the other."""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.export.named_leaves import NamedLeaf, apply_method, is_compressed
from jaxcompress.models.transformer import Transformer
from jaxcompress.tree.methods import parse
from jaxcompress.tree.names import match
from jaxcompress.types import DType


def check_model(model: Any, context: int) -> None:
    """Raise TypeError for a model of another class, ValueError for its context."""
    if not isinstance(model, Transformer):
        raise TypeError(
            f"exports take a jaxcompress.models.Transformer, not a "
            f"{type(model).__name__}: other programs know architectures by name. Put "
            "its parameters into a Transformer with jc.tree.rename, or write any model "
            "with export.stablehlo"
        )
    checks.integer("an export", "context (of tokens)", context)


def float_dtype(dtype: DType | None) -> np.dtype | None:
    """Return the dtype that was asked for, or None.

    Raises ValueError for what is no floating-point dtype.
    """
    if dtype is None:
        return None
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or not jnp.issubdtype(parsed, jnp.floating):
        raise ValueError(
            f"dtype must be a floating-point dtype, such as 'bfloat16', or None for "
            f"that of each weight, not {dtype!r}"
        )
    return parsed


class Changes(NamedTuple):
    """Leaves to be written dense, and to be requantized by what."""

    dense: re.Pattern | None
    requantize: tuple[tuple[re.Pattern, Any], ...]

    @classmethod
    def of(cls, dense: str | None, requantize: Sequence[tuple[str, Any]]) -> "Changes":
        """Check what the caller passed.

        Raises:
          ValueError: an invalid pattern, rules of another form, or no method.
        """
        rules = []
        if isinstance(requantize, str):
            raise ValueError(
                f"requantize takes (pattern, method) pairs, not {requantize!r}: pass "
                f"[('.*/kernel', {requantize!r})]"
            )
        for rule in requantize:
            if isinstance(rule, str) or len(rule) != 2:
                raise ValueError(
                    f"requantize takes (pattern, method) pairs, not {rule!r}"
                )
            where, method = rule
            method = parse(method) if isinstance(method, str) else method
            rules.append((_pattern("requantize", where), method))
        dense_ = None if dense is None else _pattern("dense", dense)
        return cls(dense_, tuple(rules))

    def check_names(self, names: Collection[str]) -> None:
        """Raise ValueError for a pattern that matches none of the names."""
        patterns = [where for where, _ in self.requantize]
        patterns += [] if self.dense is None else [self.dense]
        for pattern in patterns:
            match(pattern, names)

    def apply(self, leaf: NamedLeaf) -> tuple[NamedLeaf, float]:
        """Return the leaf as it is written, and the relative error that this adds."""
        if not is_compressed(leaf.value):
            return leaf, 0.0
        if self.dense is not None and self.dense.fullmatch(leaf.name):
            return leaf._replace(value=leaf.value.materialize()), 0.0
        for where, method in self.requantize:
            if where.fullmatch(leaf.name):
                value, error = apply_method(leaf.value, method)
                return leaf._replace(value=value), error
        return leaf, 0.0


def _pattern(option: str, text: Any) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{option}: {text!r} is not a regular expression: {error}"
        ) from error
