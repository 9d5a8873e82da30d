"""Array access on leaves: what a model asks of a weight that it reads past its layer.

A model that ties its head reads `variables["params"]["embed"]["embedding"].T`; an NNX
layer writes `x @ self.kernel`. A leaf answers with its dense array, by `unbox()`.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Attributes of an array that a leaf passes on. They are answered by `__getattr__`, so
# that a leaf type may have a field of the same name.
_NAMES = """
T mT real imag at all any argmax argmin argsort astype block_until_ready clip conj
conjugate copy cumprod cumsum diagonal dot flatten item itemsize max mean min
nonzero prod ptp ravel repeat reshape round sort squeeze std sum swapaxes take
tolist trace transpose var view
"""
PASSED_ON = frozenset(_NAMES.split())


def _one(function: Callable[..., Any]) -> Any:
    return lambda self: function(self.unbox())


def _two(function: Callable[..., Any]) -> Any:
    return lambda self, other: function(self.unbox(), _plain(other))


def _swapped(function: Callable[..., Any]) -> Any:
    return lambda self, other: function(jnp.asarray(_plain(other)), self.unbox())


def _plain(x: Any) -> Any:
    return x.unbox() if isinstance(x, ArrayAccess) else x


class ArrayAccess:
    """Operators and attributes of an array, answered by `unbox()`.

    Each access makes the whole array. `==` compares identity, as leaves are dictionary
    keys; compare `materialize()` for values.
    """

    __array_priority__ = 100  # NumPy arrays leave `array @ leaf` to the leaf

    def unbox(self) -> jax.Array:
        raise NotImplementedError

    def __jax_array__(self) -> jax.Array:
        return self.unbox()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.unbox(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_ON:
            return getattr(self.unbox(), name)
        if hasattr(type(self), name):  # a property that failed: let it say why
            return object.__getattribute__(self, name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def __getitem__(self, index: Any) -> jax.Array:
        return self.unbox()[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.unbox())

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return True  # a leaf is there; `__len__` must not decide

    __neg__, __pos__, __abs__ = map(_one, (operator.neg, operator.pos, operator.abs))
    __add__, __radd__ = _two(operator.add), _swapped(operator.add)
    __sub__, __rsub__ = _two(operator.sub), _swapped(operator.sub)
    __mul__, __rmul__ = _two(operator.mul), _swapped(operator.mul)
    __matmul__, __rmatmul__ = _two(operator.matmul), _swapped(operator.matmul)
    __truediv__, __rtruediv__ = _two(operator.truediv), _swapped(operator.truediv)
    __floordiv__, __rfloordiv__ = _two(operator.floordiv), _swapped(operator.floordiv)
    __mod__, __rmod__ = _two(operator.mod), _swapped(operator.mod)
    __pow__, __rpow__ = _two(operator.pow), _swapped(operator.pow)
    __lt__, __le__ = _two(operator.lt), _two(operator.le)
    __gt__, __ge__ = _two(operator.gt), _two(operator.ge)


def one_line(leaf: Any, description: str) -> str:
    """Describe a leaf in one line, `Type(576x1536, description, 0.44 MB)`; never
    raises, whatever the fields hold.
    """
    try:
        size = "x".join(map(str, leaf.shape))
        arrays = [x for x in jax.tree.leaves(leaf) if hasattr(x, "dtype")]
        held = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    except Exception:  # fields may hold placeholders, as in a printed treedef
        return f"{type(leaf).__name__}({description})"
    unit, scale = ("MB", 1e6) if held >= 10_000 else ("kB", 1e3)
    parts = (size, description, f"{held / scale:.2f} {unit}")
    return f"{type(leaf).__name__}({', '.join(filter(None, parts))})"
