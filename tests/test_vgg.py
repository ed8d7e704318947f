"""VGG against torchvision and timm."""

import jax
import numpy as np
import pytest

from jaxcls.errors import UserError
from jaxcls.models import make_model, vgg
from parity import (
    Pair,
    check_evaluation,
    check_training,
    images_of,
    parameters,
    shapes_of,
    timm_model,
    torchvision_model,
)

# A network of every kind of part, narrow, in our fields and as torchvision and timm put it together.
TINY = {'stage_sizes': (1, 2), 'widths': (4, 6), 'hidden': (8, 7), 'dropout': 0.0}
TINY_LAYERS = [4, 'M', 6, 6, 'M']


def tiny_torchvision(pool_size=7, norm=False):
    """torchvision's VGG of those layers; its hidden layers have no argument."""

    def make():
        models = pytest.importorskip('torchvision.models', exc_type=ImportError)
        from torch import nn

        layers = models.vgg.make_layers(TINY_LAYERS, batch_norm=norm)
        module = models.VGG(layers, num_classes=5, init_weights=False, dropout=0.0)
        module.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        module.classifier[0] = nn.Linear(6 * pool_size**2, 8)
        module.classifier[3] = nn.Linear(8, 7)
        module.classifier[6] = nn.Linear(7, 5)
        return module

    return make


def tiny_timm(norm=False):
    """timm's VGG of those layers; its hidden layers have no argument."""

    def make():
        theirs = pytest.importorskip('timm.models.vgg', exc_type=ImportError)
        from torch import nn

        module = theirs.VGG(TINY_LAYERS, num_classes=5, norm_layer=nn.BatchNorm2d if norm else None)
        module.pre_logits.fc1 = nn.Conv2d(6, 8, 7)
        module.pre_logits.fc2 = nn.Conv2d(8, 7, 1)
        module.head.fc = nn.Linear(7, 5)
        return module

    return make


BN = {**TINY, 'norm': 'batch'}
EVALUATION = {
    'torchvision': Pair('vgg11', tiny_torchvision(), TINY, size=28),
    'torchvision, batch norm': Pair('vgg11_bn', tiny_torchvision(norm=True), TINY, size=28),
    'timm': Pair('vgg11', tiny_timm(), TINY, size=28, scheme='timm'),
    'timm, batch norm': Pair('vgg11_bn', tiny_timm(norm=True), TINY, size=28, scheme='timm'),
    'averaged to fewer pixels': Pair('vgg11', tiny_torchvision(), TINY, size=38),
    'averaged to more pixels': Pair('vgg11', tiny_torchvision(), TINY, size=20),
    'more pixels in timm': Pair('vgg11', tiny_timm(), TINY, size=20, scheme='timm'),
    'of one pixel': Pair('vgg11', tiny_torchvision(1), {**TINY, 'pool_size': 1}, size=12),
}


@pytest.mark.parametrize('kind', EVALUATION)
def test_logits_equal_the_reference(kind):
    check_evaluation(EVALUATION[kind])


def test_a_step_of_sgd_equals_the_reference():
    check_training(EVALUATION['torchvision, batch norm'])


def test_a_fitting_head_makes_the_network_for_small_images():
    model = make_model('vgg16_bn', pool_size=1, hidden=(512,))
    assert parameters(shapes_of(model, 32)) == 14_723_136 + 512 * 513 + 10 * 513


def test_features_are_the_stages_before_their_pools():
    model = make_model('vgg16', num_classes=3)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    apply = lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0]  # noqa: E731
    logits, features = jax.eval_shape(apply, image)
    assert logits.shape == (1, 3)
    assert {k: v.shape[1:] for k, v in features.items()} == {
        'stage1': (224, 224, 64),
        'stage2': (112, 112, 128),
        'stage3': (56, 56, 256),
        'stage4': (28, 28, 512),
        'stage5': (14, 14, 512),
        'hidden1': (4096,),
        'hidden2': (4096,),
        'pooled': (4096,),
    }


def test_training_drops_half_of_every_hidden_layer():
    model = make_model('vgg11', **{**TINY, 'hidden': (64, 64), 'activation': 'softplus'})
    noisy = model.clone(dropout=0.5)
    images = images_of(8)

    @jax.jit
    def features(key):
        variables = model.init(key, images)
        noise = {'rngs': {'dropout': jax.random.key(1)}}
        return (
            model.apply(variables, images, train=True)[1],
            noisy.apply(variables, images, train=False)[1],
            noisy.apply(variables, images, train=True, **noise)[1],
        )

    never, evaluated, trained = features(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, never, evaluated)
    for name in ('hidden1', 'pooled'):
        assert (never[name] > 0).all()
        assert 0.3 < (trained[name] == 0).mean() < 0.7, name


def test_widths_are_one_a_stage():
    with pytest.raises(UserError, match=r'widths is \(8, 8\); it must be 5 numbers, one a stage'):
        make_model('vgg16', widths=(8, 8))


FULL_SIZE = [Pair(name, torchvision_model(name), size=224) for name in vgg.MODELS]
FULL_SIZE += [
    Pair(name, timm_model(name), size=224, scheme='timm') for name in ('vgg11', 'vgg19_bn')
]


@pytest.mark.slow
@pytest.mark.parametrize('pair', FULL_SIZE, ids=lambda pair: f'{pair.name}-{pair.scheme}')
def test_full_size_logits_equal_the_reference(pair):
    check_evaluation(pair)
