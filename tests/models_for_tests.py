"""Small unmodified models, and leaf types of a user's own, that several tests share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxcompress as jc

WIDTH, HEADS, ROWS = 16, 2, 32


@jc.leaf
class Rounded(jc.Leaf):
    """Integer codes times a scale per output: `[..., inputs, outputs]`."""

    codes: jax.Array
    scale: jax.Array  # [..., 1, outputs]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def materialize(self) -> jax.Array:
        return self.codes.astype(self.dtype) * self.scale


@jc.method()
def rounded(x: jax.Array, moments: Any = None, *, levels: int = 127) -> Rounded:
    """Round to `levels` steps on either side of zero, per output."""
    del moments
    scale = jnp.max(jnp.abs(x), axis=-2, keepdims=True) / levels
    scale = jnp.where(scale > 0, scale, 1)
    return Rounded(jnp.round(x / scale).astype(jnp.int8), scale)


@jc.leaf
class Product(jc.Leaf):
    """A product of two weights, `[..., inputs, rank]` and `[..., rank, outputs]`."""

    left: Any
    right: Any

    weights = ("left", "right")

    def inner_moments(self, field: str, moments: Any) -> Any:
        return moments if field == "left" else None

    def materialize(self) -> jax.Array:
        left, right = (
            x.materialize() if isinstance(x, jc.Leaf) else x
            for x in (self.left, self.right)
        )
        return left @ right


@jc.method()
def product(x: jax.Array, moments: Any = None) -> Product:
    """The weight times the identity: exact, and as wide as it is."""
    del moments
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return Product(x, jnp.broadcast_to(eye, x.shape[:-2] + eye.shape))


class Block(nn.Module):
    """Attention, an einsum and a feed-forward part, each added to its input."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="norm")(x)
        attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")
        x = x + attention(y, y)
        y = nn.Einsum((WIDTH, WIDTH), "btd,df->btf", name="mix")(x)
        x = x + nn.Dense(WIDTH, name="down")(nn.Dense(2 * WIDTH, name="up")(nn.gelu(y)))
        return x, None


class Language(nn.Module):
    """Embed, blocks (`kind`: loop, scan, remat, scan_remat), Conv, tied head."""

    kind: str = "loop"
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(ROWS, WIDTH, name="embed")
        x = embed(tokens)
        block = nn.remat(Block) if "remat" in self.kind else Block
        if "scan" not in self.kind:
            for layer in range(self.layers):
                x, _ = block(name=f"block_{layer}")(x)
        else:
            stacked = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = stacked(name="blocks")(x, None)
        x = x + nn.Conv(WIDTH, (3,), name="conv")(x)
        x = nn.DenseGeneral((HEADS, WIDTH // HEADS), name="split")(x)
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(x)
        return embed.attend(x)


class Ensemble(nn.Module):
    """Three Dense layers under `nn.vmap`, averaged."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        many = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=3,
        )
        return many(WIDTH, name="many")(x).mean(0)


TOKENS = jnp.arange(12).reshape(2, 6) % ROWS


def language(kind: str) -> tuple[Language, Any]:
    """The model and its parameters, the same weights for every kind."""
    loop = Language()
    params = jax.jit(loop.init)(jax.random.key(0), TOKENS)["params"]
    if "scan" in kind:
        layers = [params.pop(f"block_{layer}") for layer in range(2)]
        params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return Language(kind), params


def layouts(params: Any) -> dict[str, jc.Layout]:
    """Which axes of each kernel of a test model are what."""
    found = {}
    for name in jc.leaf_names(params):
        inputs, outputs = (0,), (1,)
        if name.endswith(
            ("query/kernel", "key/kernel", "value/kernel", "split/kernel")
        ):
            outputs = (1, 2)
        elif name.endswith(("out/kernel", "join/kernel", "conv/kernel")):
            inputs, outputs = (0, 1), (2,)
        elif not name.endswith("kernel"):
            continue
        stack = name.startswith(("blocks/", "many/", "layers/"))
        found[name] = jc.Layout(
            (0,) if stack else (),
            tuple(axis + stack for axis in inputs),
            tuple(axis + stack for axis in outputs),
        )
    return found
