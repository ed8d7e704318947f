"""Channels taken out: dead ones change nothing, exactly; every family in CUTS; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import channels, weights
from jaxcls.errors import UserError
from jaxcls.models import make_model
from small_nets import NETS, build, logits

pytestmark = pytest.mark.usefixtures('optimized')


@pytest.mark.parametrize('name', NETS)
def test_channels_that_are_zero_change_no_logit(name):
    with jax.enable_x64(True):  # in single precision, fewer channels may be summed in another order
        wide = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
        model, flat, image = build(name, **wide)
        flat = {path: leaf.astype(np.float64) for path, leaf in flat.items()}
        _, cuts = channels.CUTS[channels._family(model)](
            model, lambda widths: tuple(w // 2 for w in widths)
        )
        for cut in cuts:
            dead = np.random.default_rng(1).permutation(channels._outputs(flat, cut))[cut.width :]
            for path in flat:
                module, _, leaf = path.partition('/')[2].rpartition('/')
                if module in (cut.maker, cut.norm) and leaf in ('kernel', 'bias', 'scale', 'mean'):
                    flat[path][..., dead] = 0
        fields, small = channels.remove(model, weights.unflatten(flat), 0.5)
        small = weights.flatten(small)
        smaller, _, _ = build(name, **fields, **wide)
        assert sum(leaf.size for leaf in small.values()) < 0.7 * sum(
            leaf.size for leaf in flat.values()
        )
        found, expected = logits(smaller, small, image), logits(model, flat, image)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_what_is_left_are_the_largest_filters_or_scales():
    model, flat, _ = build('vgg11_bn')
    sizes = np.abs(flat['params/stage1_conv1/conv/kernel']).sum((0, 1, 2))
    scales = np.abs(flat['params/stage1_conv1/norm/scale'])
    for criterion, score in (('filter', sizes), ('scale', scales)):
        _, small = channels.remove(model, weights.unflatten(flat), 0.5, criterion)
        kept = np.sort(np.argsort(score)[2:])
        np.testing.assert_array_equal(
            small['params']['stage1_conv1']['norm']['bias'],
            flat['params/stage1_conv1/norm/bias'][kept],
        )


def test_no_share_is_the_same_network_and_at_least_one_channel_is_left():
    model, flat, _ = build('mlp')
    fields, same = channels.remove(model, weights.unflatten(flat), 0.0)
    assert fields == {'hidden': (8, 6)}
    for path, leaf in weights.flatten(same).items():
        np.testing.assert_array_equal(leaf, flat[path])
    assert channels.remove(model, weights.unflatten(flat), 0.99)[0] == {'hidden': (1, 1)}


@pytest.mark.parametrize(
    ('name', 'fields', 'message'),
    [
        ('densenet_40_12', {}, 'taken out of a DenseNet; they can of: LeNet, MLP, ResNet, VGG'),
        ('mlp', {'skip': True}, 'skip=True'),
        ('mlp', {'norm': 'layer'}, "model.norm is 'layer'; it must be one of none, batch"),
        ('resnext50_32x4d', {}, 'grouped'),
    ],
)
def test_networks_whose_channels_cannot_be_cut_say_why(name, fields, message):
    with pytest.raises(UserError, match=message):
        channels.check(make_model(name, **fields))
