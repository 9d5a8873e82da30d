"""Static fields of leaves as JSON: numbers, strings, dtypes, tuples of these."""

import dataclasses
import types
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = frozenset(
    (
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
        *("uint2", "uint4", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        "float4_e2m1fn",
    )
)


def check_static(name: str, field: dataclasses.Field, value: Any) -> None:
    if not _is_static(value):
        raise TypeError(
            f"{name} is {value!r} of {type(value)}; static fields are int, float, str, "
            "bool, None, a dtype, or tuples of these"
        )
    if not _conforms(value, field.type):
        raise TypeError(f"{name} is {value!r}; its leaf type declares {field.type}")


def _is_static(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_static, value))
    return (
        isinstance(value, np.dtype)
        or value is None
        or type(value) in (int, float, str, bool)
    )


def _conforms(value: Any, hint: Any) -> bool:
    """Return whether a static value is of its annotated type; unknown annotations
    pass.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if hint is tuple or origin is tuple:
        if type(value) is not tuple:
            return False
        if len(inner) == 2 and inner[1] is ...:
            return all(_conforms(each, inner[0]) for each in value)
        fits = not inner or len(inner) == len(value)
        return fits and all(map(_conforms, value, inner))
    if hint is np.dtype:
        return isinstance(value, np.dtype)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, str, bool):
        return type(value) is hint
    return value is None if hint in (None, types.NoneType) else True


def to_json(value: Any) -> Any:
    if type(value) is tuple:
        return [to_json(each) for each in value]
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    finite = type(value) is not float or np.isfinite(value)
    return value if finite else {"float": repr(value)}


def from_json(value: Any) -> Any:
    if type(value) is list:
        return tuple(from_json(each) for each in value)
    match value:
        case {"dtype": str(name)} if name in DTYPES:
            return jnp.dtype(name)
        case {"float": "nan" | "inf" | "-inf" as number}:
            return float(number)
    return value
