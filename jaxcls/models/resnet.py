"""Residual networks: for CIFAR and ImageNet, ResNet-D, pre-activation, wide, ResNeXt, SE."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    ACTIVATIONS,
    ACTIVATIONS_OF_SUMS,
    Conv,
    ConvNormAct,
    SqueezeExcite,
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
from jaxcls.models.references import POINTWISE, Reference
from jaxcls.models.slices import every
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

# Branches: (width, inner, stride, groups) -> (features, kernel size, stride, groups) of each
# convolution. A bottleneck has its stride in the 3x3 (version 1.5), not in the first 1x1 as in He
# 2015; its 3x3 is grouped in ResNeXt.
BRANCHES = {
    'basic': lambda width, inner, stride, groups: (
        (inner, 3, stride, groups),
        (width, 3, 1, groups),
    ),
    'bottleneck': lambda width, inner, stride, groups: (
        (inner, 1, 1, 1),
        (inner, 3, stride, groups),
        (4 * width, 1, 1, 1),
    ),
}


# Shortcuts, where the stride or the number of channels changes: [B, H, W, C] -> [B, H', W', F].


def pad_shortcut(x, features, stride, _style, *, train, bare):
    """He 2015, option A: every stride-th pixel, zeros for the new channels; no parameters.

    Half of the zeros come before the old channels. It makes no difference to training, but public
    weights for CIFAR are of that order.
    """
    del train, bare
    x = every(x, stride)
    new = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


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


SHORTCUTS = {
    'pad': pad_shortcut,
    'projection': projection_shortcut,
    'pool': pool_shortcut,
    'none': None,
}


class Block(nn.Module):
    """x + branch(x), [B, H, W, C] -> [B, H', W', F], then the activation (He 2015).

    `ResNet` documents the arguments of the same names; `inner` is the width between the convolutions.
    """

    branch: str
    width: int
    inner: int
    stride: int
    shortcut: str
    style: Style
    groups: int = 1
    squeeze: int = 0
    zero_init_residual: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        convs = BRANCHES[self.branch](self.width, self.inner, self.stride, self.groups)
        y = x
        for i, (features, size, stride, groups) in enumerate(convs, 1):
            last = i == len(convs)
            if last:
                y = nn.Dropout(self.dropout)(y, deterministic=not train)
            layer = ConvNormAct(
                features,
                size,
                self.style,
                stride=stride,
                groups=groups,
                act=not last,
                zero=last and self.zero_init_residual,
                name=f'conv{i}',
            )
            y = layer(y, train=train)
        y = squeeze_excite(y, self.squeeze, self.style)
        if self.shortcut == 'none':
            return ACTIVATIONS[self.style.activation](y)
        if x.shape != y.shape:
            shortcut = SHORTCUTS[self.shortcut]
            x = shortcut(x, y.shape[-1], self.stride, self.style, train=train, bare=False)
        x = x + drop_path(y, self.drop_path, train=train)
        return ACTIVATIONS_OF_SUMS[self.style.activation](x)


class PreactivationBlock(Block):
    """x + branch(x) with norm and activation before each convolution (He 2016).

    Where the shape changes, the shortcut reads the first activation, as the branch does.
    """

    @nn.compact
    def __call__(self, x, *, train: bool):
        convs = BRANCHES[self.branch](self.width, self.inner, self.stride, self.groups)
        y = activated = norm_act(x, self.style, train=train, name='norm1')
        for i, (features, size, stride, groups) in enumerate(convs, 1):
            last = i == len(convs)
            if i > 1:
                y = norm_act(y, self.style, train=train, name=f'norm{i}')
            if last:
                y = nn.Dropout(self.dropout)(y, deterministic=not train)
            layer = Conv(
                features,
                size,
                self.style,
                stride=stride,
                groups=groups,
                kernel_init='zeros' if last and self.zero_init_residual else None,
                name=f'conv{i}',
            )
            y = layer(y)
        y = squeeze_excite(y, self.squeeze, self.style)
        if self.shortcut == 'none':
            return y
        if x.shape != y.shape:
            shortcut = SHORTCUTS[self.shortcut]
            x = shortcut(activated, y.shape[-1], self.stride, self.style, train=train, bare=True)
        return x + drop_path(y, self.drop_path, train=train)


def squeeze_excite(x, squeeze: int, style: Style):
    """`SqueezeExcite` at the end of a branch, or x itself where `squeeze` is 0."""
    if not squeeze:
        return x
    return SqueezeExcite(max(8, x.shape[-1] // squeeze), style, name='se')(x)


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks, global average pool, linear layer.

    He 2015 (CIFAR and ImageNet), He 2016 (`preactivation`), He 2019 (stem 'deep', shortcut 'pool':
    ResNet-D), Zagoruyko 2016 (`preactivation`, `width`, `dropout`: WRN), Xie 2017 (`groups`,
    `group_width`: ResNeXt), Hu 2018 (`squeeze`: SE-ResNet).

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
        (ResNet-D); 'none' has no shortcuts at all (the plain net of He 2015).
      groups: of a bottleneck's 3x3 convolution.
      group_width: channels of a group in stage 1, where they double at each stage as well; 0 shares
        the stage's width among the groups. With one group, it is the width inside the blocks.
      squeeze: factor by which squeeze-and-excitation reduces the channels at the end of a branch, to
        8 at least as in timm; 0 is without.
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
    groups: int = 1
    group_width: int = 0
    squeeze: int = 0
    zero_init_residual: bool = False
    activation: str = 'relu'
    norm: str = 'batch'
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
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
        check_sizes(num_filters=self.num_filters, width=self.width, groups=self.groups)
        grouped = self.branch == 'bottleneck' or self.groups == 1
        require(grouped, 'groups', self.groups, "1 but for branch='bottleneck'")
        channels = self.num_filters * self.width
        fits = self.group_width > 0 or channels % self.groups == 0
        expected = f'a divisor of num_filters * width = {channels}, or with group_width above 0'
        require(fits, 'groups', self.groups, expected)
        require(self.group_width >= 0, 'group_width', self.group_width, 'at least 0')
        require(self.squeeze >= 0, 'squeeze', self.squeeze, 'at least 0')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, bare = style_of(self), self.preactivation
        block = PreactivationBlock if self.preactivation else Block
        rates = iter(drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        x = as_input(images, self.dtype)
        x = STEMS[self.stem](x, self.num_filters, style, train=train, bare=bare)
        features = {'stem': x}
        for i, size in enumerate(self.stage_sizes):
            width = self.num_filters * self.width * 2**i
            for j in range(size):
                x = block(
                    branch=self.branch,
                    width=width,
                    inner=self.groups * self.group_width * 2**i or width,
                    groups=self.groups,
                    squeeze=self.squeeze,
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


_CIFAR = {'num_filters': 16, 'stem': 'small', 'shortcut': 'pad'}
_PREACT_CIFAR = {**_CIFAR, 'preactivation': True}
_WRN = {'num_filters': 16, 'stem': 'small', 'preactivation': True}
_BOTTLENECK = {'branch': 'bottleneck'}
_D = {'stem': 'deep', 'shortcut': 'pool', 'zero_init_residual': True}

MODELS = {
    # He 2015 on CIFAR: three stages, option A.
    'resnet20': partial(ResNet, stage_sizes=(3, 3, 3), **_CIFAR),
    'resnet32': partial(ResNet, stage_sizes=(5, 5, 5), **_CIFAR),
    'resnet44': partial(ResNet, stage_sizes=(7, 7, 7), **_CIFAR),
    'resnet56': partial(ResNet, stage_sizes=(9, 9, 9), **_CIFAR),
    'resnet110': partial(ResNet, stage_sizes=(18, 18, 18), **_CIFAR),
    # He 2015 on ImageNet; with stem='small' for CIFAR.
    'resnet18': partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    'resnet34': partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    'resnet50': partial(ResNet, stage_sizes=(3, 4, 6, 3), **_BOTTLENECK),
    'resnet101': partial(ResNet, stage_sizes=(3, 4, 23, 3), **_BOTTLENECK),
    'resnet152': partial(ResNet, stage_sizes=(3, 8, 36, 3), **_BOTTLENECK),
    # He 2019.
    'resnet18d': partial(ResNet, stage_sizes=(2, 2, 2, 2), **_D),
    'resnet34d': partial(ResNet, stage_sizes=(3, 4, 6, 3), **_D),
    'resnet50d': partial(ResNet, stage_sizes=(3, 4, 6, 3), **_D, **_BOTTLENECK),
    'resnet101d': partial(ResNet, stage_sizes=(3, 4, 23, 3), **_D, **_BOTTLENECK),
    # He 2016.
    'preact_resnet18': partial(ResNet, stage_sizes=(2, 2, 2, 2), preactivation=True),
    'preact_resnet50': partial(ResNet, stage_sizes=(3, 4, 6, 3), preactivation=True, **_BOTTLENECK),
    'preact_resnet20': partial(ResNet, stage_sizes=(3, 3, 3), **_PREACT_CIFAR),
    'preact_resnet110': partial(ResNet, stage_sizes=(18, 18, 18), **_PREACT_CIFAR),
    'preact_resnet164': partial(
        ResNet,
        stage_sizes=(18, 18, 18),
        **_PREACT_CIFAR | {'shortcut': 'projection'},
        **_BOTTLENECK,
    ),
    # Zagoruyko 2016: wrn<depth>_<width>, depth = 6 n + 4 with n blocks a stage.
    'wrn16_4': partial(ResNet, stage_sizes=(2, 2, 2), width=4, **_WRN),
    'wrn28_10': partial(ResNet, stage_sizes=(4, 4, 4), width=10, **_WRN),
    # Xie 2017: groups x channels of a group.
    'resnext50_32x4d': partial(
        ResNet, stage_sizes=(3, 4, 6, 3), groups=32, group_width=4, **_BOTTLENECK
    ),
    # Hu 2018.
    'se_resnet18': partial(ResNet, stage_sizes=(2, 2, 2, 2), squeeze=16),
    'se_resnet50': partial(ResNet, stage_sizes=(3, 4, 6, 3), squeeze=16, **_BOTTLENECK),
}

_HE_2015 = 'He 2015, https://arxiv.org/abs/1512.03385'
_HE_2016 = 'He 2016, https://arxiv.org/abs/1603.05027'
_HE_2019 = 'He 2019, https://arxiv.org/abs/1812.01187'
_ZAGORUYKO = 'Zagoruyko 2016, https://arxiv.org/abs/1605.07146'
_XIE = 'Xie 2017, https://arxiv.org/abs/1611.05431'
_HU = 'Hu 2018, https://arxiv.org/abs/1709.01507'
_TV = 'torchvision IMAGENET1K_V1'
_ON_CIFAR = {'image_shape': (32, 32, 3), 'num_classes': 10}

REFERENCES = {
    'resnet20': Reference(_HE_2015, 269_722, **_ON_CIFAR, top1=91.25, source='CIFAR-10, He 2015'),
    'resnet32': Reference(_HE_2015, 464_154, **_ON_CIFAR, top1=92.49, source='CIFAR-10, He 2015'),
    'resnet44': Reference(_HE_2015, 658_586, **_ON_CIFAR, top1=92.83, source='CIFAR-10, He 2015'),
    'resnet56': Reference(_HE_2015, 853_018, **_ON_CIFAR, top1=93.03, source='CIFAR-10, He 2015'),
    'resnet110': Reference(
        _HE_2015, 1_727_962, **_ON_CIFAR, top1=93.57, source='CIFAR-10, He 2015'
    ),
    'resnet18': Reference(_HE_2015, 11_689_512, top1=69.76, source=_TV),
    'resnet34': Reference(_HE_2015, 21_797_672, top1=73.31, source=_TV),
    'resnet50': Reference(_HE_2015, 25_557_032, top1=76.13, source=_TV),
    'resnet101': Reference(_HE_2015, 44_549_160, top1=77.37, source=_TV),
    'resnet152': Reference(_HE_2015, 60_192_808, top1=78.31, source=_TV),
    'resnet18d': Reference(_HE_2019, 11_708_744, top1=72.26, source='timm ra2_in1k'),
    'resnet34d': Reference(_HE_2019, 21_816_904, top1=77.11, source='timm ra2_in1k'),
    'resnet50d': Reference(_HE_2019, 25_576_264, top1=77.16, source='He 2019'),
    'resnet101d': Reference(_HE_2019, 44_568_392),
    'preact_resnet18': Reference(_HE_2016, 11_687_720),
    'preact_resnet50': Reference(_HE_2016, 25_549_352),
    'preact_resnet20': Reference(_HE_2016, 269_722, **_ON_CIFAR),
    'preact_resnet110': Reference(
        _HE_2016, 1_727_962, **_ON_CIFAR, top1=93.63, source='CIFAR-10, He 2016'
    ),
    'preact_resnet164': Reference(
        _HE_2016, 1_703_258, **_ON_CIFAR, top1=94.54, source='CIFAR-10, He 2016'
    ),
    'wrn16_4': Reference(
        _ZAGORUYKO, 2_748_890, **_ON_CIFAR, top1=94.98, source='CIFAR-10, Zagoruyko 2016'
    ),
    'wrn28_10': Reference(
        _ZAGORUYKO, 36_479_194, **_ON_CIFAR, top1=96.0, source='CIFAR-10, Zagoruyko 2016'
    ),
    'resnext50_32x4d': Reference(_XIE, 25_028_904, top1=77.62, source=_TV),
    'se_resnet18': Reference(_HU, 11_779_624),
    'se_resnet50': Reference(_HU, 28_088_024, top1=76.71, source='Hu 2018'),
}

_PLAIN_NAMES = (
    (r'stem/conv', lambda _: 'conv1'),
    (r'stem/norm', lambda _: 'bn1'),
    (r'stage(\d+)_block(\d+)/conv(\d)/conv', lambda _, s, b, k: f'layer{s}.{b - 1}.conv{k}'),
    (r'stage(\d+)_block(\d+)/conv(\d)/norm', lambda _, s, b, k: f'layer{s}.{b - 1}.bn{k}'),
    (r'stage(\d+)_block(\d+)/shortcut/conv', lambda _, s, b: f'layer{s}.{b - 1}.downsample.0'),
    (r'stage(\d+)_block(\d+)/shortcut/norm', lambda _, s, b: f'layer{s}.{b - 1}.downsample.1'),
    (r'head', lambda _: 'fc'),
)


def _shortcut(layout, stage, block, part):
    pool = layout.model.shortcut == 'pool'  # the first module of the shortcut of a ResNet-D
    return f'layer{stage}.{block - 1}.downsample.{pool + (part == "norm")}'


_TIMM_NAMES = (
    (r'stem1/conv', lambda _: 'conv1.0'),
    (r'stem1/norm', lambda _: 'conv1.1'),
    (r'stem2/conv', lambda _: 'conv1.3'),
    (r'stem2/norm', lambda _: 'conv1.4'),
    (r'stem3/conv', lambda _: 'conv1.6'),
    (r'stem3/norm', lambda _: 'bn1'),
    (r'stage(\d+)_block(\d+)/shortcut/(conv|norm)', _shortcut),
    (r'stage(\d+)_block(\d+)/se/reduce', lambda _, s, b: f'layer{s}.{b - 1}.se.fc1'),
    (r'stage(\d+)_block(\d+)/se/expand', lambda _, s, b: f'layer{s}.{b - 1}.se.fc2'),
)
_PREACTIVATION_NAMES = (  # timm's ResNetV2
    (r'stem', lambda _: 'stem.conv'),
    (
        r'stage(\d+)_block(\d+)/(conv|norm)(\d)',
        lambda _, s, b, kind, k: f'stages.{s - 1}.blocks.{b - 1}.{kind}{k}',
    ),
    (
        r'stage(\d+)_block(\d+)/shortcut',
        lambda _, s, b: f'stages.{s - 1}.blocks.{b - 1}.downsample.conv',
    ),
    (r'final_norm', lambda _: 'norm'),
    (r'head', lambda at: ('head.fc', POINTWISE) if at.model.preactivation else 'fc'),
)
_CIFAR_NAMES = (  # of the two PyTorch repositories most used for CIFAR
    (r'stage(\d+)_block(\d+)/shortcut/conv', lambda _, s, b: f'layer{s}.{b - 1}.shortcut.0'),
    (r'stage(\d+)_block(\d+)/shortcut/norm', lambda _, s, b: f'layer{s}.{b - 1}.shortcut.1'),
    (r'head', lambda _: 'linear'),
)
NAMES = {
    'torchvision': _PLAIN_NAMES,
    'timm': _TIMM_NAMES + _PREACTIVATION_NAMES + _PLAIN_NAMES,
    'cifar': _CIFAR_NAMES + _PLAIN_NAMES,
}
