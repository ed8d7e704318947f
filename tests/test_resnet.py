"""Residual networks against torchvision and timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.models import make_model, resnet
from parity import Pair, check_evaluation, check_training
from parity import timm_model as tm
from parity import torchvision_model as tv

SHALLOW = {'stage_sizes': (1, 1, 1, 1)}
# timm's builders take the number of blocks.
BLOCKS = {'layers': [1, 1, 1, 1]}
EVALUATION = [
    Pair('resnet18', tv('resnet18')),
    Pair('resnet50', tm('resnet50', **BLOCKS), SHALLOW),
    Pair('resnet18d', tm('resnet18d', **BLOCKS), SHALLOW, scheme='timm'),
    Pair('resnet50d', tm('resnet50d', **BLOCKS), SHALLOW, scheme='timm'),
    Pair('se_resnet50', tm('seresnet50', **BLOCKS), SHALLOW, scheme='timm'),
    Pair('resnext50_32x4d', tm('resnext50_32x4d', **BLOCKS), SHALLOW),
    Pair('preact_resnet18', tm('resnetv2_18', **BLOCKS), SHALLOW, scheme='timm'),
    Pair('preact_resnet50', tm('resnetv2_50', **BLOCKS), SHALLOW, scheme='timm'),
]
TRAINING = [EVALUATION[1]._replace(size=32), EVALUATION[4]._replace(size=32)]


@pytest.mark.parametrize('pair', EVALUATION, ids=lambda pair: pair.name)
def test_logits_equal_the_reference(pair):
    check_evaluation(pair)


@pytest.mark.parametrize(
    'pair',
    [TRAINING[0], pytest.param(TRAINING[1], marks=pytest.mark.slow)],
    ids=lambda pair: pair.name,
)
def test_a_step_of_sgd_equals_the_reference(pair):
    check_training(pair)


TIMM = {
    'resnet18d': ('resnet18d', 'timm'),
    'resnet34d': ('resnet34d', 'timm'),
    'resnet50d': ('resnet50d', 'timm'),
    'resnet101d': ('resnet101d', 'timm'),
    'preact_resnet18': ('resnetv2_18', 'timm'),
    'preact_resnet50': ('resnetv2_50', 'timm'),
    'se_resnet18': ('seresnet18', 'timm'),
    'se_resnet50': ('seresnet50', 'timm'),
}
ON_IMAGENET = [name for name, known in resnet.REFERENCES.items() if known.num_classes == 1000]


@pytest.mark.slow
@pytest.mark.parametrize('name', ON_IMAGENET)
def test_full_size_logits_equal_the_reference(name):
    other, scheme = TIMM.get(name, (name, 'torchvision'))
    reference = tv(other) if scheme == 'torchvision' else tm(other)
    check_evaluation(Pair(name, reference, {}, 224, scheme))


@pytest.mark.parametrize('preactivation', [False, True])
def test_where_the_branches_are_zero_a_plain_net_has_nothing_and_a_residual_one_its_input(
    preactivation,
):
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    for shortcut in ('none', 'pad'):
        model = make_model(
            'resnet20', stage_sizes=(1,), num_filters=4, shortcut=shortcut,
            norm='none', preactivation=preactivation,
        )  # fmt: skip
        variables = model.init(jax.random.key(0), images)
        branch = variables['params']['stage1_block1']
        variables['params']['stage1_block1'] = jax.tree.map(jnp.zeros_like, branch)
        _, features = model.apply(variables, images)
        expected = jnp.zeros_like(features['stem']) if shortcut == 'none' else features['stem']
        np.testing.assert_allclose(features['stage1'], expected, atol=1e-6)
