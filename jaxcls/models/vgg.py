"""VGG: stages of 3x3 convolutions and max pools, then fully connected layers."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    ConvNormAct,
    DenseNormAct,
    adaptive_avg_pool,
    as_input,
    check_fields,
    check_sizes,
    head,
    style_of,
)
from jaxcls.models.references import Reference, flattened


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each followed by a 2x2 max pool (Simonyan 2015).

    There is no choice of a stem: the first convolutions are as small as all others. Images of 32x32
    end as 1x1 maps, for which the published head, made for 7x7, is far too large:
    `pool_size=1, hidden=(512,)` fits (15.0M parameters for 'vgg16_bn'). The pools are one a stage,
    so that four stages, `stage_sizes=(2, 2, 3, 3), widths=(64, 128, 256, 512), pool_size=2`, keep 2x2.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stage1', ...
    (before pooling), 'hidden1', ... and 'pooled' (what the last layer reads).

    Args:
      stage_sizes: convolutions in each stage.
      widths: their channels, one number a stage.
      hidden: widths of the fully connected layers.
      pool_size: height and width that the last maps are averaged to, as torchvision does. (timm slides
        the first fully connected layer over larger maps instead, and differs there.)
      norm: after the convolutions only, which keep their biases (so the published weights with batch
        norm, torchvision's and timm's, have it).
      dropout: rate after each fully connected layer but the last.
      kernel_init: initialiser of all but the last layer, which has `head_init`. The default, He's,
        replaces the paper's start from a shallower trained network.
    """

    num_classes: int = 10
    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: tuple[int, ...] = (4096, 4096)
    pool_size: int = 7
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
        check_sizes(stage_sizes=self.stage_sizes, stages=len(self.stage_sizes))
        check_sizes(widths=self.widths, hidden=self.hidden, pool_size=self.pool_size)
        matching = len(self.widths) == len(self.stage_sizes)
        require(matching, 'widths', self.widths, f'{len(self.stage_sizes)} numbers, one a stage')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        x = as_input(images, self.dtype)
        for i, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), 1):
            for j in range(1, size + 1):
                fields = {'use_bias': True, 'pool': (2, 2) if j == size else None}
                layer = ConvNormAct(width, 3, style, **fields, name=f'stage{i}_conv{j}')
                x = layer(x, train=train)
            features[f'stage{i}'], x = x
        x = adaptive_avg_pool(x, self.pool_size)
        x = x.reshape(x.shape[0], -1)
        bare = dataclasses.replace(style, norm='none')
        for i, width in enumerate(self.hidden, 1):
            x = DenseNormAct(width, bare, self.dropout, name=f'hidden{i}')(x, train=train)
            features[f'hidden{i}'] = x
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


_BN = {'norm': 'batch'}

MODELS = {
    'vgg11': partial(VGG, stage_sizes=(1, 1, 2, 2, 2)),
    'vgg13': partial(VGG, stage_sizes=(2, 2, 2, 2, 2)),
    'vgg16': partial(VGG, stage_sizes=(2, 2, 3, 3, 3)),
    'vgg19': partial(VGG, stage_sizes=(2, 2, 4, 4, 4)),
    'vgg11_bn': partial(VGG, stage_sizes=(1, 1, 2, 2, 2), **_BN),
    'vgg13_bn': partial(VGG, stage_sizes=(2, 2, 2, 2, 2), **_BN),
    'vgg16_bn': partial(VGG, stage_sizes=(2, 2, 3, 3, 3), **_BN),
    'vgg19_bn': partial(VGG, stage_sizes=(2, 2, 4, 4, 4), **_BN),
}

_SIMONYAN = 'Simonyan 2015, https://arxiv.org/abs/1409.1556'
_TV = 'torchvision IMAGENET1K_V1'
REFERENCES = {
    'vgg11': Reference(_SIMONYAN, 132_863_336, top1=69.02, source=_TV),
    'vgg13': Reference(_SIMONYAN, 133_047_848, top1=69.93, source=_TV),
    'vgg16': Reference(_SIMONYAN, 138_357_544, top1=71.59, source=_TV),
    'vgg19': Reference(_SIMONYAN, 143_667_240, top1=72.38, source=_TV),
    'vgg11_bn': Reference(_SIMONYAN, 132_868_840, top1=70.37, source=_TV),
    'vgg13_bn': Reference(_SIMONYAN, 133_053_736, top1=71.59, source=_TV),
    'vgg16_bn': Reference(_SIMONYAN, 138_365_992, top1=73.36, source=_TV),
    'vgg19_bn': Reference(_SIMONYAN, 143_678_248, top1=74.22, source=_TV),
}


def _features(offset):
    """Names in one list of convolutions, their norms if any, activations and pools."""

    def name(layout, stage, i):
        per_conv = 3 if layout.has('stage1_conv1/norm') else 2
        before = sum(layout.model.stage_sizes[: stage - 1]) + i - 1
        return f'features.{per_conv * before + stage - 1 + offset}'

    return name


def _linear(layout, i):
    """The i-th fully connected layer; the first reads the flattened maps."""
    return f'classifier.{3 * i - 3}', flattened(layout.model.pool_size if i == 1 else 1)


def _pointwise(layout, i):
    """timm's: a convolution over the maps, a 1x1 one after it."""
    return f'pre_logits.fc{i}', flattened(layout.model.pool_size if i == 1 else 1, True)


_FEATURES = (
    (r'stage(\d+)_conv(\d+)/conv', _features(0)),
    (r'stage(\d+)_conv(\d+)/norm', _features(1)),
)
NAMES = {
    'torchvision': (
        *_FEATURES,
        (r'hidden(\d+)/dense', _linear),
        (r'head', lambda layout: _linear(layout, len(layout.model.hidden) + 1)),
    ),
    'timm': (
        *_FEATURES,
        (r'hidden([12])/dense', _pointwise),
        (r'head', lambda _: 'head.fc'),
    ),
}
