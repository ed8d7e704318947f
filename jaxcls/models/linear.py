"""Networks without convolutions: softmax regression and the multilayer perceptron."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.models.layers import (
    DenseNormAct,
    as_input,
    check_fields,
    check_sizes,
    head,
    style_of,
)
from jaxcls.models.references import Reference


class SoftmaxRegression(nn.Module):
    """Logits that are linear in the pixels. Convex: it can start at zero.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'pooled'.
    """

    num_classes: int = 10
    kernel_init: str = 'zeros'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        del train
        x = as_input(images, self.dtype)
        x = x.reshape(x.shape[0], -1)
        return head(x, self.num_classes, style_of(self), self.kernel_init), {'pooled': x}


class MLP(nn.Module):
    """Hidden layers of linear, norm, activation and dropout (Srivastava 2014), then a linear one.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'hidden1', ... and
    'pooled' (the last of them).

    Args:
      hidden: widths of the hidden layers.
      skip: add its input to each layer that is as wide (He 2015, arXiv:1512.03385).
      head_init: initialiser of the last layer; `kernel_init` is that of the hidden ones.
    """

    num_classes: int = 10
    hidden: tuple[int, ...] = (512, 256)
    activation: str = 'relu'
    norm: str = 'none'
    dropout: float = 0.0
    skip: bool = False
    kernel_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        check_sizes(hidden=self.hidden)

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        x = as_input(images, self.dtype)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            y = DenseNormAct(width, style, self.dropout, name=f'hidden{i}')(x, train=train)
            x = x + y if self.skip and x.shape == y.shape else y
            features[f'hidden{i}'] = x
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


MODELS = {'linear': SoftmaxRegression, 'mlp': MLP}

_LECUN_1998 = 'LeCun 1998, doi:10.1109/5.726791'
REFERENCES = {
    'linear': Reference(_LECUN_1998, 7_850, (28, 28, 1), 10, 88.0, 'MNIST, LeCun 1998'),
    # Of this paper only the idea: with 300 and 100 units it had 96.95% (MNIST).
    'mlp': Reference(_LECUN_1998, 535_818, (28, 28, 1), 10, 96.95, 'MNIST, 300-100, LeCun 1998'),
}
