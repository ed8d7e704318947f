"""GoogLeNet and Inception v3 against torchvision and timm."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity
from jaxcls import weights
from jaxcls.errors import UserError
from jaxcls.models import REFERENCES, inception, make_model
from parity import Pair, check_evaluation, import_or_skip, parameters, shapes_of
from parity import timm_model as tm
from parity import torchvision_model as tv

# Narrow references: torchvision's blocks, which take the kind of their convolutions.


def narrow(conv: type, width: float) -> type:
    """A kind of convolution with fewer channels."""

    class Narrow(conv):
        def __init__(self, inputs, outputs, **kwargs):
            inputs = inputs if inputs == 3 else round(inputs * width)
            super().__init__(inputs, round(outputs * width), **kwargs)

    return Narrow


def narrow_v1(width: float, published: bool = False):
    """torchvision's GoogLeNet; `published`: with 5x5 convolutions and without norms."""
    torch, their = import_or_skip('torch'), import_or_skip('torchvision.models.googlenet')

    class Bare(torch.nn.Module):
        def __init__(self, inputs, outputs, **kwargs):
            super().__init__()
            self.conv = torch.nn.Conv2d(inputs, outputs, **kwargs)

        def forward(self, x):
            return self.conv(x).relu()

    conv = narrow(Bare if published else their.BasicConv2d, width)

    class Published(their.Inception):
        def __init__(self, inputs, *channels):
            super().__init__(inputs, *channels, conv_block=conv)
            if published:
                self.branch3[1] = conv(*channels[3:5], kernel_size=5, padding=2)

    def auxiliary(inputs, classes, dropout):
        module = their.InceptionAux(inputs, classes, conv, dropout)
        module.fc1 = torch.nn.Linear(16 * round(128 * width), round(1024 * width))
        module.fc2 = torch.nn.Linear(round(1024 * width), classes)
        return module

    blocks = [conv, Published, auxiliary]
    module = their.GoogLeNet(5, True, False, False, blocks, dropout=0.0, dropout_aux=0.0)
    module.fc = torch.nn.Linear(round(1024 * width), 5)
    return module


def narrow_v3(width: float):
    """torchvision's Inception v3."""
    torch, their = import_or_skip('torch'), import_or_skip('torchvision.models.inception')
    conv = narrow(their.BasicConv2d, width)
    kinds = [getattr(their, f'Inception{kind}') for kind in ('A', 'B', 'C', 'D', 'E', 'Aux')]
    blocks = [conv, *(functools.partial(kind, conv_block=conv) for kind in kinds)]
    module = their.Inception3(5, True, False, blocks, False, dropout=0.0)
    module.fc = torch.nn.Linear(round(2048 * width), 5)
    module.AuxLogits.fc = torch.nn.Linear(round(768 * width), 5)
    return module


def narrow_timm(width: float):
    """timm's Inception v3."""
    torch, their = import_or_skip('torch'), import_or_skip('timm.models.inception_v3')
    with mock.patch.object(their, 'ConvNormAct', narrow(their.ConvNormAct, width)):
        module = their.InceptionV3(num_classes=5)
    module.fc = torch.nn.Linear(round(2048 * width), 5)
    return module


V1 = {'width': 1 / 8, 'dropout': 0.0, 'aux_dropout': 0.0}
V3 = {'width': 1 / 16, 'dropout': 0.0}
V3_TIMM = {**V3, 'aux_weight': 0.0}  # timm's default too
PUBLISHED = {**V1, 'norm': 'none', 'large_kernel': 5}
V1_PAIR = Pair('googlenet', lambda: narrow_v1(1 / 8), V1, 80)  # not even in any pool
V3_PAIR = Pair('inception_v3', lambda: narrow_v3(1 / 16), V3, 96)
EVALUATION = {
    'googlenet': V1_PAIR,
    'googlenet of 2014': Pair('googlenet', lambda: narrow_v1(1 / 8, True), PUBLISHED, 80),
    'inception_v3': V3_PAIR,
    'inception_v3 of timm': Pair('inception_v3', lambda: narrow_timm(1 / 16), V3_TIMM, 96, 'timm'),
}


@pytest.mark.parametrize('kind', EVALUATION)
def test_logits_equal_the_reference(kind):
    check_evaluation(EVALUATION[kind])


def test_timm_has_torchvisions_names_and_shapes_for_the_auxiliary_head_too():
    torch = import_or_skip('torch')
    with torch.device('meta'):
        ours = tm('inception_v3', aux_logits=True)().state_dict()
        theirs = tv('inception_v3', init_weights=False)().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# The smallest image whose activations are 17x17 at the auxiliary head is of 299x299.
TRAINING = [V1_PAIR, V3_PAIR._replace(size=299)]


@pytest.mark.slow
@pytest.mark.parametrize('pair', TRAINING, ids=lambda pair: pair.name)
def test_all_heads_and_the_gradient_of_their_losses_equal_the_reference(pair):
    check_gradients(pair)


@pytest.mark.slow
def test_gradients_equal_the_reference_with_the_first_blocks_only(monkeypatch):
    kept = ('3a', '3b', '4a', '4d')  # 4b and 4c keep the number of channels
    rows = {name: inception.V1_BLOCKS[name] for name in kept}
    monkeypatch.setattr(inception, 'V1_BLOCKS', rows)

    def shallow():
        torch, module = import_or_skip('torch'), narrow_v1(1 / 8)
        for name in ('inception4b', 'inception4c', 'inception4e', 'inception5a', 'inception5b'):
            setattr(module, name, torch.nn.Identity())
        module.maxpool4, module.fc = torch.nn.Identity(), torch.nn.Linear(528 // 8, 5)
        return module

    check_gradients(V1_PAIR._replace(reference=shallow))


def check_gradients(pair):
    """Asserts equal logits, running means and gradients of all heads' losses in training mode."""
    theirs = reference_step(pair)
    ours = our_step(pair, theirs['before'])
    assert ours['logits'].keys() == theirs['logits'].keys()
    for head, logits in theirs['logits'].items():
        assert parity.relative(ours['logits'][head], logits) < 1e-4, head
    largest = max(np.abs(theirs['arrays'][name]).max() for name in theirs['gradients'])
    assert set(theirs['arrays']) == {n for n in ours['arrays'] if not n.endswith('running_var')}
    for name, array in theirs['arrays'].items():
        scale = max(np.abs(array).max(), 1e-6 * largest)
        assert np.abs(ours['arrays'][name] - array).max() < 1e-4 * scale, name


AUX_WEIGHT = 0.3
BATCH = 4


def labelled(pair):
    return parity.images_of(pair.size, BATCH).astype(np.float64), np.arange(BATCH) % 5


def reference_step(pair):
    """All heads' logits, then gradients and running means by PyTorch's name, in float64."""
    torch = import_or_skip('torch')

    module = parity.torch_module(pair.reference).train().double()
    before = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    images, labels = labelled(pair)
    output = module(parity.nchw(images))._asdict()
    if 'aux_logits' in output:
        output['aux_logits1'] = output.pop('aux_logits')
    for head, logits in output.items():
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        (loss * (1 if head == 'logits' else AUX_WEIGHT)).backward(retain_graph=True)
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters()}
    means = {n: v.numpy() for n, v in module.state_dict().items() if n.endswith('running_mean')}
    logits = {head: value.detach().numpy() for head, value in output.items()}
    return {
        'before': before,
        'logits': logits,
        'gradients': set(gradients),
        'arrays': gradients | means,
    }


def our_step(pair, arrays):
    """The same of ours, out of the same weights."""
    images, labels = labelled(pair)
    wide = {'dtype': jnp.float64, 'param_dtype': jnp.float64}

    def loss(params):
        (logits, features), updates = model.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        heads = {'logits': logits, **{k: v for k, v in features.items() if 'aux' in k}}
        losses = {
            head: -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], 1).mean()
            for head, x in heads.items()
        }
        return losses.pop('logits') + AUX_WEIGHT * sum(losses.values()), (heads, updates)

    with jax.enable_x64(True):
        model, variables = parity.imported(pair._replace(fields=pair.fields | wide), arrays)
        step = jax.jit(jax.grad(loss, has_aux=True))
        gradients, (heads, updates) = step(variables['params'])
        ours = weights.state_dict(model, {'params': gradients, **updates}, pair.scheme)
    return {'logits': heads, 'arrays': ours}


FULL = [
    Pair('googlenet', tv('googlenet', init_weights=False, aux_logits=True), {}, 224),
    Pair('inception_v3', tv('inception_v3', init_weights=False), {}, 299),
    Pair('inception_v3', tm('inception_v3'), {'aux_weight': 0.0}, 299, 'timm'),
]


@pytest.mark.slow
@pytest.mark.parametrize('pair', FULL, ids=lambda pair: f'{pair.name}-{pair.scheme}')
def test_full_size_logits_equal_the_reference(pair):
    check_evaluation(pair)


@pytest.mark.parametrize(
    ('name', 'without'), [('googlenet', 6_624_904), ('inception_v3', 23_834_568)]
)
def test_parameter_count_without_the_heads_is_that_of_the_literature(name, without):
    known = REFERENCES[name]
    model = make_model(name, num_classes=known.num_classes, aux_weight=0.0)
    assert parameters(shapes_of(model, known.image_shape[0])) == without


def training_outputs(model, size):
    keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(keys, x, train=True)[0], image)


# name, stem, size of the image -> sizes of the last map and of that before the last stage.
SIZES = [
    ('googlenet', 'large', 224, 7, 14),
    ('googlenet', 'small', 32, 8, 16),
    ('inception_v3', 'large', 299, 8, 17),
    ('inception_v3', 'large', 75, 1, 3),
    ('inception_v3', 'small', 32, 7, 15),
]
HEADS = {'googlenet': ['aux_logits1', 'aux_logits2'], 'inception_v3': ['aux_logits1']}


@pytest.mark.parametrize(('name', 'stem', 'size', 'last', 'middle'), SIZES)
def test_auxiliary_heads_take_maps_of_any_size(name, stem, size, last, middle):
    model = make_model(name, num_classes=7, stem=stem, dtype=jnp.bfloat16)
    logits, features = training_outputs(model, size)
    for out in (logits, *(features[head] for head in HEADS[name])):
        assert (out.shape, out.dtype) == ((2, 7), jnp.float32)
    assert features['stage2'].shape[1:3] == (middle, middle)
    assert features['stage3'].shape[1:3] == (last, last)


@pytest.mark.parametrize('name', inception.MODELS)
def test_auxiliary_heads_run_in_training_only_and_can_be_left_out(name):
    model = make_model(name, stem='small')
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = weights.unflatten(shapes_of(model, 32))
    _, evaluated = jax.eval_shape(functools.partial(model.apply, train=False), variables, image)
    _, without = training_outputs(model.clone(aux_weight=0.0), 32)
    assert set(evaluated) == {'stem', 'stage1', 'stage2', 'stage3', 'pooled'} == set(without)


def test_the_small_stem_of_inception_v3_has_the_weights_of_the_large_one():
    large, small = (make_model('inception_v3', stem=stem) for stem in ('large', 'small'))
    assert shapes_of(large, 299) == shapes_of(small, 32)


def test_width_scales_all_channels():
    whole, half = (
        {
            path: leaf.shape[-1]
            for path, leaf in shapes_of(make_model('googlenet', norm='none', width=w), 64).items()
            if path.endswith('kernel') and 'head' not in path
        }
        for w in (1.0, 0.5)
    )
    assert {path: size // 2 for path, size in whole.items()} == half


def test_dropout_acts_before_each_head():
    rates = {'dropout': 0.5, 'aux_dropout': 0.5}
    model = make_model('googlenet', width=1 / 16, stem='small', norm='none', **rates)
    variables = random_variables(model, 8)

    @jax.jit
    @jax.vmap
    def run(key):
        return model.apply(variables, parity.images_of(8), train=True, rngs={'dropout': key})[1]

    features = jax.device_get(run(jax.random.split(jax.random.key(0), 2)))
    for head in HEADS['googlenet']:
        assert np.any(features[head][0] != features[head][1])
    np.testing.assert_array_equal(*features['stage3'])
    kept = features['pooled'] != 0
    whole = features['stage3'].mean(axis=(2, 3))
    np.testing.assert_allclose(features['pooled'][kept], 2 * whole[kept], rtol=1e-5)
    assert 0.3 < kept[whole != 0].mean() < 0.7


def random_variables(model, size):
    rng = np.random.default_rng(0)
    return weights.unflatten(
        {
            path: rng.standard_normal(leaf.shape, np.float32) * np.prod(leaf.shape[:-1]) ** -0.5
            for path, leaf in shapes_of(model, size).items()
        }
    )


@pytest.mark.parametrize(
    ('name', 'field', 'value'),
    [
        ('googlenet', 'large_kernel', 4),
        ('googlenet', 'large_kernel', 0),
        ('googlenet', 'aux_dropout', 1.0),
        ('googlenet', 'aux_weight', -0.1),
        ('googlenet', 'width', 0.0),
        ('inception_v3', 'width', -1.0),
        ('inception_v3', 'stem', 'deep'),
        ('inception_v3', 'aux_weight', float('nan')),
        ('googlenet', 'width', float('inf')),
    ],
)
def test_fields_out_of_range_are_refused(name, field, value):
    with pytest.raises(UserError, match=field):
        make_model(name, **{field: value})
