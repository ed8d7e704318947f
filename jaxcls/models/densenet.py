"""Densely connected networks: DenseNet for CIFAR and ImageNet, with and without bottlenecks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    Conv,
    ConvNormAct,
    Style,
    as_input,
    avg_pool,
    check_fields,
    check_sizes,
    global_avg_pool,
    head,
    max_pool,
    norm_act,
    style_of,
)
from jaxcls.models.references import Reference
from jaxcls.registry import lookup

# Stems: images -> activations with `filters` channels.


def small_stem(x, filters, style, *, train):
    """A bare 3x3 convolution at full resolution, for images of about 32x32."""
    del train  # the first layer starts with the norm
    return Conv(filters, 3, style, name='stem')(x)


def large_stem(x, filters, style, *, train):
    """A 7x7 convolution, norm, activation and a 3x3 max pool: stride 4, for about 224x224."""
    x = ConvNormAct(filters, 7, style, stride=2, name='stem')(x, train=train)
    return max_pool(x, 3, 2, padding=1)


STEMS = {'small': small_stem, 'large': large_stem}


class DenseLayer(nn.Module):
    """x and what is new, [B, H, W, C] -> [B, H, W, C + growth_rate].

    Norm, activation and convolution, twice with a bottleneck. `DenseNet` documents the arguments.
    """

    growth_rate: int
    bottleneck: int
    dropout: float
    style: Style

    @nn.compact
    def __call__(self, x, *, train: bool):
        convs = [(self.growth_rate, 3)]
        if self.bottleneck:
            convs = [(self.bottleneck * self.growth_rate, 1), *convs]
        y = x
        for i, (features, size) in enumerate(convs, 1):
            y = norm_act(y, self.style, train=train, name=f'norm{i}')
            y = Conv(features, size, self.style, name=f'conv{i}')(y)
            y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Norm, activation, 1x1 convolution, average pool: [B, H, W, C] -> [B, H // 2, W // 2, features]."""

    features: int
    dropout: float
    style: Style

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = norm_act(x, self.style, train=train, name='norm')
        x = Conv(self.features, 1, self.style, name='conv')(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return avg_pool(x, 2, 2)


class DenseNet(nn.Module):
    """A densely connected network (Huang 2017): every layer of a stage reads all those before it.

    Stem, stages of layers with a transition between two of them, norm and activation, global
    average pool, linear layer.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem' (after its
    pool), 'stage1', ... (before the transition), 'final' (the last stage after norm and activation,
    which is what is pooled) and 'pooled'.

    Args:
      stage_sizes: layers in each stage.
      growth_rate: channels that a layer adds.
      num_filters: channels of the stem; published networks with bottlenecks have 2 * growth_rate.
      bottleneck: a 1x1 convolution to bottleneck * growth_rate channels comes before every 3x3; 0 is
        without ('B' in the paper is 4).
      compression: part of its channels that a transition keeps ('C' in the paper is 0.5).
      stem: 'small' (3x3, for 32x32) or 'large' (7x7 and pool, for 224x224).
      dropout: rate after every convolution but the first (the paper's, 0.2 without augmentation;
        torchvision has it after the 3x3 only).
      kernel_init: initialiser of the convolutions; `head_init` is that of the last layer.
    """

    num_classes: int = 10
    stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
    growth_rate: int = 32
    num_filters: int = 64
    bottleneck: int = 4
    compression: float = 0.5
    stem: str = 'large'
    activation: str = 'relu'
    norm: str = 'batch'
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    dropout: float = 0.0
    kernel_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        lookup(STEMS, self.stem, 'stem')
        check_sizes(stage_sizes=self.stage_sizes, stages=len(self.stage_sizes))
        check_sizes(growth_rate=self.growth_rate, num_filters=self.num_filters)
        require(self.bottleneck >= 0, 'bottleneck', self.bottleneck, 'at least 0')
        ok = 0 < self.compression <= 1
        require(ok, 'compression', self.compression, 'above 0 and at most 1')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style = style_of(self)
        x = as_input(images, self.dtype)
        x = STEMS[self.stem](x, self.num_filters, style, train=train)
        features = {'stem': x}
        for i, size in enumerate(self.stage_sizes, 1):
            if i > 1:
                kept = max(1, int(self.compression * x.shape[-1]))
                layer = Transition(kept, self.dropout, style, name=f'transition{i - 1}')
                x = layer(x, train=train)
            for j in range(1, size + 1):
                layer = DenseLayer(
                    self.growth_rate,
                    self.bottleneck,
                    self.dropout,
                    style,
                    name=f'stage{i}_layer{j}',
                )
                x = layer(x, train=train)
            features[f'stage{i}'] = x
        x = features['final'] = norm_act(x, style, train=train, name='final_norm')
        x = features['pooled'] = global_avg_pool(x)
        return head(x, self.num_classes, style, self.head_init), features


_CIFAR = {'stem': 'small', 'compression': 1.0, 'bottleneck': 0, 'num_filters': 16}

MODELS = {
    # On ImageNet; with stem='small' for CIFAR.
    'densenet121': DenseNet,
    'densenet161': partial(DenseNet, stage_sizes=(6, 12, 36, 24), growth_rate=48, num_filters=96),
    'densenet169': partial(DenseNet, stage_sizes=(6, 12, 32, 32)),
    'densenet201': partial(DenseNet, stage_sizes=(6, 12, 48, 32)),
    # On CIFAR, three stages: densenet_<depth>_<growth rate>, depth = 3 n + 4 with n layers a stage,
    # 6 n + 4 with bottlenecks.
    'densenet_40_12': partial(DenseNet, stage_sizes=(12, 12, 12), growth_rate=12, **_CIFAR),
    'densenet_bc_100_12': partial(
        DenseNet, stage_sizes=(16, 16, 16), growth_rate=12, num_filters=24, stem='small'
    ),
    'densenet_bc_190_40': partial(
        DenseNet, stage_sizes=(31, 31, 31), growth_rate=40, num_filters=80, stem='small'
    ),
}

_HUANG = 'Huang 2017, https://arxiv.org/abs/1608.06993'
_TV = 'torchvision IMAGENET1K_V1'
_ON_CIFAR = {'image_shape': (32, 32, 3), 'num_classes': 10, 'source': 'CIFAR-10, Huang 2017'}

REFERENCES = {
    'densenet121': Reference(_HUANG, 7_978_856, top1=74.43, source=_TV),
    'densenet161': Reference(_HUANG, 28_681_000, top1=77.14, source=_TV),
    'densenet169': Reference(_HUANG, 14_149_480, top1=75.6, source=_TV),
    'densenet201': Reference(_HUANG, 20_013_928, top1=76.9, source=_TV),
    'densenet_40_12': Reference(_HUANG, 1_019_722, **_ON_CIFAR, top1=94.76),
    'densenet_bc_100_12': Reference(_HUANG, 769_162, **_ON_CIFAR, top1=95.49),
    'densenet_bc_190_40': Reference(_HUANG, 25_624_430, **_ON_CIFAR, top1=96.54),
}

_NAMES = (
    (r'stem(?:/conv)?', lambda _: 'features.conv0'),
    (r'stem/norm', lambda _: 'features.norm0'),
    (
        r'stage(\d+)_layer(\d+)/(conv|norm)(\d)',
        lambda _, s, n, kind, k: f'features.denseblock{s}.denselayer{n}.{kind}{k}',
    ),
    (r'transition(\d+)/(conv|norm)', lambda _, s, kind: f'features.transition{s}.{kind}'),
    (r'final_norm', lambda _: 'features.norm5'),
    (r'head', lambda _: 'classifier'),
)
NAMES = {'torchvision': _NAMES, 'timm': _NAMES}
