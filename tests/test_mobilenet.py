"""MobileNets and EfficientNets against torchvision and timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.errors import UserError
from jaxcls.models import make_model
from jaxcls.models.layers import Style
from jaxcls.models.mobilenet import MODELS, REFERENCES, STAGES, MBConv, make_divisible
from parity import Pair, check_evaluation, check_training, images_of
from parity import timm_model as tm
from parity import torchvision_model as tv

TIMM = {
    'mobilenet_v2': 'mobilenetv2_100',
    'mobilenet_v3_large': 'mobilenetv3_large_100',
    'mobilenet_v3_small': 'mobilenetv3_small_100',
}


def published(name: str, size: int) -> list[Pair]:
    """The whole network in both libraries."""
    fields = {'norm_epsilon': 1e-5} if 'v3' in name else {}
    timm = Pair(name, tm(TIMM.get(name, name)), fields, size, scheme='timm')
    return [Pair(name, tv(name), size=size), timm]


FULL_SIZE = [pair for name in MODELS for pair in published(name, REFERENCES[name].image_shape[0])]
EVALUATION = [
    *published('mobilenet_v2', 48),
    *published('mobilenet_v3_large', 48),
    *published('efficientnet_b0', 48),
    Pair(  # whose stem timm does not narrow
        'mobilenet_v3_small',
        tm('mobilenetv3_small_050'),
        {'width': 0.5, 'stem_width': 32, 'norm_epsilon': 1e-5},
        size=48,
        scheme='timm',
    ),
]


def naming(pair: Pair) -> str:
    return f'{pair.name}-{pair.scheme}'


@pytest.mark.parametrize('pair', EVALUATION, ids=naming)
def test_logits_equal_the_reference(pair):
    check_evaluation(pair)


@pytest.mark.slow
@pytest.mark.parametrize('pair', FULL_SIZE, ids=naming)
def test_full_size_logits_equal_the_reference(pair):
    check_evaluation(pair)


# torchvision's networks of the first rows of STAGES.


def short_v2():
    rows = [(1, 16, 1, 1), (6, 24, 2, 2)]  # expansion, channels, blocks, stride
    make = tv('mobilenet_v2', inverted_residual_setting=rows, width_mult=0.5, dropout=0.0)
    return make()


def short_v3_small():
    module = pytest.importorskip('torchvision.models.mobilenetv3', exc_type=ImportError)
    rows = [  # input channels, kernel, expanded channels, channels, squeeze, activation, stride
        (16, 3, 16, 16, True, 'RE', 2),
        (16, 3, 72, 24, False, 'RE', 2),
        (24, 3, 88, 24, False, 'RE', 1),
        (24, 5, 96, 40, True, 'HS', 2),
    ]
    settings = [module.InvertedResidualConfig(*row, dilation=1, width_mult=1.0) for row in rows]
    return module.MobileNetV3(settings, last_channel=64, num_classes=5, dropout=0.0)


def short_efficientnet():
    module = pytest.importorskip('torchvision.models.efficientnet', exc_type=ImportError)
    rows = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2)]  # ..., kernel, stride, from, to, blocks
    settings = [module.MBConvConfig(*row) for row in rows]
    return module.EfficientNet(settings, 0.0, 0.0, num_classes=5, last_channel=64)


V3 = {'final_width': 6 * 40, 'head_width': 64, 'dropout': 0.0}
EFFICIENTNET = {'final_width': 64, 'dropout': 0.0, 'drop_path': 0.0}
TRAINING = [
    pytest.param(
        Pair('mobilenet_v2', short_v2, {'width': 0.5, 'dropout': 0.0}, size=32), 2, id='v2'
    ),
    pytest.param(Pair('mobilenet_v3_small', short_v3_small, V3, size=32), 4, id='v3_small'),
    pytest.param(
        Pair('efficientnet_b0', short_efficientnet, EFFICIENTNET, size=32),
        2,
        id='efficientnet',
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(('pair', 'rows'), TRAINING)
def test_a_step_of_sgd_equals_the_reference(pair, rows, monkeypatch):
    stages = make_model(pair.name).stages
    monkeypatch.setitem(STAGES, stages, STAGES[stages][:rows])
    check_training(pair)


# Sizes


@pytest.mark.parametrize('name', ['mobilenet_v2', 'mobilenet_v3_small', 'efficientnet_b0'])
def test_the_small_stem_divides_the_size_by_8_and_has_the_same_parameters(name):
    def shapes(stem):
        model = make_model(name, stem=stem, depth=0.25)
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)

    ((_, small), small_variables), ((_, large), large_variables) = map(shapes, ('small', 'large'))
    assert small_variables == large_variables
    assert [small['stem'].shape[1], small['final'].shape[1]] == [32, 4]
    assert [large['stem'].shape[1], large['final'].shape[1]] == [16, 1]


@pytest.mark.parametrize(
    ('channels', 'expected'), [(3, 8), (12, 16), (18, 24), (20, 24), (36, 40), (64, 64), (67.2, 64)]
)
def test_channels_are_divisible_by_8_and_at_least_90_per_cent(channels, expected):
    assert make_divisible(channels) == expected
    assert expected >= 0.9 * channels


# The block


def block(**fields):
    plain = {'features': 8, 'expand': 2, 'stride': 1, 'kernel_size': 3, 'style': Style()}
    plain |= {'depthwise_init': 'he_normal', 'squeeze': 'none', 'squeeze_activation': 'relu'}
    return MBConv(**plain, gate='sigmoid', **fields)


def test_drop_path_leaves_the_input_of_a_block():
    images = images_of(4, channels=8)
    model = block(drop_path=1 - 1e-7)
    rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
    run = jax.jit(
        lambda x, train: model.init_with_output(rngs, x, train=train)[0], static_argnames='train'
    )
    np.testing.assert_array_equal(run(images, train=True), images)
    assert not np.allclose(run(images, train=False), images)


# Mistakes


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'stages': 'v4'}, "Unknown stages 'v4'"),
        ({'stem': 'smal'}, "Unknown stem 'smal'. Did you mean 'small'"),
        ({'squeeze': 'inputs'}, "Unknown squeeze 'inputs'. Did you mean 'input'"),
        ({'squeeze_activation': 'rleu'}, "Unknown squeeze_activation 'rleu'"),
        ({'stages': 'v2'}, "squeeze is 'input'; it must be 'none' for stages='v2'"),
        ({'gate': 'sigmoidal'}, "Unknown gate 'sigmoidal'. Did you mean 'sigmoid'"),
        ({'depthwise_init': 'he'}, "Unknown depthwise_init 'he'"),
        ({'width': 0.0}, 'width is 0.0; it must be above 0'),
        ({'depth': -1.0}, 'depth is -1.0; it must be above 0'),
        ({'width': float('inf')}, 'width is inf; it must be above 0 and finite'),
        ({'head_width': -1}, 'head_width is -1; it must be at least 0'),
        ({'final_width': 0}, 'final_width=0'),
    ],
)
def test_a_mistake_is_named(fields, message):
    with pytest.raises(UserError) as error:
        make_model('efficientnet_b0', **fields)
    assert message in str(error.value)
