"""Feed-forward layers: gated, plain, and a mixture of gated experts."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.types import DType

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class MLP(nn.Module):
    """A feed-forward layer: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`."""

    width: int
    use_bias: bool
    dtype: DType
    activation: str = "silu"
    gated: bool = True

    @nn.compact
    def __call__(self, x):
        def dense(name, features):
            return nn.Dense(
                features, use_bias=self.use_bias, dtype=self.dtype, name=name
            )

        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate = act(dense("gate_proj", self.width)(x))
            hidden = gate * dense("up_proj", self.width)(x)
        else:
            hidden = act(dense("up_proj", self.width)(x))
        return dense("down_proj", x.shape[-1])(hidden)


class Stack(nn.Module):
    """Multiply by a kernel an expert: `[E, N, inputs] -> [E, N, outputs]`."""

    experts: int
    features: int
    dtype: DType

    @nn.compact
    def __call__(self, x):
        shape = (self.experts, x.shape[-1], self.features)
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        kernel = self.param("kernel", init, shape)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return jnp.einsum("end,edf->enf", x, kernel)


class Experts(nn.Module):
    """A mixture of gated experts: each token passes the `chosen` likeliest of them.

    A router scores the experts by a softmax over all; the scores of the chosen ones
    weight their outputs, scaled to add up to 1 where `normalized`. Every expert
    computes on all tokens, those of other experts set to zero, so that the work is
    `experts / chosen` times the least possible and each kernel's inputs are its own.
    Source: Fedus et al., 2021, arXiv 2101.03961; Qwen3-MoE in transformers.
    """

    width: int
    experts: int
    chosen: int
    normalized: bool
    dtype: DType
    activation: str = "silu"

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        router = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, name="router")
        scores = jax.nn.softmax(router(tokens).astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(scores, self.chosen)
        if self.normalized:
            top = top / top.sum(axis=-1, keepdims=True)
        hot = jax.nn.one_hot(chosen, self.experts, dtype=top.dtype)
        weights = jnp.sum(hot * top[..., None], axis=1).T[..., None]  # [E, N, 1]
        own = jnp.where(weights > 0, tokens[None], jnp.zeros((), tokens.dtype))

        def stack(name, features):
            return Stack(self.experts, features, self.dtype, name=name)

        gate = ACTIVATIONS[self.activation](stack("gate_proj", self.width)(own))
        hidden = gate * stack("up_proj", self.width)(own)
        out = stack("down_proj", x.shape[-1])(hidden)
        return jnp.sum(weights.astype(out.dtype) * out, axis=0).reshape(x.shape)
