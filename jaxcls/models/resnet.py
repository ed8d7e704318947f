"""Residual networks: for CIFAR and ImageNet, ResNet-D, pre-activation, wide."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.models.layers import (
    ACTIVATIONS,
    Conv,
    ConvNormAct,
    Style,
    as_input,
    avg_pool,
    check_fields,
    check_sizes,
    drop_path,
    drop_path_rates,
    global_avg_pool,
    head,
    max_pool,
    norm_act,
    style_of,
)
from jaxcls.registry import lookup

# Stems: images -> activations with `filters` channels. With pre-activation the first block starts
# with the norm, so there the stem ends in a bare convolution.


def _stem_conv(x, filters, kernel_size, stride, style, *, train, bare, name):
    if bare:
        return Conv(filters, kernel_size, style, stride=stride, name=name)(x)
    return ConvNormAct(filters, kernel_size, style, stride=stride, name=name)(x, train=train)


def small_stem(x, filters, style, *, train, bare):
    """A 3x3 convolution at full resolution, for images of about 32x32."""
    return _stem_conv(x, filters, 3, 1, style, train=train, bare=bare, name='stem')


def large_stem(x, filters, style, *, train, bare):
    """A 7x7 convolution and a 3x3 max pool, both of stride 2, for images of about 224x224."""
    x = _stem_conv(x, filters, 7, 2, style, train=train, bare=bare, name='stem')
    return max_pool(x, 3, 2, padding=1)


def deep_stem(x, filters, style, *, train, bare):
    """Three 3x3 convolutions in place of the 7x7 (ResNet-C and -D of He 2019)."""
    half = max(1, filters // 2)
    x = ConvNormAct(half, 3, style, stride=2, name='stem1')(x, train=train)
    x = ConvNormAct(half, 3, style, name='stem2')(x, train=train)
    x = _stem_conv(x, filters, 3, 1, style, train=train, bare=bare, name='stem3')
    return max_pool(x, 3, 2, padding=1)


STEMS = {'small': small_stem, 'large': large_stem, 'deep': deep_stem}

# Branches: (width, stride) -> ((features, kernel size, stride) of each convolution). A bottleneck
# has its stride in the 3x3 (version 1.5), not in the first 1x1 as in He 2015.
BRANCHES = {
    'basic': lambda width, stride: ((width, 3, stride), (width, 3, 1)),
    'bottleneck': lambda width, stride: ((width, 1, 1), (width, 3, stride), (4 * width, 1, 1)),
}


# Shortcuts, where the stride or the number of channels changes: [B, H, W, C] -> [B, H', W', F].


def pad_shortcut(x, features, stride, _style, *, train, bare):
    """He 2015, option A: every stride-th pixel, zeros for the new channels; no parameters."""
    del train, bare
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def projection_shortcut(x, features, stride, style, *, train, bare):
    """He 2015, option B: a 1x1 convolution (and a norm, except with pre-activation)."""
    if bare:
        return Conv(features, 1, style, stride=stride, name='shortcut')(x)
    layer = ConvNormAct(features, 1, style, stride=stride, act=False, name='shortcut')
    return layer(x, train=train)


def pool_shortcut(x, features, stride, style, *, train, bare):
    """He 2019 (ResNet-D): an average pool in place of the stride, so that no pixel is dropped."""
    if stride > 1:
        x = avg_pool(x, stride, stride, partial=True)
    return projection_shortcut(x, features, 1, style, train=train, bare=bare)


SHORTCUTS = {'pad': pad_shortcut, 'projection': projection_shortcut, 'pool': pool_shortcut}


class Block(nn.Module):
    """x + branch(x), [B, H, W, C] -> [B, H', W', F], then the activation (He 2015).

    `ResNet` documents the arguments of the same names.
    """

    branch: str
    width: int
    stride: int
    shortcut: str
    style: Style
    zero_init_residual: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        convs = BRANCHES[self.branch](self.width, self.stride)
        y = x
        for i, (features, size, stride) in enumerate(convs, 1):
            last = i == len(convs)
            if last:
                y = nn.Dropout(self.dropout)(y, deterministic=not train)
            layer = ConvNormAct(
                features,
                size,
                self.style,
                stride=stride,
                act=not last,
                zero=last and self.zero_init_residual,
                name=f'conv{i}',
            )
            y = layer(y, train=train)
        if x.shape != y.shape:
            shortcut = SHORTCUTS[self.shortcut]
            x = shortcut(x, y.shape[-1], self.stride, self.style, train=train, bare=False)
        x = x + drop_path(y, self.drop_path, train=train)
        return ACTIVATIONS[self.style.activation](x)


class PreactivationBlock(Block):
    """x + branch(x) with norm and activation before each convolution (He 2016).

    Where the shape changes, the shortcut reads the first activation, as the branch does.
    """

    @nn.compact
    def __call__(self, x, *, train: bool):
        convs = BRANCHES[self.branch](self.width, self.stride)
        y = activated = norm_act(x, self.style, train=train, name='norm1')
        for i, (features, size, stride) in enumerate(convs, 1):
            last = i == len(convs)
            if i > 1:
                y = norm_act(y, self.style, train=train, name=f'norm{i}')
            if last:
                y = nn.Dropout(self.dropout)(y, deterministic=not train)
            kernel_init = 'zeros' if last and self.zero_init_residual else None
            layer = Conv(
                features, size, self.style, stride=stride, kernel_init=kernel_init, name=f'conv{i}'
            )
            y = layer(y)
        if x.shape != y.shape:
            shortcut = SHORTCUTS[self.shortcut]
            x = shortcut(activated, y.shape[-1], self.stride, self.style, train=train, bare=True)
        return x + drop_path(y, self.drop_path, train=train)


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks, global average pool, linear layer.

    He 2015 (CIFAR and ImageNet), He 2016 (`preactivation`), He 2019 (stem 'deep', shortcut 'pool':
    ResNet-D), Zagoruyko 2016 (`preactivation`, `width`, `dropout`: WRN).

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem' (after its
    pool), 'stage1', ... and 'pooled'; with pre-activation also 'final' (the last stage after norm
    and activation, which is what is pooled).

    Args:
      stage_sizes: blocks in each stage. Every stage but the first starts with stride 2.
      branch: 'basic' (3x3, 3x3) or 'bottleneck' (1x1, 3x3, 1x1 with four times the channels).
      num_filters: channels of the stem, and of stage 1 before `width`; they double at each stage.
      width: factor on the channels of all stages, not of the stem.
      stem: 'small' (3x3, for 32x32), 'large' (7x7 and pool, for 224x224) or 'deep' (ResNet-D).
      shortcut: where the shape changes: 'pad' (option A), 'projection' (option B) or 'pool'
        (ResNet-D).
      zero_init_residual: start every block as its shortcut (Goyal 2017).
      dropout: rate before the last convolution of every block.
      drop_path: rate of dropping the branch of the last block; from the first block on it grows
        linearly.
      kernel_init: initialiser of the convolutions (He's, with fan_out); `head_init` is that of the
        last layer.
    """

    num_classes: int = 10
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    branch: str = 'basic'
    num_filters: int = 64
    width: int = 1
    stem: str = 'large'
    shortcut: str = 'projection'
    preactivation: bool = False
    zero_init_residual: bool = False
    activation: str = 'relu'
    norm: str = 'batch'
    dropout: float = 0.0
    drop_path: float = 0.0
    kernel_init: str = 'he_normal_fan_out'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        lookup(BRANCHES, self.branch, 'branch')
        lookup(STEMS, self.stem, 'stem')
        lookup(SHORTCUTS, self.shortcut, 'shortcut')
        check_sizes(stage_sizes=self.stage_sizes, stages=len(self.stage_sizes))
        check_sizes(num_filters=self.num_filters, width=self.width)

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, bare = style_of(self), self.preactivation
        block = PreactivationBlock if self.preactivation else Block
        rates = iter(drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        x = as_input(images, self.dtype)
        x = STEMS[self.stem](x, self.num_filters, style, train=train, bare=bare)
        features = {'stem': x}
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                x = block(
                    branch=self.branch,
                    width=self.num_filters * self.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    shortcut=self.shortcut,
                    style=style,
                    zero_init_residual=self.zero_init_residual,
                    dropout=self.dropout,
                    drop_path=next(rates),
                    name=f'stage{i + 1}_block{j + 1}',
                )(x, train=train)
            features[f'stage{i + 1}'] = x
        if self.preactivation:
            x = features['final'] = norm_act(x, style, train=train, name='final_norm')
        x = features['pooled'] = global_avg_pool(x)
        return head(x, self.num_classes, style, self.head_init), features
