"""A small convolutional network with batch norm, in plain Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.types import DType


class ConvNet(nn.Module):
    """Images [B, H, W, C] to logits [B, classes]: 3x3 convolutions, batch norm, ReLU.

    `filters` has one number per convolution; the image is halved (maximum over 2x2)
    after every second one. The mean over what is left of the image is the head's input.
    Its variables are "params" and "batch_stats"; with `train=True` the latter must be
    mutable: they become a moving average of each batch's statistics.

    Example:
      >>> network, images = jc.models.ConvNet(filters=(4, 8)), jnp.ones((2, 8, 8, 1))
      >>> jax.eval_shape(network.init_with_output, key, images)[0].shape
      (2, 10)
    """

    filters: tuple[int, ...] = (16, 32, 32, 64)
    classes: int = 10
    momentum: float = 0.9
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images
        for i, filters in enumerate(self.filters):
            # No bias: the norm that follows has one.
            x = nn.Conv(
                filters, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv_{i}"
            )(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=self.momentum,
                dtype=self.dtype,
                name=f"norm_{i}",
            )(x)
            x = nn.relu(x)
            if i % 2:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)
