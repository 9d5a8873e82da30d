"""Trees with every dtype, container and kind of leaf, and whether two are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.storage import tree_json

RNG = np.random.default_rng(7)


@jc.leaf
class Labelled(jc.Leaf):
    """Every kind of static field, and an array that may be missing."""

    values: jax.Array
    shift: jax.Array | None
    sizes: tuple[tuple[int, ...], ...] = jc.static()
    label: str | None = jc.static()
    factor: float = jc.static()
    flag: bool = jc.static(default=True)

    def materialize(self):
        return self.values * self.factor


@jc.leaf
class Padded(jc.Leaf):
    """Keeps less in files than in memory."""

    values: jax.Array
    padding: jax.Array
    length: int = jc.static()

    @property
    def shape(self):
        return (*self.values.shape[:-1], self.length)

    @property
    def dtype(self):
        return self.values.dtype

    def materialize(self):
        return self.values[..., : self.length]

    def stored(self):
        return {"short": np.asarray(self.values)[..., : self.length]}

    @classmethod
    def restored(cls, arrays, static):
        short = arrays["short"]
        values = np.zeros((*short.shape[:-1], 8), short.dtype)
        values[..., : static["length"]] = short
        return cls(values, np.zeros(3, np.int8), **static)


def bits(dtype, shape=(3, 5)):
    """An array with any bits at all: NaN payloads, negative zeros, subnormals."""
    kind = jnp.dtype(dtype)
    if dtype == "bool" or kind.name.startswith(("int2", "int4", "uint2", "uint4")):
        return RNG.integers(0, 2, shape).astype(kind)
    if kind.name == "float4_e2m1fn":
        return RNG.integers(0, 16, shape, np.uint8).view(kind)
    return np.frombuffer(RNG.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(
        shape
    )


def on_device(dtype, shape=(3, 5)):
    return jax.device_put(bits(dtype, shape))


NARROW = sorted(d for d in tree_json.DTYPES if jnp.dtype(d).itemsize < 8)
WIDE = sorted(tree_json.DTYPES - set(NARROW) - {"complex64"})
reshaped = jc.Reshaped(on_device("float16", (2, 6)), (2, 2, 3), (-3, -1, -2))
TREES = {
    "dtypes": {
        d: [on_device(d), on_device(d, ()), on_device(d, (0, 2))] for d in NARROW
    },
    "wide": {d: (bits(d), bits(d, ()), bits(d, (2, 0))) for d in WIDE},
    "containers": {
        "b": [None, (), {}, (jnp.ones(2), [jnp.zeros(1)]), None],
        "a": {2: jnp.ones(1), 10: jnp.zeros(1)},
        "with/slash~and.dots ü": {"": jnp.ones(1), "with": {"slash": jnp.ones(2)}},
        "with": {"slash~and.dots ü": jnp.ones(3)},
    },
    "array": jnp.arange(3),
    "nothing": None,
    "leaf": reshaped,
    "nesting": {
        "mixed": jc.Mixed(
            on_device("bfloat16", (4, 1)),
            jc.Sum((on_device("float32", (4, 2)), on_device("float32", (4, 2)))),
            jnp.array([2, 0, 1]),
        ),
        "labelled": [
            Labelled(reshaped, None, ((1, 2), ()), None, float("-inf")),
            Labelled(jnp.ones(2), jnp.ones(1), (), "ü\n", 5e-324, False),
        ],
        "padded": Padded(jnp.arange(8.0).at[6:].set(0), jnp.zeros(3, jnp.int8), 6),
    },
    "half": jc.partition(
        {"a": jc.Reshaped(jnp.arange(4).reshape(2, 2), (2, 2), (-1, -2))}
    ),
}
trees = pytest.mark.parametrize("name", TREES)


def check_same(a, b):
    """Same structure, static fields, kinds of arrays, dtypes, shapes and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
