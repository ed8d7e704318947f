"""The classic convolutional networks: LeNet-5, also exactly as in 1998, and AlexNet."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcls.errors import UserError, require
from jaxcls.models.convolutions import convolve
from jaxcls.models.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    POOLS,
    ConvNormAct,
    DenseNormAct,
    Style,
    adaptive_avg_pool,
    add_bias,
    as_input,
    avg_pool,
    check_fields,
    check_sizes,
    check_window,
    head,
    init,
    style_of,
)
from jaxcls.models.references import Reference, flattened
from jaxcls.registry import lookup


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
        fits = all(0 <= padding < 2**31 for padding in self.padding)
        if len(self.padding) != len(self.filters) or not fits:
            raise UserError(
                f'padding={self.padding} with filters={self.filters}: expected one number of at '
                'least 0, below 2^31, for each convolution.'
            )

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        x = as_input(images, self.dtype)
        for i, (width, padding) in enumerate(zip(self.filters, self.padding, strict=True), 1):
            pool, size = (2, 2) if self.pool == 'max' else None, self.kernel_size
            layer = ConvNormAct(width, size, style, 1, padding, pool=pool, name=f'conv{i}')
            x = layer(x, train=train)
            features[f'conv{i}'], x = x if pool else (x, POOLS[self.pool](x, 2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            x = DenseNormAct(width, style, self.dropout, name=f'hidden{i}')(x, train=train)
            features[f'hidden{i}'] = x
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


class PartialConv(nn.Module):
    """A convolution whose output maps read some of the input maps: [B, H, W, C] -> [B, H', W', F].

    Only the connections that exist have parameters: the kernel is [size, size, connections].

    Args:
      inputs: for each of the F output maps, the input maps that it reads.
    """

    inputs: tuple[tuple[int, ...], ...]
    kernel_size: int
    style: Style

    @nn.compact
    def __call__(self, x):
        style, size, outputs = self.style, self.kernel_size, len(self.inputs)
        check_window(x, (size, size), (0, 0), 'convolution')
        stored = self.param('kernel', self._draw, style.param_dtype).astype(style.dtype)
        bias = self.param('bias', init.zeros, (outputs,), style.param_dtype)
        places = np.array([i * outputs + o for o, maps in enumerate(self.inputs) for i in maps])
        kernel = jnp.zeros((size, size, x.shape[-1] * outputs), style.dtype)
        kernel = kernel.at[:, :, places].set(stored).reshape(size, size, -1, outputs)
        x = add_bias(convolve(x.astype(style.dtype), kernel, 1, (0, 0)), bias.astype(style.dtype))
        return ACTIVATIONS[style.activation](x)

    def _draw(self, key, dtype):
        # Map by map, because their fan-ins differ.
        kernel_init, size = INITIALIZERS[self.style.kernel_init], self.kernel_size
        keys = jax.random.split(key, len(self.inputs))
        kernels = [
            kernel_init(k, (size, size, len(maps), 1), dtype)[..., 0]
            for k, maps in zip(keys, self.inputs, strict=True)
        ]
        return jnp.concatenate(kernels, axis=-1)


class Subsampling(nn.Module):
    """activation(scale * sum of 2x2 pixels + bias), [B, H, W, C] -> [B, H / 2, W / 2, C].

    One scale and one bias a map, as in LeCun 1998.
    """

    style: Style

    @nn.compact
    def __call__(self, x):
        style, fan_in, channels = self.style, 4, x.shape[-1]
        scale = self.param('scale', self._draw, (fan_in, channels))
        bias = self.param('bias', init.zeros, (channels,), style.param_dtype)
        x = fan_in * avg_pool(x, 2, 2) * scale.astype(style.dtype) + bias.astype(style.dtype)
        return ACTIVATIONS[style.activation](x)

    def _draw(self, key, shape):
        return INITIALIZERS[self.style.kernel_init](key, shape, self.style.param_dtype)[0]


# LeCun 1998, table I: the maps of S2 that each map of C3 reads.
C3_INPUTS = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


class LeNet1998(nn.Module):
    """LeNet-5 as published (LeCun 1998), but for the output.

    C3 reads the maps of table I, subsampling is trained, and the activation 1.7159 tanh(2 x / 3)
    follows every layer: C1 156, S2 12, C3 1,516, S4 32, C5 48,120 and F6 10,164 parameters, the
    paper's 60,000. In place of its distances to bitmaps of the characters (RBF units) there is a
    linear layer, 850 more with 10 classes. Connections that C3 lacks are no parameters.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'c1', 's2', 'c3',
    's4', 'c5', 'f6' and 'pooled' (f6 again). The paper's images are 32x32 with a background of
    -0.1 and ink of 1.175, which is about mean 0 and variance 1.

    Args:
      padding: zeros on each side of the images: 2 makes 32x32 of 28x28.
      kernel_init: initialiser of all but the last layer, which has `head_init`; the default is the
        paper's, uniform within 2.4 / fan-in (here without the biases, which start at 0).
    """

    num_classes: int = 10
    padding: int = 2
    activation: str = 'scaled_tanh'
    kernel_init: str = 'lecun_1998'
    head_init: str = 'lecun_1998'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        require(self.padding >= 0, 'padding', self.padding, 'at least 0')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = dataclasses.replace(style_of(self), norm='none'), {}
        x = as_input(images, self.dtype)
        c1 = ConvNormAct(6, 5, style, padding=self.padding, name='c1')
        x = features['c1'] = c1(x, train=train)
        x = features['s2'] = Subsampling(style, name='s2')(x)
        x = features['c3'] = PartialConv(C3_INPUTS, 5, style, name='c3')(x)
        x = features['s4'] = Subsampling(style, name='s4')(x)
        x = x.reshape(x.shape[0], -1)
        for name, width in (('c5', 120), ('f6', 84)):
            x = features[name] = DenseNormAct(width, style, name=name)(x, train=train)
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


# Kernel size, stride and padding of the first convolution.
STEMS = {'large': (11, 4, 2), 'small': (3, 1, 1)}


class AlexNet(nn.Module):
    """AlexNet in one column (Krizhevsky 2014) with the widths of torchvision.

    Five convolutions, overlapping 3x3 max pools of stride 2 after the first, the second and the
    last, two hidden layers. Without the response normalisation and the two columns of Krizhevsky
    2012. See 'alexnet_small' in MODELS for 32x32 images.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'conv1', ...
    'conv5' (before pooling), 'hidden1', ... and 'pooled' (what the last layer reads).

    Args:
      widths: channels of the five convolutions.
      hidden: widths of the fully connected layers.
      pool_size: height and width that the last maps are averaged to, for images of any size.
      stem: the first convolution. 'large' is 11x11 with stride 4, for 224x224: maps of 55, 27, 13
        and 6. 'small' is 3x3 with stride 1, for 32x32: maps of 32, 15, 7 and 3.
      norm: after the convolutions only.
      dropout: rate in front of each fully connected layer but the last.
      head_init: initialiser of the last layer; `kernel_init` is that of the others.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 192, 384, 256, 256)
    hidden: tuple[int, ...] = (4096, 4096)
    pool_size: int = 6
    stem: str = 'large'
    activation: str = 'relu'
    norm: str = 'none'
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    dropout: float = 0.5
    kernel_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        lookup(STEMS, self.stem, 'stem')
        check_sizes(widths=self.widths, hidden=self.hidden, pool_size=self.pool_size)
        require(len(self.widths) == 5, 'widths', self.widths, 'five numbers')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        x = as_input(images, self.dtype)
        shapes = (STEMS[self.stem], (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        for i, (width, shape) in enumerate(zip(self.widths, shapes, strict=True), 1):
            size, stride, padding = shape
            pool = (3, 2) if i in (1, 2, 5) else None
            layer = ConvNormAct(width, size, style, stride, padding, pool=pool, name=f'conv{i}')
            x = layer(x, train=train)
            features[f'conv{i}'], x = x if pool else (x, x)
        x = adaptive_avg_pool(x, self.pool_size)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
            layer = DenseNormAct(width, dataclasses.replace(style, norm='none'), name=f'hidden{i}')
            x = features[f'hidden{i}'] = layer(x, train=train)
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


MODELS = {
    'lenet5': LeNet,
    # For images as small as 8x8 (scikit-learn's digits).
    'lenet_small': partial(
        LeNet, filters=(32, 64), kernel_size=3, padding=(1, 1), hidden=(128,), norm='batch'
    ),
    'lenet5_1998': LeNet1998,
    'alexnet': AlexNet,
    # For 32x32 images: the published convolutions but for the stem, smaller hidden layers.
    'alexnet_small': partial(AlexNet, stem='small', hidden=(512, 512), pool_size=3),
}

_LECUN_1998 = 'LeCun 1998, doi:10.1109/5.726791'
_KRIZHEVSKY_2014 = 'Krizhevsky 2014, https://arxiv.org/abs/1404.5997'
REFERENCES = {
    'lenet5': Reference(_LECUN_1998, 61_706, (28, 28, 1), 10, 99.05, 'MNIST, LeCun 1998'),
    'lenet_small': Reference(_LECUN_1998, 53_226, (8, 8, 1), 10),
    'lenet5_1998': Reference(_LECUN_1998, 60_850, (28, 28, 1), 10, 99.05, 'MNIST, LeCun 1998'),
    'alexnet': Reference(
        _KRIZHEVSKY_2014, 61_100_840, top1=56.52, source='torchvision IMAGENET1K_V1'
    ),
    'alexnet_small': Reference(_KRIZHEVSKY_2014, 3_896_138, (32, 32, 3), 10),
}

_PLACES = (0, 3, 6, 8, 10)  # of the convolutions among activations and pools


def _linear(layout, i):
    """The i-th fully connected layer; the first reads the flattened maps."""
    last = i > len(layout.model.hidden)
    name = f'classifier.{3 * i - 3 if last else 3 * i - 2}'
    return name, flattened(layout.model.pool_size if i == 1 else 1)


# Of AlexNet; the LeNets are in neither library.
NAMES = {
    'torchvision': (
        (r'conv(\d)/conv', lambda _, i: f'features.{_PLACES[i - 1]}'),
        (r'hidden(\d+)/dense', _linear),
        (r'head', lambda layout: _linear(layout, len(layout.model.hidden) + 1)),
    ),
}
