"""ConvNeXt: large depthwise convolutions in blocks that are built like a transformer's."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    ACTIVATIONS,
    Conv,
    Style,
    as_input,
    check_fields,
    check_sizes,
    dense,
    drop_path,
    drop_path_rates,
    global_avg_pool,
    head,
    init,
    norm_act,
    style_of,
)
from jaxcls.models.references import COLUMN, Reference
from jaxcls.registry import lookup

# The patch of each stem, which is its stride as well: 224, 64 and 32 pixels end as 7x7, 4x4 and 4x4.
STEMS = {'large': 4, 'medium': 2, 'small': 1}


class Block(nn.Module):
    """x + branch(x), [B, H, W, C] -> same: a 7x7 depthwise convolution, a norm, an inverted bottleneck.

    `ConvNeXt` documents the arguments of the same names.
    """

    style: Style
    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        style, channels = self.style, x.shape[-1]
        y = Conv(channels, 7, style, groups=channels, use_bias=True, name='depthwise')(x)
        y = norm_act(y, style, train=train, act=False, name='norm')
        y = dense(y, self.mlp_ratio * channels, style, style.kernel_init, name='expand')
        y = ACTIVATIONS[style.activation](y)
        y = dense(y, channels, style, style.kernel_init, name='project')
        if self.layer_scale:
            start = init.constant(self.layer_scale)
            scale = self.param('layer_scale', start, (channels,), style.param_dtype)
            y = y * scale.astype(style.dtype)
        return x + drop_path(y, self.drop_path, train=train)


class ConvNeXt(nn.Module):
    """Stem, stages of blocks between 2x2 convolutions, global average pool, norm, linear layer.

    Liu 2022, "A ConvNet for the 2020s". Published training sets drop_path to 0.1 (tiny), 0.4
    (small) and 0.5 (base).

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem', 'stage1',
    ... and 'pooled' (after the last norm).

    Args:
      stage_sizes: blocks in each stage. Every stage but the first starts by halving height and
        width.
      widths: channels of each stage.
      width: factor on all of them, rounded to whole channels.
      stem: convolution and stride of one patch: 'large' (4x4, for 224x224), 'medium' (2x2, for 64x64)
        or 'small' (1x1, for 32x32, which four stages take to 4x4).
      mlp_ratio: how many times the channels a block has between its dense layers.
      layer_scale: first value of the factors that end a block, one a channel; 0 is without them.
      norm_epsilon: 1e-6 in torchvision and in timm.
      dropout: rate before the last layer; not in the paper.
      drop_path: rate of dropping the branch of the last block; from the first block on it grows
        linearly (in the authors' code, from 0).
    """

    num_classes: int = 10
    stage_sizes: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    width: float = 1.0
    stem: str = 'large'
    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    activation: str = 'gelu'
    norm: str = 'layer'
    norm_epsilon: float = 1e-6
    norm_momentum: float = 0.9
    dropout: float = 0.0
    drop_path: float = 0.0
    kernel_init: str = 'truncated_normal'
    head_init: str = 'truncated_normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        lookup(STEMS, self.stem, 'stem')
        check_sizes(stage_sizes=self.stage_sizes, widths=self.widths, mlp_ratio=self.mlp_ratio)
        check_sizes(stages=len(self.stage_sizes))
        as_many = len(self.widths) == len(self.stage_sizes)
        require(as_many, 'widths', self.widths, f'{len(self.stage_sizes)} numbers, one a stage')
        require(0 < self.width <= 1000, 'width', self.width, 'more than 0 and finite, at most 1000')
        positive = 0 <= self.layer_scale < math.inf
        require(positive, 'layer_scale', self.layer_scale, 'at least 0 and finite')

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        bare_norm = partial(norm_act, style=style, train=train, act=False)
        conv = partial(Conv, style=style, padding=0, use_bias=True)
        rates = iter(drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        x = as_input(images, self.dtype)
        for i, size in enumerate(self.stage_sizes, 1):
            channels = max(1, round(self.width * self.widths[i - 1]))
            if i == 1:
                patch = STEMS[self.stem]
                x = conv(channels, patch, stride=patch, name='stem')(x)
                x = features['stem'] = bare_norm(x, name='stem_norm')
            else:
                x = bare_norm(x, name=f'downsample{i}_norm')
                x = conv(channels, 2, stride=2, name=f'downsample{i}')(x)
            for j in range(1, size + 1):
                settings = (self.mlp_ratio, self.layer_scale, next(rates))
                x = Block(style, *settings, name=f'stage{i}_block{j}')(x, train=train)
            features[f'stage{i}'] = x
        x = bare_norm(global_avg_pool(x), name='final_norm')
        x = features['pooled'] = nn.Dropout(self.dropout)(x, deterministic=not train)
        return head(x, self.num_classes, style, self.head_init), features


MODELS = {
    'convnext_tiny': partial(ConvNeXt, stage_sizes=(3, 3, 9, 3), widths=(96, 192, 384, 768)),
    'convnext_small': partial(ConvNeXt, stage_sizes=(3, 3, 27, 3), widths=(96, 192, 384, 768)),
    'convnext_base': partial(ConvNeXt, stage_sizes=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
}

_LIU = 'Liu 2022, https://arxiv.org/abs/2201.03545'
_TV = 'torchvision IMAGENET1K_V1'

REFERENCES = {
    'convnext_tiny': Reference(_LIU, 28_589_128, top1=82.52, source=_TV),
    'convnext_small': Reference(_LIU, 50_223_688, top1=83.62, source=_TV),
    'convnext_base': Reference(_LIU, 88_591_464, top1=84.06, source=_TV),
}

_TORCHVISION_PARTS = {'depthwise': 0, 'norm': 2, 'expand': 3, 'project': 5}
_TIMM_PARTS = {'depthwise': 'conv_dw', 'norm': 'norm', 'expand': 'mlp.fc1', 'project': 'mlp.fc2'}
_BLOCK = r'stage(\d+)_block(\d+)'
_PART = rf'{_BLOCK}/({"|".join(_TIMM_PARTS)})'

NAMES = {
    'torchvision': (  # stem, stage, downsampling, stage, ... in one sequence
        (r'stem', lambda _: 'features.0.0'),
        (r'stem_norm', lambda _: 'features.0.1'),
        (r'downsample(\d+)_norm', lambda _, s: f'features.{2 * s - 2}.0'),
        (r'downsample(\d+)', lambda _, s: f'features.{2 * s - 2}.1'),
        (
            _PART,
            lambda _, s, b, part: f'features.{2 * s - 1}.{b - 1}.block.{_TORCHVISION_PARTS[part]}',
        ),
        (
            rf'{_BLOCK}/layer_scale',
            lambda _, s, b: (f'features.{2 * s - 1}.{b - 1}.layer_scale', COLUMN),
        ),
        (r'final_norm', lambda _: 'classifier.0'),
        (r'head', lambda _: 'classifier.2'),
    ),
    'timm': (
        (r'stem', lambda _: 'stem.0'),
        (r'stem_norm', lambda _: 'stem.1'),
        (r'downsample(\d+)_norm', lambda _, s: f'stages.{s - 1}.downsample.0'),
        (r'downsample(\d+)', lambda _, s: f'stages.{s - 1}.downsample.1'),
        (_PART, lambda _, s, b, part: f'stages.{s - 1}.blocks.{b - 1}.{_TIMM_PARTS[part]}'),
        (rf'{_BLOCK}/layer_scale', lambda _, s, b: f'stages.{s - 1}.blocks.{b - 1}.gamma'),
        (r'final_norm', lambda _: 'head.norm'),
        (r'head', lambda _: 'head.fc'),
    ),
}
