"""`check` names the leaf that a model cannot take, and computes nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc

PARAMS = {
    name: {"kernel": jnp.eye(64) + jnp.float32(i)} for i, name in enumerate("abc")
}
BATCH = jax.ShapeDtypeStruct((2, 64), jnp.float32)  # so nothing can be computed


def fine(params, x):
    return x @ params["a"]["kernel"] @ params["b"]["kernel"].T @ params["c"]["kernel"]


def picky(params, x):
    assert not params["b"]["kernel"].weak_type  # leaves have no such attribute
    return fine(params, x)


def test_a_tree_that_runs_passes():
    assert jc.check(fine, jc.compress(PARAMS, "symmetric(bits=4)"), BATCH) is None


def test_the_leaf_that_fails_is_named():
    small = jc.compress(PARAMS, "symmetric(bits=4)")
    with pytest.raises(
        ValueError, match=r"b/kernel: .*cannot take a Quantized.*'weak_type'"
    ):
        jc.check(picky, small, BATCH)
    kept = jc.compress(PARAMS, [("[ac]/kernel", "symmetric(bits=4)")])
    assert jc.check(picky, kept, BATCH) is None


def test_a_model_that_fails_by_itself_says_so():
    small = jc.compress(PARAMS, "symmetric(bits=4)")
    with pytest.raises(TypeError, match="dot_general"):
        jc.check(fine, small, jax.ShapeDtypeStruct((2, 63), jnp.float32))


def test_a_dense_tree_is_warned_about():
    with pytest.warns(UserWarning, match=r"no compressed leaf.*tree\.unbox"):
        jc.check(fine, PARAMS, BATCH)


class Wrapped(nn.Module):
    norm: str

    @nn.compact
    def __call__(self, x):
        if self.norm == "spectral":
            return nn.SpectralNorm(nn.Dense(64))(x, update_stats=False)
        return nn.WeightNorm(nn.Dense(64))(x)


@pytest.mark.parametrize("norm", ["spectral", "weight"])
def test_a_norm_around_a_kernel_says_what_to_do(norm):
    model = Wrapped(norm)
    variables = model.init(jax.random.key(0), jnp.ones((2, 64)))
    params = variables.pop("params")
    layouts = jc.find_layouts(model, params, BATCH, variables=variables)
    # The power iteration, which no batch reaches, is no use of the kernel.
    assert layouts == {"Dense_0/kernel": jc.Layout((), (0,), (1,))}
    small = jc.compress(params, "symmetric(bits=4)", layouts=layouts)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: .*Fold the norm into"):
        jc.check(model, small, BATCH, variables=variables)


class Doubled(nn.Module):
    """A layer whose parameters are doubled, as a tree, before it reads them."""

    double: bool

    @nn.compact
    def __call__(self, x):
        change = lambda tree: jax.tree.map(lambda a: a * 2.0, tree)  # noqa: E731
        lifted = nn.map_variables(
            nn.Dense, "params", trans_in_fn=change, init=self.is_initializing()
        )
        return (lifted if self.double else nn.Dense)(64, name="layer")(x)


def test_factors_that_a_model_changes_as_a_tree_are_found():
    params = nn.Dense(64).init(jax.random.key(0), jnp.ones((2, 64)))["params"]
    small = jc.compress({"layer": params}, "svd(rank=4)")
    assert jc.check(Doubled(False), small, BATCH) is None
    with pytest.raises(ValueError, match=r"kernel: .*as a tree.*parts of a LowRank"):
        jc.check(Doubled(True), small, BATCH)
    with pytest.warns(UserWarning, match="parts of a LowRank"):
        jc.compress_blockwise(
            Doubled(True), {"layer": params}, "svd(rank=4)", [jnp.ones((2, 64))]
        )


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(64, name="dense")(x), None

        stack = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=2,
        )
        return stack(name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_factors_that_a_scan_slices_pass(axis):
    model = Scanned(axis)
    params = model.init(jax.random.key(0), jnp.ones((2, 64)))["params"]
    layouts = jc.find_layouts(model, params, BATCH)
    small = jc.compress(params, "svd(rank=4)", layouts=layouts)
    assert jc.check(model, small, BATCH) is None


def test_a_leaf_passed_to_lax_says_what_to_write():
    params = {"kernel": jnp.ones((64, 64))}
    small = jc.compress(params, "symmetric(bits=8)")
    with pytest.raises(ValueError, match=r"^kernel: .*jnp\.asarray\(weight\)"):
        jc.check(lambda p, x: jax.lax.dot(x, p["kernel"]), small, jnp.ones((2, 64)))
