"""Inception networks: blocks of branches side by side. GoogLeNet (version 1) and Inception v3."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    ACTIVATIONS,
    POOLS,
    ConvNormAct,
    Style,
    adaptive_avg_pool,
    as_input,
    avg_pool,
    check_fields,
    check_sizes,
    dense,
    global_avg_pool,
    head,
    max_pool,
    style_of,
)
from jaxcls.models.references import Reference, flattened
from jaxcls.registry import lookup

# Blocks are data: {branch: its layers in a row}. A layer 'max' or 'avg' is a 3x3 pool, (64, 3) a 3x3
# convolution with 64 channels, and (384, (1, 3), (3, 1)) two with 384 each, side by side.
Block = Mapping[str, tuple]


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def run_branch(
    x, name: str, branch: tuple, stride: int, width: float, style: Style, *, train: bool
):
    """One branch of an `Inception` block, which documents the arguments."""
    for i, layer in enumerate(branch, 1):
        strided = stride > 1 and i == len(branch)
        step = stride if strided else 1
        if layer in POOLS:
            x = POOLS[layer](x, 3, step, 0 if strided else 1)
            continue
        features, *kernels = layer
        place = {'stride': step, 'padding': 0 if strided else None}
        sides = 'ab' if len(kernels) > 1 else ['']
        outputs = []
        for side, kernel in zip(sides, kernels, strict=True):
            size = (scaled(features, width), kernel)
            conv = ConvNormAct(*size, style, **place, name=f'{name}_{i}{side}')
            outputs.append(conv(x, train=train))
        x = jnp.concatenate(outputs, axis=-1)
    return x


class Inception(nn.Module):
    """Branches side by side: [B, H, W, C] -> [B, H', W', the sum of their channels].

    Args:
      block: the branches.
      width: factor on the channels.
      stride: of the last layer of every branch, which has no padding if it is above 1.
    """

    block: Block
    width: float
    style: Style
    stride: int = 1

    @nn.compact
    def __call__(self, x, *, train: bool):
        how = (self.stride, self.width, self.style)
        branches = self.block.items()
        outputs = [run_branch(x, name, branch, *how, train=train) for name, branch in branches]
        return jnp.concatenate(outputs, axis=-1)


class StemConv(NamedTuple):
    """A convolution before the blocks; `padding` as in `Conv`, `pool`: 3x3, stride 2, after it."""

    features: int
    kernel_size: int
    stride: int = 1
    padding: int | None = None
    pool: bool = False


def run_stem(x, convs: tuple[StemConv, ...], width, style, *, partial: bool, train: bool):
    """The layers before the blocks; `partial` as in `max_pool`."""
    for i, (features, size, stride, padding, pool) in enumerate(convs, 1):
        place = {'stride': stride, 'padding': padding, 'name': f'stem{i}'}
        x = ConvNormAct(scaled(features, width), size, style, **place)(x, train=train)
        if pool:
            x = max_pool(x, 3, 2, partial=partial)
    return x


def check(model: nn.Module, stems: Mapping[str, Any]):
    """Raises a UserError for fields out of range."""
    check_fields(model)
    lookup(stems, model.stem, 'stem')
    require(0 < model.width <= 1000, 'width', model.width, 'more than 0 and finite, at most 1000')
    weight = model.aux_weight
    require(0 <= weight < math.inf, 'aux_weight', weight, 'at least 0 and finite')


# GoogLeNet

V1_STEMS = {
    'large': (StemConv(64, 7, stride=2, pool=True), StemConv(64, 1), StemConv(192, 3, pool=True)),
    'small': (StemConv(64, 3), StemConv(64, 1), StemConv(192, 3)),
}
# Channels: 1x1; 1x1 and the 3x3 after it; 1x1 and the large kernel after it; 1x1 after the pool.
V1_BLOCKS = {
    '3a': (64, 96, 128, 16, 32, 32),
    '3b': (128, 128, 192, 32, 96, 64),
    '4a': (192, 96, 208, 16, 48, 64),
    '4b': (160, 112, 224, 24, 64, 64),
    '4c': (128, 128, 256, 24, 64, 64),
    '4d': (112, 144, 288, 32, 64, 64),
    '4e': (256, 160, 320, 32, 128, 128),
    '5a': (256, 160, 320, 32, 128, 128),
    '5b': (384, 192, 384, 48, 128, 128),
}
V1_POOLS = {'4a': 3, '5a': 2}  # before these blocks; the window, the stride is 2
V1_AUXILIARY = {'4a': 1, '4d': 2}  # after these blocks


def v1_block(channels: tuple[int, ...], large_kernel: int) -> Block:
    single, reduce3, conv3, reduce5, conv5, pooled = channels
    return {
        'branch1': ((single, 1),),
        'branch2': ((reduce3, 1), (conv3, 3)),
        'branch3': ((reduce5, 1), (conv5, large_kernel)),
        'branch4': ('max', (pooled, 1)),
    }


class V1Auxiliary(nn.Module):
    """An auxiliary head of GoogLeNet: [B, H, W, C] -> float32 logits [B, num_classes]."""

    num_classes: int
    width: float
    dropout: float
    head_init: str
    style: Style

    @nn.compact
    def __call__(self, x, *, train: bool):
        style = self.style
        x = adaptive_avg_pool(x, 4)
        x = ConvNormAct(scaled(128, self.width), 1, style, name='conv')(x, train=train)
        x = x.reshape(x.shape[0], -1)
        x = dense(x, scaled(1024, self.width), style, style.kernel_init, name='hidden')
        x = ACTIVATIONS[style.activation](x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return head(x, self.num_classes, style, self.head_init)


class GoogLeNet(nn.Module):
    """GoogLeNet, or Inception v1 (Szegedy 2015), as torchvision's: with batch norm.

    As published in 2014: `norm='none', large_kernel=5, dropout=0.4`, but for the two local response
    normalisations of its stem, which are left out, the 3x3 pool before block 5a, which is 2x2, and
    the average pools of its auxiliary heads, whose windows adapt to any size of image.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem', 'stage1'
    (blocks 3a and 3b), 'stage2' (4a to 4e), 'stage3' (5a and 5b), 'pooled' (after the dropout) and,
    in training only, 'aux_logits1' and 'aux_logits2', float32 [B, num_classes].

    torchvision's weights expect pixels scaled to [-1, 1]: config.data.mean and std are both
    (0.5, 0.5, 0.5), not ImageNet's. (Its `transform_input=True` turns the latter scale into the
    former.) Their auxiliary heads are untrained.

    Args:
      width: factor on the channels of all layers but the head.
      stem: 'large' (stride 8, for 224x224), or 'small' (for 32x32) with 3x3 for the 7x7 and without
        strides and pools; the last map is 7x7 and 8x8.
      large_kernel: size of each block's third convolution. The paper has 5; torchvision 3, after a
        slip in the port of its weights.
      aux_weight: of the auxiliary heads' losses, for the trainer to add (0.3 in the paper); 0 is
        without these heads.
      dropout: rate before the last layer; `aux_dropout` is that of the auxiliary heads.
      norm_epsilon: torchvision's.
      head_init: initialiser of the last layers, the auxiliary ones too; `kernel_init` is that of
        the others.
    """

    num_classes: int = 10
    width: float = 1.0
    stem: str = 'large'
    large_kernel: int = 3
    aux_weight: float = 0.3
    dropout: float = 0.2
    aux_dropout: float = 0.7
    activation: str = 'relu'
    norm: str = 'batch'
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.9
    kernel_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check(self, V1_STEMS)
        check_sizes(large_kernel=self.large_kernel)
        require(self.large_kernel % 2 == 1, 'large_kernel', self.large_kernel, 'odd')
        require(0 <= self.aux_dropout < 1, 'aux_dropout', self.aux_dropout, 'in [0, 1)')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, width = style_of(self), self.width
        with_auxiliary = self.aux_weight > 0 and (train or self.is_initializing())
        auxiliary_fields = {'num_classes': self.num_classes, 'head_init': self.head_init}
        auxiliary_fields |= {'width': width, 'style': style, 'dropout': self.aux_dropout}
        x = as_input(images, self.dtype)
        x = run_stem(x, V1_STEMS[self.stem], width, style, partial=True, train=train)
        features = {'stem': x}
        for name, channels in V1_BLOCKS.items():
            if name in V1_POOLS:
                x = max_pool(x, V1_POOLS[name], 2, partial=True)
            block = v1_block(channels, self.large_kernel)
            x = Inception(block, width, style, name=f'inception{name}')(x, train=train)
            features[f'stage{int(name[0]) - 2}'] = x
            if name in V1_AUXILIARY and with_auxiliary:
                i = V1_AUXILIARY[name]
                auxiliary = V1Auxiliary(**auxiliary_fields, name=f'aux{i}')
                features[f'aux_logits{i}'] = auxiliary(x, train=train)
        x = nn.Dropout(self.dropout)(global_avg_pool(x), deterministic=not train)
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


# Inception v3

V3_STEMS = {
    'large': (
        StemConv(32, 3, stride=2, padding=0),
        StemConv(32, 3, padding=0),
        StemConv(64, 3, pool=True),
        StemConv(80, 1),
        StemConv(192, 3, padding=0, pool=True),
    ),
    'small': (
        StemConv(32, 3),
        StemConv(32, 3),
        StemConv(64, 3),
        StemConv(80, 1),
        StemConv(192, 3),
    ),
}


def block_5(pooled: int) -> Block:
    """Figure 5 of Szegedy 2016, where one branch keeps its 5x5."""
    return {
        'branch1x1': ((64, 1),),
        'branch5x5': ((48, 1), (64, 5)),
        'branch3x3dbl': ((64, 1), (96, 3), (96, 3)),
        'branch_pool': ('avg', (pooled, 1)),
    }


def block_6(inner: int) -> Block:
    """Figure 6: 7x7 in the form of 1x7 and 7x1."""
    return {
        'branch1x1': ((192, 1),),
        'branch7x7': ((inner, 1), (inner, (1, 7)), (192, (7, 1))),
        'branch7x7dbl': (
            (inner, 1),
            (inner, (7, 1)),
            (inner, (1, 7)),
            (inner, (7, 1)),
            (192, (1, 7)),
        ),
        'branch_pool': ('avg', (192, 1)),
    }


_FIGURE_7 = {
    'branch1x1': ((320, 1),),
    'branch3x3': ((384, 1), (384, (1, 3), (3, 1))),
    'branch3x3dbl': ((448, 1), (384, 3), (384, (1, 3), (3, 1))),
    'branch_pool': ('avg', (192, 1)),
}
V3_BLOCKS = {
    '5b': block_5(32),
    '5c': block_5(64),
    '5d': block_5(64),
    '6a': {
        'branch3x3': ((384, 3),),
        'branch3x3dbl': ((64, 1), (96, 3), (96, 3)),
        'branch_pool': ('max',),
    },
    '6b': block_6(128),
    '6c': block_6(160),
    '6d': block_6(160),
    '6e': block_6(192),
    '7a': {
        'branch3x3': ((192, 1), (320, 3)),
        'branch7x7x3': ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
        'branch_pool': ('max',),
    },
    '7b': _FIGURE_7,
    '7c': _FIGURE_7,
}
V3_STRIDES = {'6a': 2, '7a': 2}


class V3Auxiliary(nn.Module):
    """The auxiliary head of Inception v3: [B, H, W, C] -> float32 logits [B, num_classes].

    Activations smaller than the published 17x17 are averaged to the 5x5 that its second convolution
    covers, as those are, but over smaller windows.
    """

    num_classes: int
    width: float
    head_init: str
    style: Style

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = adaptive_avg_pool(x, 5) if min(x.shape[1:3]) < 17 else avg_pool(x, 5, 3)
        x = ConvNormAct(scaled(128, self.width), 1, self.style, name='conv1')(x, train=train)
        layer = ConvNormAct(scaled(768, self.width), 5, self.style, padding=0, name='conv2')
        x = global_avg_pool(layer(x, train=train))
        return head(x, self.num_classes, self.style, self.head_init)


class InceptionV3(nn.Module):
    """Inception v3 (Szegedy 2016), as torchvision's and timm's.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem', 'stage1'
    (blocks 5b to 5d), 'stage2' (6a to 6e), 'stage3' (7a to 7c), 'pooled' (after the dropout) and, in
    training only, 'aux_logits1', float32 [B, num_classes].

    torchvision's weights, and timm's but for gluon_in1k, expect pixels scaled to [-1, 1]:
    config.data.mean and std are both (0.5, 0.5, 0.5), not ImageNet's. (torchvision's
    `transform_input=True` turns the latter scale into the former.)

    Args:
      width: factor on the channels of all layers but the head.
      stem: 'large' (stride 8, for 299x299, and 75x75 at least), or 'small' (for 32x32): the same
        convolutions padded and without strides and pools; the last map is 8x8 and 7x7.
      aux_weight: of the auxiliary head's loss, for the trainer to add; 0 is without it. The paper
        gives none, its authors' code (TensorFlow-Slim) 0.4.
      dropout: rate before the last layer; torchvision's. The authors' code has 0.2, timm 0.
      norm_epsilon: the authors', torchvision's and timm's.
      norm_momentum: torchvision's and timm's; the authors' code has 0.9997.
      head_init: initialiser of the last layers, the auxiliary one too; `kernel_init` is that of the
        others.
    """

    num_classes: int = 10
    width: float = 1.0
    stem: str = 'large'
    aux_weight: float = 0.4
    dropout: float = 0.5
    activation: str = 'relu'
    norm: str = 'batch'
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.9
    kernel_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check(self, V3_STEMS)

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, width = style_of(self), self.width
        x = as_input(images, self.dtype)
        x = run_stem(x, V3_STEMS[self.stem], width, style, partial=False, train=train)
        features = {'stem': x}
        for name, block in V3_BLOCKS.items():
            stride = V3_STRIDES.get(name, 1)
            x = Inception(block, width, style, stride, name=f'mixed{name}')(x, train=train)
            features[f'stage{int(name[0]) - 4}'] = x
        if self.aux_weight > 0 and (train or self.is_initializing()):
            auxiliary = V3Auxiliary(self.num_classes, width, self.head_init, style, name='aux')
            features['aux_logits1'] = auxiliary(features['stage2'], train=train)
        x = nn.Dropout(self.dropout)(global_avg_pool(x), deterministic=not train)
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features


MODELS = {'googlenet': GoogLeNet, 'inception_v3': InceptionV3}

_TV = 'torchvision IMAGENET1K_V1'
REFERENCES = {
    'googlenet': Reference(  # 6,624,904 without the auxiliary heads
        'Szegedy 2015, https://arxiv.org/abs/1409.4842', 13_004_888, top1=69.78, source=_TV
    ),
    'inception_v3': Reference(  # 23,834,568 without the auxiliary head; the paper has 78.8
        'Szegedy 2016, https://arxiv.org/abs/1512.00567',
        27_161_264,
        (299, 299, 3),
        top1=77.29,
        source=_TV,
    ),
}

_PARTS = {'conv': 'conv', 'norm': 'bn'}
V1_NAMES = {
    'torchvision': (
        (r'stem(\d)/(conv|norm)', lambda _, i, part: f'conv{i}.{_PARTS[part]}'),
        (
            r'inception(\w+)/branch1_1/(conv|norm)',
            lambda _, block, part: f'inception{block}.branch1.{_PARTS[part]}',
        ),
        (
            r'inception(\w+)/branch(\d)_(\d)/(conv|norm)',
            lambda _, block, b, i, part: f'inception{block}.branch{b}.{i - 1}.{_PARTS[part]}',
        ),
        (r'aux(\d)/conv/(conv|norm)', lambda _, i, part: f'aux{i}.conv.{_PARTS[part]}'),
        (r'aux(\d)/hidden', lambda _, i: (f'aux{i}.fc1', flattened(4))),
        (r'aux(\d)/head', lambda _, i: f'aux{i}.fc2'),
        (r'head', lambda _: 'fc'),
    )
}
_V3_STEM = ('1a_3x3', '2a_3x3', '2b_3x3', '3b_1x1', '4a_3x3')
_V3_ROWS = (
    (r'stem(\d)/(conv|norm)', lambda _, i, part: f'Conv2d_{_V3_STEM[i - 1]}.{_PARTS[part]}'),
    (  # branches with one convolution, which has no number
        r'mixed(\w+)/(branch1x1|branch_pool)_\d/(conv|norm)',
        lambda _, block, branch, part: f'Mixed_{block}.{branch}.{_PARTS[part]}',
    ),
    (r'mixed6a/branch3x3_1/(conv|norm)', lambda _, part: f'Mixed_6a.branch3x3.{_PARTS[part]}'),
    (
        r'mixed(\w+)/(branch\w+)/(conv|norm)',
        lambda _, block, layer, part: f'Mixed_{block}.{layer}.{_PARTS[part]}',
    ),
    (r'aux/conv(\d)/(conv|norm)', lambda _, i, part: f'AuxLogits.conv{i - 1}.{_PARTS[part]}'),
    (r'aux/head', lambda _: 'AuxLogits.fc'),
    (r'head', lambda _: 'fc'),
)
V3_NAMES = {'torchvision': _V3_ROWS, 'timm': _V3_ROWS}
