"""The classic convolutional networks: LeNet-5."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import UserError
from jaxcls.models.layers import (
    POOLS,
    ConvNormAct,
    DenseNormAct,
    as_input,
    check_fields,
    check_sizes,
    head,
    style_of,
)
from jaxcls.models.references import Reference


class LeNet(nn.Module):
    """LeNet-5 (LeCun 1998) with every map of C3 connected, a softmax, and sizes to choose.

    The defaults take 28x28 images, padded by 2 to the 32x32 of the paper: 61,706 parameters. For
    32x32 images of one channel, `padding=(0, 0)` gives the same network. `activation='tanh',
    pool='avg'` is closest to the paper. For 8x8 images see 'lenet_small' in MODELS.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'conv1', ...
    (before pooling), 'hidden1', ... and 'pooled' (what the last layer reads).

    Args:
      filters: channels of the convolutions, each followed by a 2x2 pool.
      padding: zeros on each side, one number a convolution.
      hidden: widths of the fully connected layers.
      dropout: rate after each fully connected layer but the last.
      head_init: initialiser of the last layer; `kernel_init` is that of the others.
    """

    num_classes: int = 10
    filters: tuple[int, ...] = (6, 16)
    kernel_size: int = 5
    padding: tuple[int, ...] = (2, 0)
    hidden: tuple[int, ...] = (120, 84)
    pool: str = 'max'
    activation: str = 'relu'
    norm: str = 'none'
    dropout: float = 0.0
    kernel_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        check_sizes(filters=self.filters, hidden=self.hidden, kernel_size=self.kernel_size)
        if len(self.padding) != len(self.filters) or min(self.padding, default=0) < 0:
            raise UserError(
                f'padding={self.padding} with filters={self.filters}: expected one number of at '
                'least 0 for each convolution.'
            )

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        x = as_input(images, self.dtype)
        for i, (width, padding) in enumerate(zip(self.filters, self.padding, strict=True), 1):
            layer = ConvNormAct(width, self.kernel_size, style, padding=padding, name=f'conv{i}')
            x = features[f'conv{i}'] = layer(x, train=train)
            x = POOLS[self.pool](x, 2, 2)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            x = DenseNormAct(width, style, self.dropout, name=f'hidden{i}')(x, train=train)
            features[f'hidden{i}'] = x
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


MODELS = {
    'lenet5': LeNet,
    # For images as small as 8x8 (scikit-learn's digits).
    'lenet_small': partial(
        LeNet, filters=(32, 64), kernel_size=3, padding=(1, 1), hidden=(128,), norm='batch'
    ),
}

_LECUN_1998 = 'LeCun 1998, doi:10.1109/5.726791'
REFERENCES = {
    'lenet5': Reference(_LECUN_1998, 61_706, (28, 28, 1), 10, 99.05, 'MNIST, LeCun 1998'),
    'lenet_small': Reference(_LECUN_1998, 53_226, (8, 8, 1), 10),
}
