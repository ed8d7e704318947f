"""LeNet-5 against the paper's figures, AlexNet against torchvision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxcls.errors import UserError
from jaxcls.models import layers, make_model
from jaxcls.models.references import CONV, DENSE, flattened
from parity import (
    Pair,
    check_evaluation,
    check_training,
    images_of,
    nchw,
    relative,
    torch_module,
    torchvision_model,
)

# LeNet-5 of 1998

# Table I of the paper: rows are the maps of S2, columns those of C3.
TABLE_I = """
X . . . X X X . . X X X X . X X
X X . . . X X X . . X X X X . X
X X X . . . X X X . . X . X X X
. X X X . . X X X X . . X . X X
. . X X X . . X X X X . X X . X
. . . X X X . . X X X X . X X X
"""
CONNECTED = np.array([[c == 'X' for c in row.split()] for row in TABLE_I.split('\n') if row])


def lenet_of_the_paper():
    """LeNet-5 in PyTorch for 32x32 images, with the softmax's linear layer in place of the RBF."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def squash(x):
        return 1.7159 * torch.tanh(x * 2 / 3)

    class LeNet5(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c3 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
            self.c5, self.f6, self.head = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
            self.s2 = nn.ParameterDict({'weight': torch.ones(6), 'bias': torch.zeros(6)})
            self.s4 = nn.ParameterDict({'weight': torch.ones(16), 'bias': torch.zeros(16)})

        def subsample(self, x, layer):
            four = sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
            return squash(four * layer['weight'][:, None, None] + layer['bias'][:, None, None])

        def forward(self, x):
            x = self.subsample(squash(self.c1(x)), self.s2)
            connected = torch.from_numpy(CONNECTED.T[:, :, None, None].astype(np.float32))
            x = squash(F.conv2d(x, self.c3.weight * connected, self.c3.bias))
            x = self.subsample(x, self.s4).flatten(1)
            return self.head(squash(self.f6(squash(self.c5(x)))))

    return LeNet5()


def of_the_paper(arrays):
    """That module's parameters, or their gradients, as our tree."""
    ours = {
        'c1/conv/kernel': CONV.to_ours(arrays['c1.weight'], ()),
        'c3/kernel': arrays['c3.weight'][CONNECTED.T].transpose(1, 2, 0),  # map after map of C3
        'c5/dense/kernel': flattened(5).to_ours(arrays['c5.weight'], (400, 120)),
        'f6/dense/kernel': DENSE.to_ours(arrays['f6.weight'], ()),
        'head/kernel': DENSE.to_ours(arrays['head.weight'], ()),
        's2/scale': arrays['s2.weight'],
        's4/scale': arrays['s4.weight'],
    }
    for name in ('c1/conv', 's2', 'c3', 's4', 'c5/dense', 'f6/dense', 'head'):
        ours[f'{name}/bias'] = arrays[f'{name[:2] if name != "head" else name}.bias']
    return traverse_util.unflatten_dict(ours, sep='/')


def test_lenet_of_1998_has_the_logits_and_gradients_of_the_paper():
    module = torch_module(lenet_of_the_paper)
    module.s2['weight'].data *= 0.25
    module.s4['weight'].data *= 0.25
    images = images_of(28, batch=3, channels=1)
    logits = module(nchw(np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))))
    (logits**2).sum().backward()
    params = of_the_paper({k: v.detach().numpy() for k, v in module.named_parameters()})
    theirs = of_the_paper({k: v.grad.numpy() for k, v in module.named_parameters()})
    model = make_model('lenet5_1998')

    def loss(params):
        logits, _ = model.apply({'params': params}, images, train=True)
        return (logits**2).sum(), logits

    ours, ours_logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative(ours_logits, logits.detach().numpy()) < 1e-5
    errors = jax.tree.map(relative, ours, theirs)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


@pytest.fixture(scope='module')
def lenet_1998():
    init = jax.jit(make_model('lenet5_1998').init)
    return jax.device_get(init(jax.random.key(0), jnp.zeros((1, 28, 28, 1))))['params']


def test_every_layer_has_the_parameters_that_the_paper_counts(lenet_1998):
    counts = {k: sum(p.size for p in jax.tree.leaves(v)) for k, v in lenet_1998.items()}
    paper = {'c1': 156, 's2': 12, 'c3': 1516, 's4': 32, 'c5': 48_120, 'f6': 10_164}
    assert counts == {**paper, 'head': 850}
    assert sum(paper.values()) == 60_000


def test_every_layer_starts_uniform_within_the_bound_of_its_fan_in(lenet_1998):
    bounds = {'c1': 25, 'c5': 400, 'f6': 120, 'head': 84, 's2': 4, 's4': 4}
    for name, fan_in in bounds.items():
        (weights,) = (p for p in jax.tree.leaves(lenet_1998[name]) if np.any(p))
        assert 0.75 * 2.4 / fan_in < np.abs(weights).max() <= 2.4 / fan_in, name
    ends = np.cumsum(CONNECTED.sum(0))
    for kernel, count in zip(
        np.split(lenet_1998['c3']['kernel'], ends[:-1], -1), CONNECTED.sum(0), strict=True
    ):
        assert 0.9 * 2.4 < np.abs(kernel).max() * 25 * count <= 2.4


def test_the_scaled_tanh_is_1_at_1():
    squash = layers.ACTIVATIONS['scaled_tanh']
    np.testing.assert_allclose(
        squash(jnp.array([-1.0, 0.0, 1.0, 99.0])), [-1, 0, 1, 1.7159], atol=1e-5
    )


# AlexNet

NARROW = {'widths': (4, 6, 5, 4, 3), 'hidden': (8, 7), 'dropout': 0.0}


def narrow_alexnet(stem, pool_size):
    """torchvision's AlexNet, which has no argument for its widths, with those of `NARROW`."""

    def make():
        models = pytest.importorskip('torchvision.models', exc_type=ImportError)
        from torch import nn

        module = models.alexnet(num_classes=5, dropout=0.0)
        channels = (3, *NARROW['widths'])
        shapes = (stem, (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        for i, place in enumerate((0, 3, 6, 8, 10)):
            module.features[place] = nn.Conv2d(*channels[i : i + 2], *shapes[i])
        module.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        module.classifier[1] = nn.Linear(3 * pool_size**2, 8)
        module.classifier[4] = nn.Linear(8, 7)
        module.classifier[6] = nn.Linear(7, 5)
        return module

    return make


LARGE = narrow_alexnet((11, 4, 2), 6)
EVALUATION = {
    'large': Pair('alexnet', LARGE, NARROW, size=224),
    'averaged to more pixels': Pair('alexnet', LARGE, NARROW, size=160),
    'averaged to fewer pixels': Pair('alexnet', LARGE, NARROW, size=256),
    'small': Pair('alexnet_small', narrow_alexnet((3, 1, 1), 3), NARROW, size=32),
}


@pytest.mark.parametrize('kind', EVALUATION)
def test_logits_equal_the_reference(kind):
    check_evaluation(EVALUATION[kind])


def test_a_step_of_sgd_equals_the_reference():
    check_training(EVALUATION['averaged to more pixels'])


@pytest.mark.parametrize(
    ('name', 'size', 'maps'), [('alexnet', 224, (55, 27, 13)), ('alexnet_small', 32, (32, 15, 7))]
)
def test_maps_have_the_documented_sizes(name, size, maps):
    model = make_model(name, norm='batch', dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    init = functools.partial(model.init_with_output, train=False)
    (logits, features), variables = jax.eval_shape(init, jax.random.key(0), image)
    assert (logits.shape, logits.dtype) == ((1, 10), jnp.float32)
    assert {f.dtype for f in features.values()} == {jnp.dtype('bfloat16')}
    convs = [features[f'conv{i}'].shape[1:] for i in range(1, 6)]
    pixels = (*maps, maps[2], maps[2])
    assert convs == [(n, n, w) for n, w in zip(pixels, (64, 192, 384, 256, 256), strict=True)]
    assert features['pooled'].shape[1] == variables['params']['head']['kernel'].shape[0]
    assert list(variables['batch_stats']) == [f'conv{i}' for i in range(1, 6)]


def test_dropout_is_in_front_of_the_hidden_layers_in_training_only():
    fields = {**NARROW, 'hidden': (64,), 'activation': 'softplus'}
    plain = make_model('alexnet_small', **fields)
    noisy = make_model('alexnet_small', **{**fields, 'dropout': 0.5})
    images = images_of(16)

    @jax.jit
    def hidden(key):
        variables = plain.init(key, images)
        noise = {'rngs': {'dropout': jax.random.key(1)}}
        return (
            plain.apply(variables, images, train=True)[1]['hidden1'],
            noisy.apply(variables, images, train=False)[1]['hidden1'],
            noisy.apply(variables, images, train=True, **noise)[1]['hidden1'],
        )

    never, evaluated, trained = hidden(jax.random.key(0))
    np.testing.assert_array_equal(never, evaluated)
    assert not np.allclose(never, trained)
    assert (trained > 0).all()


@pytest.mark.parametrize(
    ('name', 'fields', 'message'),
    [
        ('alexnet', {'widths': (8, 8)}, 'widths is (8, 8); it must be five numbers'),
        ('alexnet', {'stem': 'smal'}, "Unknown stem 'smal'. Did you mean 'small'"),
        ('alexnet', {'pool_size': 0}, 'pool_size=0'),
        ('lenet5_1998', {'padding': -1}, 'padding is -1; it must be at least 0'),
    ],
)
def test_a_mistake_is_named(name, fields, message):
    with pytest.raises(UserError) as error:
        make_model(name, **fields)
    assert message in str(error.value)


def alexnet_small():
    """torchvision's AlexNet with a stem and hidden layers for 32x32 images."""
    from torch import nn

    module = torchvision_model('alexnet')()
    module.features[0] = nn.Conv2d(3, 64, 3, 1, 1)
    module.avgpool = nn.Identity()
    module.classifier[1] = nn.Linear(256 * 3 * 3, 512)
    module.classifier[4] = nn.Linear(512, 512)
    module.classifier[6] = nn.Linear(512, 5)
    return module


FULL_SIZE = [
    Pair('alexnet', torchvision_model('alexnet'), size=224),
    Pair('alexnet_small', alexnet_small, size=32),
]


@pytest.mark.slow
@pytest.mark.parametrize('pair', FULL_SIZE, ids=lambda pair: pair.name)
def test_full_size_logits_equal_the_reference(pair):
    check_evaluation(pair)
