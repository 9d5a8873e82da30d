"""Methods by name: registration, partial application, and recipes as strings."""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, cast, overload

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.types import Method, RegisteredMethod

# Names of integer formats elsewhere, with their bits, and values of options to show.
_FOREIGN = (
    r"u?int(\d+)",
    r"i?q(\d+)(?:_\w+)?",
    r"w(\d+)(?:a\d+)?",
    r"(?:bit|bits|b)(\d+)",
)
_EXAMPLES = {"bits": 4, "rate": 3.0, "sparsity": 0.5, "rank": 64}

# Types of second arguments that are no moments but options without a name.
_NO_MOMENTS = (bool, int, float, str, jax.Array, np.ndarray)

Selection = Literal["weights", "codes", "floats"]
Options = ParamSpec("Options")
Result = TypeVar("Result")
_METHODS: dict[str, Method] = {}


@dataclasses.dataclass(frozen=True)
class Traits:
    """Traits of a method, by which recipes select and apply it.

    `selects`: which leaves it takes as a whole recipe. "weights": kernels and
    embeddings, and the weights inside leaves in their place, of 4 096 elements or
    more; "codes": integer arrays inside leaves; "floats": every floating-point array.
    `traceable`: output shapes depend on shapes and options only, so it may be jitted.
    `data`: it reads moments, whether it needs them or not; others get None.
    `masked`: it takes the moments of pruned weights (`Masked`) too; others get None.
    `without_data`: the method that takes its place where inputs have no second moment;
    None: it needs none.
    """

    selects: Selection
    traceable: bool | Callable[[dict[str, Any]], bool]
    data: bool
    without_data: Any = None
    masked: bool = False


def precise(function: Callable[Options, Result]) -> Callable[Options, Result]:
    """Return the function with float32 products in float32.

    Accelerators round what they multiply, to 8 or 11 bits, unless they are told not to:
    good enough for a layer, not for a factorization of its moments.
    """

    @functools.wraps(function)
    def call(*args: Options.args, **options: Options.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return call


@overload
def method(
    function: Callable[Options, Result], /
) -> RegisteredMethod[Options, Result]: ...


@overload
def method(
    *,
    selects: Selection = ...,
    traceable: bool | Callable[[dict[str, Any]], bool] = ...,
    data: bool = ...,
    without_data: Callable[[dict[str, Any]], Method] | None = ...,
    masked: bool = ...,
) -> Callable[[Callable[Options, Result]], RegisteredMethod[Options, Result]]: ...


def method(
    function: Method | None = None,
    /,
    *,
    selects: Selection = "weights",
    traceable: bool | Callable[[dict[str, Any]], bool] = True,
    data: bool = False,
    without_data: Callable[[dict[str, Any]], Method] | None = None,
    masked: bool = False,
) -> Any:
    """Register `f(x, moments=None, *, options) -> leaf` under its name.

    The decorated function called without `x` returns a partial, so that
    `symmetric(bits=4)` is a recipe. Options are literals, since recipes are strings: a
    method that draws numbers takes `seed: int`, never a key, and sees neither the name
    of a leaf nor its index in a stack, so that equal matrices get equal draws.

    Args:
      function: given where the decorator has no parentheses.
      selects: which leaves it takes as a whole recipe. "weights": kernels and
        embeddings; "codes": integer arrays inside leaves; "floats": every
        floating-point array.
      traceable: whether shapes of the result depend on shapes and options only, or a
        function of the options that says so. A host method raises on tracers.
      data: whether it reads moments, required or not; without, it gets None.
      without_data: for a method that needs moments, `(options) -> method` of the same
        width or sparsity that needs none; the method's options as they were given.
      masked: whether it takes the weights that pruning left with `Masked` moments.

    Example:
      >>> @jc.method()
      ... def halved(x, moments=None, *, keep: float = 0.5):
      ...     return jc.magnitude(x / 2, sparsity=1 - keep)
      >>> small = jc.compress(params, "halved(keep=0.25)")
    """

    def register(
        function: Callable[Options, Result],
    ) -> RegisteredMethod[Options, Result]:
        name = function.__name__
        allowed = _options(function)
        first = list(inspect.signature(function).parameters.values())[:2]
        if len(first) < 2 or first[1].kind is first[1].KEYWORD_ONLY:
            raise TypeError(
                f"write {name}(x, moments=None, *, option=...): a method takes an "
                "array, its moments, and options by name"
            )
        precisely: Callable[..., Result] = precise(function)

        @functools.wraps(function)
        def call(x: Any = None, moments: Any = None, **options: Any) -> Any:
            _check_options(name, options, allowed)
            if x is None:
                return functools.partial(call, **options)
            if isinstance(moments, _NO_MOMENTS):
                raise TypeError(
                    f"the second argument of {name} is the moments of x, not a "
                    f"{type(moments).__name__}; options are given by name"
                )
            if missing := _missing(options, allowed):
                raise TypeError(_needs(name, missing))
            if _traced(x) and not _is_traceable(traceable, options):
                raise TypeError(
                    f"{name} is a host method: the shapes it returns depend on values, "
                    "so it can't run under jit, vmap or scan. Call it, or compress, "
                    "outside; what it returns runs inside"
                )
            return precisely(x, moments, **options)

        call.__dict__["traits"] = Traits(selects, traceable, data, without_data, masked)
        call.__dict__["__signature__"] = inspect.signature(function)
        if name in _METHODS and _METHODS[name].__module__ != function.__module__:
            raise ValueError(f"a method named {name} exists: {_METHODS[name]}")
        _METHODS[name] = call
        return cast(RegisteredMethod[Options, Result], call)

    return register if function is None else register(function)


def unwrap(f: Method) -> tuple[Method, dict[str, Any]]:
    """Return the function under partial applications, and the options they set."""
    options: dict[str, Any] = {}
    while isinstance(f, functools.partial):
        options = {**f.keywords, **options}
        f = f.func
    return f, options


def traits(f: Method) -> Traits:
    """Return the traits of a method, looked up through partials; a plain function's
    default.

    A function of the user's own counts as a host method on weights: it always works.
    """
    f, options = unwrap(f)
    declared = getattr(f, "traits", Traits("weights", traceable=False, data=True))
    instead = declared.without_data
    return dataclasses.replace(
        declared,
        traceable=_is_traceable(declared.traceable, options),
        without_data=None if instead is None else instead(options),
    )


def _is_traceable(
    traceable: bool | Callable[[dict[str, Any]], bool], options: dict[str, Any]
) -> bool:
    return traceable(options) if callable(traceable) else traceable


def only(options: dict[str, Any], *names: str, **defaults: Any) -> dict[str, Any]:
    """Return options of these names, as far as they are given; for `without_data`."""
    return defaults | {name: options[name] for name in names if name in options}


def with_default(f: Method, option: str, value: Any) -> Method:
    """Return the method with one option set, if it has that option and it is not set
    yet.
    """
    inner, options = unwrap(f)
    if option in options or option not in inspect.signature(inner).parameters:
        return f
    return functools.partial(f, **{option: value})


def describe(f: Method) -> str:
    """Return the string form of a method, `name(option=value, ...)`, which `parse`
    reads.
    """
    f, options = unwrap(f)
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{getattr(f, '__name__', type(f).__name__)}({inside})"


def parse(text: str) -> Method:
    """Return the method a string such as `"symmetric(bits=4, block=64)"` names.

    Values are Python literals; nothing is evaluated.

    Raises:
      ValueError: not of that form, or an unknown method or option; names known ones.
    """
    wrong = f"{text!r} is not a method; write name(option=value, ...)"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{wrong}, for instance 'symmetric(bits=4)'") from error
    call = node if isinstance(node, ast.Call) else None
    target = call.func if call else node
    keywords = call.keywords if call else []
    named = all(keyword.arg for keyword in keywords)
    if not isinstance(target, ast.Name) or not named or (call and call.args):
        raise ValueError(f"{wrong}; options are given by name")
    if target.id not in _METHODS:
        _import_public(target.id)
    if target.id not in _METHODS:
        _import_public()
        near = _elsewhere(target.id)
        hint = f"did you mean {near!r}? known: " if near else ""
        names = ", ".join(sorted(_METHODS)) if near else _known(target.id, _METHODS)
        raise ValueError(f"unknown method {target.id!r}; {hint}{names}")
    options: dict[str, Any] = {}
    for keyword in keywords:
        name = str(keyword.arg)
        if name in options:
            raise ValueError(f"{text!r}: {name} is given twice")
        try:
            options[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{wrong}; {name} is not a literal") from error
    options = _checked(target.id, options)
    if missing := _missing(options, _options(_METHODS[target.id])):
        raise ValueError(_needs(target.id, missing))
    return functools.partial(_METHODS[target.id](), **options)


def _elsewhere(name: str) -> str | None:
    """Return method that other programs call by a name such as int4, q4_0 or w4a16."""
    text = name.lower()
    bits = None
    for pattern in _FOREIGN:
        if match := re.fullmatch(pattern, text):
            bits = int(match[1])
            break
    if bits is None or not 2 <= bits <= 8:
        return None
    if bits == 8:
        return "symmetric(bits=8)"
    return f"symmetric(bits={bits}, block=32)"


def _import_public(name: str | None = None) -> None:
    """Import the public name that a string uses, or all, so that methods register."""
    package = importlib.import_module("jaxcompress")
    for each in [name] if name else package.__all__:
        getattr(package, each, None)


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    _check_options(name, options, _options(_METHODS[name]))
    return options


def _options(function: Method) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _check_options(name: str, options: dict[str, Any], allowed: dict) -> None:
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(
                f"{name} has no option {option!r}; {_known(option, allowed)}"
            )
        if isinstance(allowed[option].default, bool) and value not in (True, False):
            raise ValueError(f"{name} takes {option}=True or False, not {value!r}")


def _missing(options: dict[str, Any], allowed: dict) -> list[str]:
    """Return the options without a default that were not given."""
    return [
        name
        for name, parameter in allowed.items()
        if parameter.default is parameter.empty and name not in options
    ]


def _needs(name: str, missing: list[str]) -> str:
    example = ", ".join(f"{each}={_EXAMPLES.get(each, '...')}" for each in missing)
    return f"{name} needs {' and '.join(missing)}, for instance {name}({example})"


def _known(name: str | None, names: Any) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(sorted(names)) or 'none'}"


def _traced(x: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))
