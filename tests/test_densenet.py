"""DenseNets against torchvision, timm and a plain one for CIFAR in PyTorch."""

import collections

import jax
import numpy as np
import pytest

import parity
from jaxcls import weights
from jaxcls.errors import UserError
from jaxcls.models import densenet, make_model
from parity import Pair, check_evaluation, check_training
from parity import timm_model as tm
from parity import torchvision_model as tv


def cifar_densenet(depth: int, growth: int, bottlenecks: bool):
    """Huang 2017 on CIFAR, DenseNet-BC or plain, with torchvision's names."""
    filters = 2 * growth if bottlenecks else 16
    layers = (depth - 4) // (6 if bottlenecks else 3)
    return lambda: _cifar_densenet(layers, filters, growth, bottlenecks)


def _cifar_densenet(layers, channels, growth, bottlenecks):
    nn = pytest.importorskip('torch').nn
    parts = {'conv0': nn.Conv2d(3, channels, 3, padding=1, bias=False)}
    for i in (1, 2, 3):
        block = {}
        for j in range(layers):
            block[f'denselayer{j + 1}'] = _dense_layer(channels, growth, bottlenecks)
            channels += growth
        parts[f'denseblock{i}'] = _sequential(block)
        if i < 3:
            kept = channels // 2 if bottlenecks else channels
            transition = {'norm': nn.BatchNorm2d(channels), 'relu': nn.ReLU()}
            transition |= {'conv': nn.Conv2d(channels, kept, 1, bias=False)}
            parts[f'transition{i}'] = _sequential({**transition, 'pool': nn.AvgPool2d(2)})
            channels = kept
    parts['norm5'] = nn.BatchNorm2d(channels)
    end = {'relu': nn.ReLU(), 'pool': nn.AdaptiveAvgPool2d(1), 'flatten': nn.Flatten()}
    end['classifier'] = nn.Linear(channels, 5)
    return _sequential({'features': _sequential(parts), **end})


def _dense_layer(channels, growth, bottlenecks):
    import torch
    from torch import nn

    class Layer(nn.Sequential):
        def forward(self, x):
            return torch.cat([x, super().forward(x)], 1)

    parts, k = {}, 1
    if bottlenecks:
        conv = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        parts = {'norm1': nn.BatchNorm2d(channels), 'relu1': nn.ReLU(), 'conv1': conv}
        channels, k = 4 * growth, 2
    conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
    parts |= {f'norm{k}': nn.BatchNorm2d(channels), f'relu{k}': nn.ReLU(), f'conv{k}': conv}
    return _sequential(parts, Layer)


def _sequential(parts, kind=None):
    from torch import nn

    return (kind or nn.Sequential)(collections.OrderedDict(parts))


SHALLOW = {'stage_sizes': (2, 1, 1, 2), 'growth_rate': 8, 'num_filters': 16}
EVALUATION = {
    'torchvision': Pair(
        'densenet121',
        tv('DenseNet', block_config=(2, 1, 1, 2), growth_rate=8, num_init_features=16),
        SHALLOW,
    ),
    'timm': Pair(
        'densenet121',
        tm('densenet121', block_config=(2, 1, 1, 2), growth_rate=8),
        SHALLOW,
        scheme='timm',
    ),
    'bottlenecks': Pair(
        'densenet_bc_100_12',
        cifar_densenet(16, 12, True),
        {'stage_sizes': (2, 2, 2)},
        size=32,
    ),
    'plain': Pair(
        'densenet_40_12',
        cifar_densenet(10, 12, False),
        {'stage_sizes': (2, 2, 2)},
        size=32,
    ),
}


@pytest.mark.parametrize('kind', EVALUATION)
def test_logits_equal_the_reference(kind):
    check_evaluation(EVALUATION[kind])


def test_a_step_of_sgd_equals_the_reference():
    reference = tv('DenseNet', block_config=(2, 1), growth_rate=8, num_init_features=16)
    check_training(Pair('densenet121', reference, {**SHALLOW, 'stage_sizes': (2, 1)}, size=16))


FULL = {
    'densenet121': Pair('densenet121', tv('densenet121'), {}, 224),
    'densenet161': Pair('densenet161', tv('densenet161'), {}, 224),
    'densenet169': Pair('densenet169', tm('densenet169'), {}, 224, 'timm'),
    'densenet201': Pair('densenet201', tm('densenet201'), {}, 224, 'timm'),
    'densenet_40_12': Pair('densenet_40_12', cifar_densenet(40, 12, False), {}, 32),
    'densenet_bc_100_12': Pair('densenet_bc_100_12', cifar_densenet(100, 12, True), {}, 32),
    'densenet_bc_190_40': Pair('densenet_bc_190_40', cifar_densenet(190, 40, True), {}, 32),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', densenet.MODELS)
def test_full_size_logits_equal_the_reference(name):
    check_evaluation(FULL[name])


def random_variables(model, size):
    rng = np.random.default_rng(0)
    shapes = parity.shapes_of(model, size)
    return weights.unflatten({p: rng.random(s.shape, np.float32) for p, s in shapes.items()})


def test_what_a_stage_starts_with_is_still_there_at_its_end():
    model = make_model('densenet_bc_100_12', stage_sizes=(2, 1), growth_rate=4)
    variables = random_variables(model, 8)
    _, features = jax.jit(model.apply)(variables, parity.images_of(8))
    np.testing.assert_array_equal(features['stage1'][..., :24], features['stem'])
    assert features['stage1'].shape == (2, 8, 8, 24 + 2 * 4)
    assert features['stage2'].shape == (2, 4, 4, 16 + 4)


def test_the_small_stem_leaves_a_4x4_map_of_32x32_images():
    model = make_model('densenet121', stage_sizes=(1, 1, 1, 1), stem='small')
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    (_, features), _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), images
    )
    assert [features[f'stage{i}'].shape[1] for i in (1, 2, 3, 4)] == [32, 16, 8, 4]


@pytest.mark.parametrize(
    ('fields', 'size', 'message'),
    [
        ({'stem': 'smal'}, 32, "Unknown stem 'smal'. Did you mean 'small'"),
        ({'compression': 0.0}, 32, 'compression is 0.0; it must be above 0 and at most 1'),
        ({'bottleneck': -1}, 32, 'bottleneck is -1; it must be at least 0'),
        ({'growth_rate': 0}, 32, 'growth_rate=0: expected whole numbers of at least 1'),
        ({'stage_sizes': (1, 1, 1, 1)}, 16, 'a 2x2 average pool got 1x1 activations'),
    ],
)
def test_a_mistake_is_named(fields, size, message):
    with pytest.raises(UserError) as error:
        parity.shapes_of(make_model('densenet121', **fields), size)
    assert message in str(error.value)
