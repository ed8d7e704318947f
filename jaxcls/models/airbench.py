"""The airbench networks: small ones that learn CIFAR-10 in seconds (Jordan 2024)."""

import math
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcls.errors import require
from jaxcls.models.convolutions import convolve
from jaxcls.models.layers import (
    ACTIVATIONS,
    NORMS,
    Conv,
    Style,
    add_bias,
    as_input,
    check_fields,
    check_sizes,
    check_window,
    head,
    init,
    max_pool,
    style_of,
)
from jaxcls.models.references import Reference


def patch_covariance(images: np.ndarray, size: int) -> np.ndarray:
    """The covariance of all patches of `size` by `size` pixels in images [N, H, W, C].

    Returns:
      float64 [D, D], D = size * size * C, in the order of a kernel's [h, w, C].
    """
    count, total, moment = 0, 0.0, 0.0
    for part in np.array_split(images, math.ceil(len(images) / 500)):
        windows = np.lib.stride_tricks.sliding_window_view(part, (size, size), axis=(1, 2))
        patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size * size * images.shape[3])
        patches = patches.astype(np.float64)
        count += len(patches)
        total += patches.sum(0)
        moment += patches.T @ patches
    mean = total / count
    return moment / count - np.outer(mean, mean)


def whitening_filters(covariance: np.ndarray, epsilon: float) -> np.ndarray:
    """Filters as columns, [D, 2 D]: the eigenvectors, and their negatives, which an activation needs.

    An eigenvector of variance v is divided by sqrt(v + epsilon); the largest v comes first. What
    the first D make of patches has the identity as covariance, but for epsilon.
    """
    variances, vectors = np.linalg.eigh(covariance)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    filters = vectors * np.sign(largest) / np.sqrt(variances + epsilon)
    return np.concatenate([filters, -filters], 1)


def _white_init(key, shape, dtype):
    """As if patches were white already: an orthogonal matrix and its negative."""
    size = math.prod(shape[:-1])
    half = init.orthogonal()(key, (size, size))
    return jnp.concatenate([half, -half], 1).reshape(shape).astype(dtype)


class Whiten(nn.Module):
    """A frozen convolution [B, H, W, C] -> [B, H - size + 1, W - size + 1, 2 * size * size * C].

    Its kernel is named 'whitening', which is not decayed; the bias learns.
    """

    size: int
    style: Style

    @nn.compact
    def __call__(self, x):
        style, size, channels = self.style, self.size, x.shape[-1]
        check_window(x, (size, size), (0, 0), 'convolution')
        shape = (size, size, channels, 2 * size * size * channels)
        kernel = self.param('whitening', _white_init, shape, style.param_dtype)
        bias = self.param('bias', init.zeros, shape[-1:], style.param_dtype)
        kernel = jax.lax.stop_gradient(kernel).astype(style.dtype)
        return add_bias(convolve(x, kernel, 1, (0, 0)), bias.astype(style.dtype))


class Group(nn.Module):
    """3x3 convolutions, each with a norm without scale and an activation; the first has a 2x2 pool.

    [B, H, W, C] -> [B, H // 2, W // 2, features]. `AirBench` documents the fields.
    """

    features: int
    depth: int
    residual: bool
    style: Style
    sum_first: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool):
        style, first = self.style, None
        fields = {'use_scale': False, 'dtype': style.dtype, 'param_dtype': style.param_dtype}
        for i in range(1, self.depth + 1):
            x = Conv(self.features, 3, style, name=f'conv{i}')(x)
            if i == 1:
                x = max_pool(x, 2, 2)
            x = NORMS[style.norm](self.features, train, style, name=f'norm{i}', **fields)(x)
            last = self.residual and i == self.depth
            if last and self.sum_first:
                x = x + first
            x = ACTIVATIONS[style.activation](x)
            if last and not self.sum_first:
                x = x + first
            if i == 1:
                first = x
        return x


class AirBench(nn.Module):
    """Whitened patches, groups of 3x3 convolutions, a 3x3 max pool, a linear layer without bias.

    Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU". For images of about 32x32.

    Training starts at the filters that whiten `start_examples` of its images (`start_from_data`).

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem' (whitened,
    activated), 'stage1', ... and 'pooled'.

    Args:
      widths: channels of each group, which halves height and width.
      depth: convolutions in a group.
      residual: add a group's first activation to its last.
      sum_first: add it before the last activation is applied, as later versions do.
      whitening_size: height and width of the patches.
      whitening_epsilon: added to the variance along each eigenvector of the patches.
      logit_scale: factor on the logits.
      norm: without scale; without a norm the convolutions have biases.
      kernel_init: 'dirac' lets every convolution start by copying its input.
    """

    start_examples: ClassVar[int] = 5000

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 256, 256)
    depth: int = 2
    residual: bool = False
    sum_first: bool = False
    whitening_size: int = 2
    whitening_epsilon: float = 5e-4
    logit_scale: float = 1 / 9
    activation: str = 'gelu'
    norm: str = 'batch'
    norm_epsilon: float = 1e-12
    norm_momentum: float = 0.6
    kernel_init: str = 'dirac'
    head_init: str = 'pytorch_uniform'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        check_sizes(widths=self.widths, groups=len(self.widths), depth=self.depth)
        check_sizes(whitening_size=self.whitening_size)
        for field in ('whitening_epsilon', 'logit_scale'):
            value = getattr(self, field)
            require(0 < value < math.inf, field, value, 'more than 0 and finite')
        deep = self.depth > 1 or not self.residual
        require(deep, 'depth', self.depth, 'at least 2 with residual=True')
        used = self.residual or not self.sum_first
        require(used, 'sum_first', self.sum_first, 'False without residual=True')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style = style_of(self)
        x = as_input(images, self.dtype)
        x = Whiten(self.whitening_size, style, name='stem')(x)
        x = ACTIVATIONS[self.activation](x)
        features = {'stem': x}
        for i, width in enumerate(self.widths, 1):
            group = Group(width, self.depth, self.residual, style, self.sum_first, name=f'stage{i}')
            x = features[f'stage{i}'] = group(x, train=train)
        x = max_pool(x, 3, 3)
        x = features['pooled'] = x.reshape(x.shape[0], -1)
        logits = head(x, self.num_classes, style, self.head_init, use_bias=False)
        return self.logit_scale * logits, features

    @nn.nowrap
    def start_from_data(self, key, params, images, report):
        """`params` with the whitening kernel of these images: pure, the same on every device.

        Args:
          images: float [N, H, W, C] as the network will see them, normalised.
          key, report: not used.
        """
        del key, report
        stem = params['stem']
        covariance = patch_covariance(np.asarray(images), self.whitening_size)
        filters = whitening_filters(covariance, self.whitening_epsilon)
        kernel = jnp.asarray(filters.reshape(stem['whitening'].shape), stem['whitening'].dtype)
        return {**params, 'stem': {**stem, 'whitening': kernel}}


MODELS = {
    'airbench94': partial(AirBench, widths=(64, 256, 256)),
    # The paper's; its authors later made it narrower (`airbench96_faster` of experiments/speedrun_cifar.py).
    'airbench96': partial(AirBench, widths=(128, 512, 512), depth=3, residual=True),
}

_PAPER = 'Jordan 2024, https://arxiv.org/abs/2404.00498'
_CIFAR = {'image_shape': (32, 32, 3), 'num_classes': 10, 'source': 'CIFAR-10, Jordan 2024'}

REFERENCES = {
    'airbench94': Reference(_PAPER, 1_971_640, top1=94.01, **_CIFAR),
    'airbench96': Reference(_PAPER, 12_717_752, top1=96.05, **_CIFAR),
}
