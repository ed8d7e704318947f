"""ConvNeXt against torchvision and timm, with its own norm and with batch norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity
from jaxcls.errors import UserError
from jaxcls.models import convnext, make_model
from parity import Pair, check_evaluation, check_training
from parity import timm_model as tm
from parity import torchvision_model as tv

TINY = {'stage_sizes': (1, 2, 1, 1), 'widths': (8, 12, 16, 20)}


def torchvision_of(stage_sizes, widths):
    def make():
        package = parity.import_or_skip('torchvision.models.convnext')
        stages = zip(widths, (*widths[1:], None), stage_sizes, strict=True)
        return package.ConvNeXt([package.CNBlockConfig(*stage) for stage in stages], num_classes=5)

    return make


def timm_of(stage_sizes, widths, **kwargs):
    return tm('convnext_tiny', depths=stage_sizes, dims=widths, **kwargs)


def without_layer_scale():
    module = timm_of(**TINY)()
    for stage in module.stages:
        for block in stage.blocks:
            block.gamma = None
    return module


def with_batch_norm():
    module = timm_of(**TINY)()
    nn = pytest.importorskip('torch').nn

    class ChannelsLast(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def norm(layer, kind=nn.BatchNorm2d):
        return kind(len(layer.weight), eps=1e-6)

    module.stem[1] = norm(module.stem[1])
    for i, stage in enumerate(module.stages):
        if i:
            stage.downsample[0] = norm(stage.downsample[0])
        for block in stage.blocks:
            block.norm = norm(block.norm, ChannelsLast)
    module.head.norm = norm(module.head.norm)
    return module


PAIR = Pair('convnext_tiny', torchvision_of(**TINY), TINY, 32)
EVALUATION = {
    'torchvision': PAIR._replace(size=37),
    'timm': PAIR._replace(reference=timm_of(**TINY), scheme='timm'),
    'small stem': PAIR._replace(
        reference=timm_of(**TINY, patch_size=1),
        fields={**TINY, 'stem': 'small'},
        size=9,
        scheme='timm',
    ),
    'no layer scale': PAIR._replace(
        reference=without_layer_scale, fields={**TINY, 'layer_scale': 0.0}, scheme='timm'
    ),
}
SHORT = {'stage_sizes': (1, 1), 'widths': (4, 6)}
TRAINING = {
    'layer norm': PAIR._replace(reference=torchvision_of(**SHORT), fields=SHORT),
    'batch norm': PAIR._replace(
        reference=with_batch_norm, fields={**TINY, 'norm': 'batch'}, scheme='timm'
    ),
}


@pytest.mark.parametrize('kind', EVALUATION)
def test_logits_equal_the_reference(kind):
    check_evaluation(EVALUATION[kind])


@pytest.mark.slow  # 20 s each: float64, and 49 shifts a depthwise convolution
@pytest.mark.parametrize('kind', TRAINING)
def test_a_step_of_sgd_equals_the_reference(kind):
    check_training(TRAINING[kind])


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['torchvision', 'timm'])
@pytest.mark.parametrize('name', convnext.MODELS)
def test_full_size_logits_equal_the_reference(name, scheme):
    reference = (tv if scheme == 'torchvision' else tm)(name)
    check_evaluation(Pair(name, reference, {}, 224, scheme))


@functools.cache
def features_of(size, **fields):
    model = make_model('convnext_tiny', num_classes=5, **{**TINY, **fields})
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    (_, features), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    return {name: leaf.shape for name, leaf in features.items()}, variables['params']


@pytest.mark.parametrize(
    ('stem', 'size', 'last'), [('small', 32, 4), ('medium', 64, 4), ('large', 224, 7)]
)
def test_each_stem_leaves_a_last_map_of_4_or_more(stem, size, last):
    shapes, _ = features_of(size, stem=stem)
    assert set(shapes) == {'stem', 'stage1', 'stage2', 'stage3', 'stage4', 'pooled'}
    assert shapes['stage4'] == (2, last, last, 20)
    assert shapes['pooled'] == (2, 20)


def test_width_is_a_factor_on_all_channels():
    shapes, params = features_of(32, width=0.3, mlp_ratio=2)
    assert [shapes[f'stage{i}'][-1] for i in (1, 2, 3, 4)] == [2, 4, 5, 6]
    assert params['stage4_block1']['expand']['kernel'].shape == (6, 12)


ONE_BLOCK = {'stage_sizes': (1,), 'widths': (4,), 'stem': 'small'}


@pytest.mark.parametrize('scale', [1e-6, 0.5])
def test_a_block_starts_as_its_shortcut_but_for_the_layer_scale(scale):
    model = make_model('convnext_tiny', **ONE_BLOCK, layer_scale=scale)
    start = jax.jit(lambda images: model.init_with_output(jax.random.key(0), images))
    (_, features), variables = start(parity.images_of(8))
    leaf = variables['params']['stage1_block1']['layer_scale']
    np.testing.assert_allclose(leaf, np.full(4, scale, np.float32))
    change = parity.relative(features['stage1'], features['stem'])
    assert (change < 1e-5) == (scale < 1e-3)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'stem': 'smal'}, "Unknown stem 'smal'. Did you mean 'small'"),
        ({'widths': (8, 8)}, 'widths is (8, 8); it must be 4 numbers, one a stage'),
        ({'widths': (8, 8, 8, 0)}, 'widths=(8, 8, 8, 0)'),
        ({'stage_sizes': (), 'widths': ()}, 'stages=0'),
        ({'mlp_ratio': 0}, 'mlp_ratio=0'),
        ({'layer_scale': -1.0}, 'layer_scale is -1.0'),
        ({'width': 0.0}, 'width is 0.0; it must be more than 0'),
    ],
)
def test_values_out_of_range_are_errors(fields, message):
    with pytest.raises(UserError) as error:
        make_model('convnext_tiny', **fields)
    assert message in str(error.value)


def test_images_smaller_than_the_strides_are_an_error():
    with pytest.raises(UserError, match='too small for this network'):
        features_of(16)
