"""Maps of names: every parameter under its new name, or an error that names it."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.tree import rename

OLD = {
    "block_0": {"w": np.arange(12).reshape(2, 3, 2), "norm": np.zeros(3)},
    "block_10": {"w": 1 + np.arange(12).reshape(2, 3, 2), "norm": np.ones(3)},
    "table": np.arange(4),
}


def test_numbers_functions_and_parts():
    new = rename(
        OLD,
        {
            "embed/embedding": "table",
            "layer_{}/q/kernel": ("block_{}/w", lambda w: w[0]),
            "layer_{}/k/kernel": ("block_{}/w", lambda w: w[1]),
            "layer_{}/norm/scale": ("block_{}/norm", lambda x: x + 1),
        },
    )
    assert list(new) == ["embed", "layer_0", "layer_10"]
    for i in (0, 10):
        layer = new[f"layer_{i}"]
        np.testing.assert_array_equal(layer["q"]["kernel"], OLD[f"block_{i}"]["w"][0])
        np.testing.assert_array_equal(layer["k"]["kernel"], OLD[f"block_{i}"]["w"][1])
        np.testing.assert_array_equal(layer["norm"]["scale"], (i > 0) + np.ones(3))
    back = rename(
        new,
        {
            "table": "embed/embedding",
            "block_{}/w": ("layer_{}/q/kernel", "layer_{}/k/kernel", stacked),
            "block_{}/norm": ("layer_{}/norm/scale", lambda x: x - 1),
        },
    )
    for name in ("block_0", "block_10"):
        np.testing.assert_array_equal(back[name]["w"], OLD[name]["w"])
        np.testing.assert_array_equal(back[name]["norm"], OLD[name]["norm"])


def stacked(*parts):
    return np.stack(parts)


def test_compressed_leaves_go_along():
    x = jnp.arange(64.0).reshape(8, 8)
    small = jc.compress({"a": {"kernel": x}}, [(".*", "symmetric(bits=4)")])
    new = rename(small, {"b/kernel": "a/kernel"})
    assert new["b"]["kernel"] is small["a"]["kernel"]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"a": "tabel"}, r"a: params have no tabel; the nearest .* are table"),
        ({"a": "table"}, r"uses block_0/norm, block_0/w, .*block_10/w; add them, or"),
        ({"a_{}": "table"}, r"as many \{\} as each other, not a_\{\} 1, table 0"),
        ({"a": ("table", "table")}, "old names followed by a function"),
        ({"a": (len,)}, "old names followed by a function"),
        ({"a": ("table", 3)}, "old names followed by a function"),
        ({"a/{}": ("block_{}/w", "block_{}/v", stacked)}, "no block_0/v; the nearest"),
        ({"a": "table", "a/b": "table"}, "a/b is also the path to another"),
        ({"a/b": "table", "a": "table"}, "a is also the path to another"),
        ({"a/{}": "block_{}/w", "a/0": "table"}, "two entries of names give a/0"),
    ],
)  # fmt: skip
def test_bad_maps_are_named(names, match):
    drop = "block.*" if "path" in match else None
    with pytest.raises(ValueError, match=match):
        rename(OLD, names, drop=drop)


def test_what_is_dropped_is_asked_for():
    assert list(rename(OLD, {"a": "table"}, drop="block_.*")) == ["a"]
