"""MobileNetV2 and V3, EfficientNet: one inverted residual block, and tables of how to stack it."""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    ConvNormAct,
    DenseNormAct,
    SqueezeExcite,
    Style,
    as_input,
    check_fields,
    check_sizes,
    drop_path,
    drop_path_rates,
    global_avg_pool,
    head,
    style_of,
)
from jaxcls.models.references import POINTWISE, Reference
from jaxcls.registry import lookup


class Row(NamedTuple):
    """Equal blocks in a row; rows of the same number of channels are one stage.

    Attributes:
      expand: channels of the depthwise convolution, as a factor on those of the block's input.
      channels: of the output, before `width`.
      blocks: how many, before `depth`.
      stride: of the first of them.
      kernel: size of the depthwise convolution.
      squeeze: with squeeze-and-excitation.
      activation: '' for the model's.
    """

    expand: float
    channels: int
    blocks: int
    stride: int
    kernel: int
    squeeze: bool = False
    activation: str = ''


STAGES = {
    # Sandler 2018, table 2.
    'v2': (
        Row(1, 16, 1, 1, 3),
        Row(6, 24, 2, 2, 3),
        Row(6, 32, 3, 2, 3),
        Row(6, 64, 4, 2, 3),
        Row(6, 96, 3, 1, 3),
        Row(6, 160, 3, 2, 3),
        Row(6, 320, 1, 1, 3),
    ),
    # Howard 2019, tables 1 and 2.
    'v3_large': (
        Row(1, 16, 1, 1, 3, False, 'relu'),
        Row(4, 24, 1, 2, 3, False, 'relu'),
        Row(3, 24, 1, 1, 3, False, 'relu'),
        Row(3, 40, 3, 2, 5, True, 'relu'),
        Row(6, 80, 1, 2, 3),
        Row(2.5, 80, 1, 1, 3),
        Row(2.3, 80, 2, 1, 3),
        Row(6, 112, 2, 1, 3, True),
        Row(6, 160, 3, 2, 5, True),
    ),
    'v3_small': (
        Row(1, 16, 1, 2, 3, True, 'relu'),
        Row(4.5, 24, 1, 2, 3, False, 'relu'),
        Row(3.67, 24, 1, 1, 3, False, 'relu'),
        Row(4, 40, 1, 2, 5, True),
        Row(6, 40, 2, 1, 5, True),
        Row(3, 48, 2, 1, 5, True),
        Row(6, 96, 3, 2, 5, True),
    ),
    # Tan 2019, table 1.
    'efficientnet': (
        Row(1, 16, 1, 1, 3, True),
        Row(6, 24, 2, 2, 3, True),
        Row(6, 40, 2, 2, 5, True),
        Row(6, 80, 3, 2, 3, True),
        Row(6, 112, 3, 1, 5, True),
        Row(6, 192, 4, 2, 5, True),
        Row(6, 320, 1, 1, 3, True),
    ),
}

# Of (channels of a block's input, expanded channels), those that squeeze-and-excitation has inside.
SQUEEZES = {
    'none': lambda _inputs, _inner: 0,
    'input': lambda inputs, _inner: max(1, inputs // 4),
    'expanded': lambda _inputs, inner: make_divisible(inner / 4),
}

# The stride of the stem, and whether the first stage with a stride has it.
STEMS = {'large': (2, True), 'small': (1, False)}


def make_divisible(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, but at least 8 and at least 90% of it (Sandler 2018)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class MBConv(nn.Module):
    """An inverted residual block, [B, H, W, C] -> [B, H', W', features] (Sandler 2018).

    1x1 to `expand` times the channels (left out where that is 1), depthwise, squeeze-and-excitation,
    1x1 without activation; the input is added where the shape stays. `MobileNet` documents the
    arguments of the same names.
    """

    features: int
    expand: float
    stride: int
    kernel_size: int
    style: Style
    depthwise_init: str
    squeeze: str
    squeeze_activation: str
    gate: str
    drop_path: float

    @nn.compact
    def __call__(self, x, *, train: bool):
        style, inputs = self.style, x.shape[-1]
        inner = make_divisible(inputs * self.expand)
        y = x
        if self.expand != 1:
            y = ConvNormAct(inner, 1, style, name='expand')(y, train=train)
        depthwise = dataclasses.replace(style, kernel_init=self.depthwise_init)
        size = (inner, self.kernel_size, depthwise, self.stride)
        y = ConvNormAct(*size, groups=inner, name='depthwise')(y, train=train)
        reduced = SQUEEZES[self.squeeze](inputs, inner)
        if reduced:
            y = SqueezeExcite(reduced, style, self.squeeze_activation, self.gate, name='se')(y)
        y = ConvNormAct(self.features, 1, style, act=False, name='project')(y, train=train)
        if self.stride > 1 or inputs != self.features:
            return y
        return x + drop_path(y, self.drop_path, train=train)


class MobileNet(nn.Module):
    """Inverted residual blocks between a 3x3 and a 1x1 convolution, pool, linear layer.

    Sandler 2018 (MobileNetV2), Howard 2019 (V3), Tan 2019 (EfficientNet).

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'stem', 'stage1',
    ..., 'final' (after the last 1x1 convolution) and 'pooled' (what the last layer reads: after
    V3's hidden layer, and after dropout).

    Args:
      stages: the blocks, a key of STAGES.
      width: factor on all numbers of channels, which are then made divisible by 8; what the last
        layer reads is only ever widened.
      depth: factor on the number of blocks of each row of STAGES, rounded up.
      stem: 'large' (total stride 32) or 'small' for 32x32: the stem and the first stage with a
        stride keep the size, which makes the total stride 8.
      stem_width: channels of the stem.
      final_width: channels of the last 1x1 convolution.
      head_width: units of a hidden layer after the pool (V3); 0 is without.
      squeeze: 'input' (EfficientNet) or 'expanded' (V3): the channels of which squeeze-and-excitation
        has a quarter inside, in the blocks that have it; 'none' is without it.
      squeeze_activation, gate: of squeeze-and-excitation.
      activation: of all but V3's first stages, which have ReLU.
      norm_epsilon, norm_momentum: torchvision's, where MobileNetV3 has 1e-3 and 0.99. timm's weights
        of it want norm_epsilon=1e-5.
      dropout: rate in front of the last layer.
      drop_path: rate of dropping the branch of the last block; from the first block on it grows
        linearly.
      kernel_init: initialiser of the convolutions (He's, with fan_out); `depthwise_init` is that of
        the depthwise ones, whose outputs read one channel (He's, with fan_in), `head_init` that of
        the last layer.
    """

    num_classes: int = 10
    stages: str = 'v2'
    width: float = 1.0
    depth: float = 1.0
    stem: str = 'large'
    stem_width: int = 32
    final_width: int = 1280
    head_width: int = 0
    squeeze: str = 'none'
    squeeze_activation: str = 'relu'
    gate: str = 'sigmoid'
    activation: str = 'relu6'
    norm: str = 'batch'
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    dropout: float = 0.2
    drop_path: float = 0.0
    kernel_init: str = 'he_normal_fan_out'
    depthwise_init: str = 'he_normal'
    head_init: str = 'normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        lookup(STAGES, self.stages, 'stages')
        lookup(STEMS, self.stem, 'stem')
        lookup(SQUEEZES, self.squeeze, 'squeeze')
        lookup(ACTIVATIONS, self.squeeze_activation, 'squeeze_activation')
        lookup(ACTIVATIONS, self.gate, 'gate')
        lookup(INITIALIZERS, self.depthwise_init, 'depthwise_init')
        check_sizes(stem_width=self.stem_width, final_width=self.final_width)
        require(0 < self.width <= 1000, 'width', self.width, 'above 0 and finite, at most 1000')
        require(0 < self.depth <= 100, 'depth', self.depth, 'above 0 and finite, at most 100')
        require(self.head_width >= 0, 'head_width', self.head_width, 'at least 0')
        squeezed = any(row.squeeze for row in STAGES[self.stages])
        expected = f"'none' for stages={self.stages!r}"
        require(squeezed or self.squeeze == 'none', 'squeeze', self.squeeze, expected)

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, blocks = style_of(self), blocks_of(self)
        rates = drop_path_rates(self.drop_path, len(blocks))
        x = as_input(images, self.dtype)
        stem = ConvNormAct(
            self._channels(self.stem_width), 3, style, STEMS[self.stem][0], name='stem'
        )
        x = stem(x, train=train)
        features = {'stem': x}
        for (name, row), rate in zip(blocks, rates, strict=True):
            x = MBConv(
                features=self._channels(row.channels),
                expand=row.expand,
                stride=row.stride,
                kernel_size=row.kernel,
                style=dataclasses.replace(style, activation=row.activation or self.activation),
                depthwise_init=self.depthwise_init,
                squeeze=self.squeeze if row.squeeze else 'none',
                squeeze_activation=self.squeeze_activation,
                gate=self.gate,
                drop_path=rate,
                name=name,
            )(x, train=train)
            features[name.partition('_')[0]] = x
        final = self._channels(self.final_width, last=not self.head_width)
        x = features['final'] = ConvNormAct(final, 1, style, name='final')(x, train=train)
        x = global_avg_pool(x)
        if self.head_width:
            bare = dataclasses.replace(style, norm='none')
            units = self._channels(self.head_width, last=True)
            x = DenseNormAct(units, bare, name='hidden')(x, train=train)
        x = features['pooled'] = nn.Dropout(self.dropout)(x, deterministic=not train)
        return head(x, self.num_classes, style, self.head_init), features

    def _channels(self, channels: int, last: bool = False) -> int:
        return make_divisible(channels * (max(1.0, self.width) if last else self.width))


def blocks_of(model: MobileNet) -> list[tuple[str, Row]]:
    """Every block's name, 'stage1_block1', with its row, where `stride` is that of this block."""
    blocks = []
    stages = itertools.groupby(STAGES[model.stages], key=lambda row: row.channels)
    for stage, (_, rows) in enumerate(stages, 1):
        repeated = [
            row._replace(stride=1 if i else row.stride)
            for row in rows
            for i in range(math.ceil(row.blocks * model.depth))
        ]
        blocks += [(f'stage{stage}_block{i}', row) for i, row in enumerate(repeated, 1)]
    if not STEMS[model.stem][1]:
        first = next(i for i, (_, row) in enumerate(blocks) if row.stride > 1)
        blocks[first] = (blocks[first][0], blocks[first][1]._replace(stride=1))
    return blocks


_V3 = {
    'stem_width': 16,
    'squeeze': 'expanded',
    'gate': 'hard_sigmoid',
    'activation': 'hard_swish',
    'norm_epsilon': 1e-3,
    'norm_momentum': 0.99,
}
_EFFICIENTNET = {
    'stages': 'efficientnet',
    'squeeze': 'input',
    'squeeze_activation': 'silu',
    'activation': 'silu',
    'drop_path': 0.2,
}

MODELS = {
    'mobilenet_v2': MobileNet,
    'mobilenet_v3_large': partial(
        MobileNet, stages='v3_large', final_width=960, head_width=1280, **_V3
    ),
    'mobilenet_v3_small': partial(
        MobileNet, stages='v3_small', final_width=576, head_width=1024, **_V3
    ),
    'efficientnet_b0': partial(MobileNet, width=1.0, depth=1.0, dropout=0.2, **_EFFICIENTNET),
    'efficientnet_b1': partial(MobileNet, width=1.0, depth=1.1, dropout=0.2, **_EFFICIENTNET),
    'efficientnet_b2': partial(MobileNet, width=1.1, depth=1.2, dropout=0.3, **_EFFICIENTNET),
    'efficientnet_b3': partial(MobileNet, width=1.2, depth=1.4, dropout=0.3, **_EFFICIENTNET),
    'efficientnet_b4': partial(MobileNet, width=1.4, depth=1.8, dropout=0.4, **_EFFICIENTNET),
}

_SANDLER = 'Sandler 2018, https://arxiv.org/abs/1801.04381'
_HOWARD = 'Howard 2019, https://arxiv.org/abs/1905.02244'
_TAN = 'Tan 2019, https://arxiv.org/abs/1905.11946'
_TV = {'source': 'torchvision IMAGENET1K_V1'}

# Image sizes are torchvision's; that of B2 is 260 in the paper.
REFERENCES = {
    'mobilenet_v2': Reference(_SANDLER, 3_504_872, top1=71.88, **_TV),
    'mobilenet_v3_large': Reference(_HOWARD, 5_483_032, top1=74.04, **_TV),
    'mobilenet_v3_small': Reference(_HOWARD, 2_542_856, top1=67.67, **_TV),
    'efficientnet_b0': Reference(_TAN, 5_288_548, (224, 224, 3), top1=77.69, **_TV),
    'efficientnet_b1': Reference(_TAN, 7_794_184, (240, 240, 3), top1=78.64, **_TV),
    'efficientnet_b2': Reference(_TAN, 9_109_994, (288, 288, 3), top1=80.61, **_TV),
    'efficientnet_b3': Reference(_TAN, 12_233_232, (300, 300, 3), top1=82.01, **_TV),
    'efficientnet_b4': Reference(_TAN, 19_341_616, (380, 380, 3), top1=83.38, **_TV),
}

_BLOCK = r'(stage(\d+)_block(\d+))'
_LAYER = _BLOCK + '/(expand|depthwise|project)/(conv|norm)'
_SQUEEZE = _BLOCK + '/se/(reduce|expand)'


def _stage_count(model: MobileNet) -> int:
    return len({row.channels for row in STAGES[model.stages]})


def _layers(layout, block: str) -> list[str]:
    return [p for p in ('expand', 'depthwise', 'se', 'project') if layout.has(f'{block}/{p}')]


def _torchvision_block(layout, block: str, stage: int, number: int) -> str:
    if layout.model.stages == 'efficientnet':  # the only one in which stages are modules
        return f'features.{stage}.{number - 1}.block'
    place = f'features.{layout.rank(block) + 1}'
    return f'{place}.conv' if layout.model.stages == 'v2' else f'{place}.block'


def _torchvision_layer(layout, block, stage, number, part, kind) -> str:
    place, i = _torchvision_block(layout, block, stage, number), _layers(layout, block).index(part)
    norm = int(kind == 'norm')
    if part == 'project' and layout.model.stages == 'v2':  # not wrapped in a module there
        return f'{place}.{i + norm}'
    return f'{place}.{i}.{norm}'


def _torchvision_squeeze(layout, block, stage, number, part) -> str:
    i = _layers(layout, block).index('se')
    return (
        f'{_torchvision_block(layout, block, stage, number)}.{i}.fc{1 if part == "reduce" else 2}'
    )


def _torchvision_final(layout, kind) -> str:
    model = layout.model
    last = _stage_count(model) if model.stages == 'efficientnet' else len(blocks_of(model))
    return f'features.{last + 1}.{int(kind == "norm")}'


def _timm_layer(layout, block, stage, number, part, kind) -> str:
    place = f'blocks.{stage - 1}.{number - 1}'
    layers = [p for p in _layers(layout, block) if p != 'se']
    if kind == 'norm':
        return f'{place}.bn{layers.index(part) + 1}'
    pointwise = 'conv_pwl' if 'expand' in layers else 'conv_pw'
    return f'{place}.' + {'expand': 'conv_pw', 'depthwise': 'conv_dw', 'project': pointwise}[part]


def _timm_final(layout, kind) -> str:
    if not layout.has('hidden'):
        return 'conv_head' if kind == 'conv' else 'bn2'
    return f'blocks.{_stage_count(layout.model)}.0.' + ('conv' if kind == 'conv' else 'bn1')


NAMES = {
    'torchvision': (
        (r'stem/conv', lambda _: 'features.0.0'),
        (r'stem/norm', lambda _: 'features.0.1'),
        (_LAYER, _torchvision_layer),
        (_SQUEEZE, _torchvision_squeeze),
        (r'final/(conv|norm)', _torchvision_final),
        (r'hidden/dense', lambda _: 'classifier.0'),
        (r'head', lambda layout: 'classifier.3' if layout.has('hidden') else 'classifier.1'),
    ),
    'timm': (
        (r'stem/conv', lambda _: 'conv_stem'),
        (r'stem/norm', lambda _: 'bn1'),
        (_LAYER, _timm_layer),
        (_SQUEEZE, lambda _, __, s, b, part: f'blocks.{s - 1}.{b - 1}.se.conv_{part}'),
        (r'final/(conv|norm)', _timm_final),
        (r'hidden/dense', lambda _: ('conv_head', POINTWISE)),
        (r'head', lambda _: 'classifier'),
    ),
}
