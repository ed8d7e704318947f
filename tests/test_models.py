"""Models: sizes against the literature, shapes over the registry, training laws, PyTorch parity."""

import functools
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.errors import UserError
from jaxcls.models import MODELS, REFERENCES, layers, make_model
from jaxcls.registry import defaults

TINY_RESNET = {'stage_sizes': (1, 1), 'num_filters': 4}
ONE_BLOCK = {'stage_sizes': (1,), 'num_filters': 4}

# Representatives of every kind of network, small enough to run.
TINY = {
    'linear': ('linear', {}),
    'mlp': ('mlp', {'hidden': (8, 8), 'norm': 'batch'}),
    'lenet5': ('lenet5', {'activation': 'tanh', 'pool': 'avg'}),
    'lenet_small': ('lenet_small', {'filters': (4, 4)}),
    'lenet5_1998': ('lenet5_1998', {}),
    'alexnet': ('alexnet_small', {'widths': (4,) * 5, 'hidden': (8, 8), 'dropout': 0.0}),
    'vgg': (
        'vgg11_bn',
        {'stage_sizes': (1, 1), 'widths': (4, 8), 'hidden': (8,), 'pool_size': 1, 'dropout': 0.0},
    ),
    'dbn': ('dbn', {'hidden': (8, 8)}),
    'googlenet': (
        'googlenet',
        {'width': 0.06, 'stem': 'small', 'dropout': 0.0, 'aux_dropout': 0.0},
    ),
    'inception_v3': ('inception_v3', {'width': 0.06, 'stem': 'small', 'dropout': 0.0}),
    'resnet': ('resnet20', TINY_RESNET),
    'bottleneck-d': ('resnet50d', TINY_RESNET),
    'wrn': ('wrn16_4', {**TINY_RESNET, 'width': 2}),
    'resnext': ('resnext50_32x4d', {**TINY_RESNET, 'groups': 2, 'group_width': 2, 'squeeze': 2}),
    'group norm': ('resnet20', {**TINY_RESNET, 'norm': 'group'}),
    'no norm': ('preact_resnet20', {**TINY_RESNET, 'norm': 'none'}),
    'densenet': ('densenet_bc_100_12', {'stage_sizes': (2, 1), 'growth_rate': 4, 'num_filters': 4}),
    'mobilenet': (
        'mobilenet_v2',
        {'width': 0.1, 'depth': 0.1, 'stem': 'small', 'dropout': 0.0},
    ),
    'convnext': ('convnext_tiny', {'stage_sizes': (1, 1), 'widths': (4, 8), 'stem': 'small'}),
    'vit': ('vit_ti16', {'patch_size': 4, 'depth': 1, 'width': 8, 'heads': 2}),
    'airbench': ('airbench94', {'widths': (4, 4, 4)}),
}
# Pixels of a side, where 16 are too few.
SIDES = {'inception_v3': 32, 'airbench': 32, 'lenet5_1998': 28}


def images_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


# Compiling is nearly all the work here, most of all that of random bits: hence numpy's below.


def shapes_of(model, shape):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def random_variables(model, images):
    """He-normal kernels, and all else near where `model.init` starts it, without compiling."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1] == 'kernel':
            return jnp.asarray(noise * np.float32(np.sqrt(2 / math.prod(leaf.shape[:-1]))))
        return jnp.asarray(0.1 * np.abs(noise) + (path[-1] in ('scale', 'var')))

    shapes = flax.traverse_util.flatten_dict(shapes_of(model, images.shape))
    return flax.traverse_util.unflatten_dict({p: draw(p, leaf) for p, leaf in shapes.items()})


@functools.cache
def tiny(kind):
    name, fields = TINY[kind]
    model = make_model(name, num_classes=3, **fields)
    return model, random_variables(model, tiny_images(kind))


def tiny_images(kind, seed=0):
    side = SIDES.get(kind, 16)
    return images_of(4, side, side, 1, seed=seed)


def gradients_of(model, variables, images, rngs=None):
    def loss(params):
        out, updates = model.apply(
            {**variables, 'params': params}, images, train=True, rngs=rngs, mutable=['batch_stats']
        )
        logits, features = out
        auxiliary = [value for name, value in features.items() if name.startswith('aux_logits')]
        losses = [-jax.nn.log_softmax(values)[:, 0].mean() for values in (logits, *auxiliary)]
        return sum(losses), (logits, updates)

    gradients, (logits, updates) = jax.grad(loss, has_aux=True)(variables['params'])
    return gradients, logits, updates


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Sizes


@pytest.mark.parametrize(
    ('name', 'size', 'channels', 'fields', 'expected'),
    [
        ('linear', 28, 1, {}, 7_850),
        ('mlp', 28, 1, {'hidden': (512, 256)}, 784 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10),
        ('lenet5', 28, 1, {}, 61_706),
        ('lenet5', 32, 1, {'padding': (0, 0)}, 61_706),
        ('resnet18', 32, 3, {'stem': 'small'}, 11_173_962),
    ],
)
def test_parameter_count_is_that_of_the_literature(name, size, channels, fields, expected):
    params = shapes_of(make_model(name, **fields), (1, size, size, channels))['params']
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected


# Siblings that differ from a shallower one in their sizes alone, and take seconds to trace.
DEEP = {
    'convnext_small', 'convnext_base', 'densenet161', 'densenet169', 'densenet201', 'densenet_bc_100_12',
    'densenet_bc_190_40', 'efficientnet_b1', 'efficientnet_b2', 'efficientnet_b3', 'efficientnet_b4',
    'preact_resnet110', 'preact_resnet164', 'resnet101', 'resnet101d', 'resnet110', 'resnet152',
}  # fmt: skip


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n in DEEP)) for n in MODELS]
)
def test_every_model_has_as_many_parameters_as_published(name):
    known = REFERENCES[name]
    model = make_model(name, num_classes=known.num_classes)
    params = shapes_of(model, (1, *known.image_shape))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == known.parameters


def test_every_published_figure_is_of_a_model():
    assert set(REFERENCES) == set(MODELS)


def shallow(name, **kwargs):
    """The model with one block a stage: tracing deep ones takes most of a second each."""
    fields = defaults(MODELS[name])
    if 'stage_sizes' in fields:
        fields['stage_sizes'] = (1,) * len(fields['stage_sizes'])
    if name.startswith(('vit', 'efficientnet', 'mobilenet')):
        fields['depth'] = type(fields['depth'])(
            max(1, 0.1 * fields['depth']) if 'vit' in name else 0.1
        )
    return make_model(name, **{**fields, **kwargs})


# With one block a stage, many are the same network.
SHALLOW = list({(shallow(n), REFERENCES[n].image_shape): n for n in reversed(MODELS)}.values())[
    ::-1
]


def image_of(name):
    """The published shape of an image, at most 96 pixels a side where that will do."""
    height, width, channels = REFERENCES[name].image_shape
    if name.startswith(('vit', 'alexnet', 'inception')) or height < 96:
        return height, width, channels
    return 96, 96, channels


@pytest.mark.parametrize('name', SHALLOW)
def test_every_model_follows_the_protocol_in_bfloat16(name):
    model = shallow(name, num_classes=7, dtype=jnp.bfloat16)
    height, width, channels = image_of(name)
    variables = shapes_of(model, (2, height, width, channels))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    images = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    apply = functools.partial(model.apply, train=False)
    logits, features = jax.eval_shape(apply, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert {f.dtype for f in features.values()} == {jnp.dtype('bfloat16')}
    assert all(f.shape[0] == 2 for f in features.values())
    kernel = variables['params']['head']['kernel']
    assert features['pooled'].shape == (2, kernel.shape[0])


@pytest.mark.parametrize('name', [n for n in SHALLOW if 'resnet' in n or 'wrn' in n])
def test_a_resnet_takes_images_of_any_size(name):
    model = shallow(name)
    variables = shapes_of(model, (1, 32, 32, 3))
    odd = jax.ShapeDtypeStruct((1, 45, 39, 3), jnp.float32)
    logits, features = jax.eval_shape(functools.partial(model.apply, train=False), variables, odd)
    assert logits.shape == (1, 10)
    stages = [f'stage{i + 1}' for i in range(len(model.stage_sizes))]
    assert {'stem', 'pooled', *stages} <= set(features)
    height = [features[stage].shape[1] for stage in stages]
    assert height[1:] == [math.ceil(h / 2) for h in height[:-1]]


def test_parameters_take_param_dtype():
    variables = shapes_of(make_model('resnet20', param_dtype=jnp.bfloat16), (1, 32, 32, 3))
    assert {p.dtype for p in jax.tree.leaves(variables['params'])} == {jnp.dtype('bfloat16')}
    assert {s.dtype for s in jax.tree.leaves(variables['batch_stats'])} == {jnp.dtype('float32')}


@pytest.mark.parametrize('name', MODELS)
def test_defaults_given_as_arguments_build_the_same_model(name):
    assert make_model(name, **defaults(MODELS[name])) == make_model(name)


def test_sizes_may_be_lists_as_json_has_them():
    a = make_model('mlp', hidden=[8, 4]), make_model('resnet20', stage_sizes=[1, 1])
    b = make_model('mlp', hidden=(8, 4)), make_model('resnet20', stage_sizes=(1, 1))
    shape = (1, 8, 8, 3)
    assert [shapes_of(m, shape) for m in a] == [shapes_of(m, shape) for m in b]


def test_lenet_small_takes_8x8_images():
    model = make_model('lenet_small')
    assert shapes_of(model, (1, 8, 8, 1))['params']['hidden1']['dense']['kernel'].shape == (
        256,
        128,
    )


# Training


@pytest.mark.parametrize(
    'kind',
    # These take 10 s and more to compile; their gradients are compared in their own tests.
    [
        pytest.param(k, marks=pytest.mark.slow) if 'ception' in k or 'google' in k else k
        for k in TINY
    ],
)
def test_training_moves_every_parameter_and_only_training_moves_the_statistics(kind):
    model, variables = tiny(kind)
    traces = []

    @jax.jit
    def step(variables, images):
        traces.append(1)
        gradients, _, updates = gradients_of(model, variables, images)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], gradients)
        _, eval_updates = model.apply(variables, images, train=False, mutable=['batch_stats'])
        return {'params': params, **updates}, gradients, eval_updates

    state, gradients, eval_updates = jax.device_get(step(variables, tiny_images(kind)))
    state = jax.device_get(step(state, tiny_images(kind, seed=1))[0])
    assert len(traces) == 1
    assert jax.tree.structure(state) == jax.tree.structure(variables)
    for path, gradient in flax.traverse_util.flatten_dict(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0) != (path[-1] == 'whitening'), path
    before, after = (jax.device_get(v.get('batch_stats', {})) for v in (variables, state))
    assert bool(after) == (getattr(model, 'norm', 'none') == 'batch')
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))
    assert_trees_equal(eval_updates.get('batch_stats', {}), before)


def test_every_kind_of_network_has_a_tiny_one():
    assert {type(make_model(name)) for name in MODELS} == {type(tiny(kind)[0]) for kind in TINY}


@pytest.mark.parametrize(
    'kind', [pytest.param(k, marks=pytest.mark.slow) if k == 'googlenet' else k for k in TINY]
)
def test_every_kind_of_network_runs_in_bfloat16_close_to_float32(kind):
    model, variables = tiny(kind)
    images = tiny_images(kind)
    (logits, _), (wide, features) = (
        jax.jit(lambda v, x, m=m: m.apply(v, x, train=False))(variables, images)
        for m in (model.clone(dtype=jnp.bfloat16), model)
    )
    assert logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
    assert relative_error(logits, wide) < 0.1
    # The head is the only thing between 'pooled' and the logits: another one can take its place.
    head = variables['params']['head']
    linear = features['pooled'] @ head['kernel'] + head.get('bias', 0)
    scale = getattr(model, 'logit_scale', 1.0)
    np.testing.assert_allclose(wide, scale * linear, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', TINY)
def test_every_kind_of_network_takes_images_of_other_sizes(kind):
    model, side = tiny(kind)[0], SIDES.get(kind, 16)
    for height, width in ((side + 8, side + 8), (side + 4, side)):
        variables = shapes_of(model, (2, height, width, 3))
        images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
        apply = functools.partial(model.apply, train=False)
        logits, features = jax.eval_shape(apply, variables, images)
        assert logits.shape == (2, 3)
        assert features['pooled'].shape == (2, variables['params']['head']['kernel'].shape[0])


def test_eval_of_an_example_does_not_depend_on_its_batch():
    model, variables = tiny('wrn')
    images = images_of(4, 16, 16, 1)
    predict = jax.jit(lambda images: model.apply(variables, images, train=False)[0])
    np.testing.assert_allclose(predict(images)[:1], predict(images[:1]), rtol=1e-4, atol=1e-6)


def test_batch_norm_keeps_nine_tenths_of_its_statistics():
    model = make_model('mlp', hidden=(4,), norm='batch', kernel_init='orthogonal')
    images = images_of(8, 2, 2, 1)
    variables = random_variables(model, images)
    variables['batch_stats'] = {'hidden1': {'norm': {'mean': jnp.zeros(4), 'var': jnp.ones(4)}}}
    _, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
    kernel = variables['params']['hidden1']['dense']['kernel']
    hidden = images.reshape(8, 4) @ kernel
    stats = updates['batch_stats']['hidden1']['norm']
    np.testing.assert_allclose(stats['mean'], 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * hidden.var(0), rtol=1e-4)


@pytest.mark.parametrize(
    ('name', 'fields'),
    [
        ('mlp', {'dropout': 0.5}),
        ('lenet_small', {'dropout': 0.5, 'norm': 'none'}),
        ('preact_resnet20', {**ONE_BLOCK, 'dropout': 0.5, 'norm': 'none'}),
        ('resnet20', {**ONE_BLOCK, 'dropout': 0.5, 'norm': 'none'}),
        ('resnet20', {**ONE_BLOCK, 'drop_path': 0.5, 'norm': 'none'}),
        ('preact_resnet20', {**ONE_BLOCK, 'drop_path': 0.5, 'norm': 'none'}),
        ('densenet_bc_100_12', {**TINY['densenet'][1], 'dropout': 0.5, 'norm': 'none'}),
        ('convnext_tiny', {**TINY['convnext'][1], 'dropout': 0.5}),
        ('convnext_tiny', {**TINY['convnext'][1], 'drop_path': 0.5}),
        ('vit_ti16', {**TINY['vit'][1], 'dropout': 0.5}),
        ('vit_ti16', {**TINY['vit'][1], 'drop_path': 0.5}),
    ],
)
def test_dropout_is_random_in_training_only_and_rate_0_is_the_plain_network(name, fields):
    images = images_of(8, 8, 8, 1)
    rates = {rate: 0.0 for rate in ('dropout', 'drop_path') if rate in fields}
    plain, noisy = make_model(name, **{**fields, **rates}), make_model(name, **fields)
    variables = random_variables(noisy, images)

    @jax.jit
    def all_of_them(key):
        def logits(model, train, rngs):
            return model.apply(variables, images, train=train, rngs=rngs)[0]

        never_random = logits(plain, False, {}), logits(plain, True, {}), logits(noisy, False, {})
        return never_random, logits(noisy, True, {'dropout': key})

    never_random, first = all_of_them(jax.random.key(1))
    _, again = all_of_them(jax.random.key(1))
    _, second = all_of_them(jax.random.key(2))
    for logits in never_random:
        np.testing.assert_allclose(logits, never_random[0], rtol=1e-6)
        assert not np.allclose(first, logits)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(lambda: noisy.apply(variables, images, train=True))


class DropPath(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, *, train):
        return layers.drop_path(x, self.rate, train=train)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 2, 3))
    apply = jax.jit(functools.partial(DropPath(0.2).apply, {}, train=True))
    y = apply(x, rngs={'dropout': jax.random.key(0)})
    per_example = np.asarray(y).reshape(4000, -1)
    assert (per_example == per_example[:, :1]).all()
    assert set(np.unique(per_example)) == {np.float32(0), np.float32(1.25)}
    np.testing.assert_allclose(y.mean(), 1, atol=0.03)
    np.testing.assert_array_equal(DropPath(0.2).apply({}, x, train=False), x)


def test_drop_path_grows_linearly_to_its_rate():
    np.testing.assert_allclose(layers.drop_path_rates(0.2, 4), [0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize('fields', [{}, {'norm': 'none'}, {'preactivation': True}])
def test_zero_init_residual_starts_as_the_identity(fields):
    model = make_model('resnet18', **ONE_BLOCK, stem='small', zero_init_residual=True, **fields)
    images = images_of(2, 8, 8, 3)
    _, features = jax.jit(model.apply)(random_variables(model, images), images)
    assert not np.allclose(features['stage1'], features['stem'])
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, features = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(features['stage1'], features['stem'], rtol=1e-6)


# Mistakes


@pytest.mark.parametrize(
    ('name', 'fields', 'message'),
    [
        ('resnet21', {}, "Unknown model 'resnet21'. Did you mean 'resnet"),
        ('resnet20', {'activaton': 'relu'}, "Did you mean 'activation'"),
        ('resnet20', {'activation': 'rleu'}, "Unknown activation 'rleu'. Did you mean 'relu'"),
        ('resnet20', {'norm': 'bach'}, "Unknown norm 'bach'. Did you mean 'batch'"),
        ('mlp', {'kernel_init': 'he_norm'}, "Unknown kernel_init 'he_norm'. Did you mean 'he_"),
        ('lenet5', {'head_init': 'zero'}, "Unknown head_init 'zero'. Did you mean 'zeros'"),
        ('lenet5', {'pool': 'mean'}, "Unknown pool 'mean'. Known: avg, max"),
        ('resnet20', {'stem': 'smal'}, "Unknown stem 'smal'. Did you mean 'small'"),
        ('resnet20', {'shortcut': 'pads'}, "Unknown shortcut 'pads'. Did you mean 'pad'"),
        ('resnet20', {'branch': 'bottle'}, "Unknown branch 'bottle'"),
        ('mlp', {'dropout': 1.0}, 'dropout=1.0 is not a rate: expected 0 <= dropout < 1'),
        ('resnet20', {'drop_path': -0.1}, 'drop_path=-0.1'),
        ('mlp', {'hidden': (0,)}, 'hidden=(0,): expected whole numbers of at least 1'),
        ('mlp', {'num_classes': 0}, 'num_classes=0'),
        ('resnet20', {'stage_sizes': (3, 2.5)}, 'stage_sizes=(3, 2.5)'),
        ('resnet20', {'stage_sizes': ()}, 'stages=0'),
        ('wrn16_4', {'width': 0}, 'width=0'),
        ('lenet5', {'padding': (2,)}, 'padding=(2,) with filters=(6, 16): expected one number'),
        ('lenet5', {'padding': (2, 10**11)}, 'below 2^31'),
        ('lenet5', {'hidden': (10**23,)}, 'expected less than 2^31'),
        ('resnet20', {'norm_momentum': 2}, 'norm_momentum is 2; it must be 0 to 1'),
        ('vit_ti16', {'norm_epsilon': -1}, 'norm_epsilon is -1; it must be at least 0 and finite'),
        ('vit_ti16', {'mlp_ratio': 1e300}, 'mlp_ratio is 1e+300'),
        (
            'mobilenet_v2',
            {'width': 1e300},
            'width is 1e+300; it must be above 0 and finite, at most 1000',
        ),
        ('mobilenet_v2', {'depth': 1e5}, 'depth is 100000.0'),
        ('convnext_tiny', {'width': 1e300}, 'width is 1e+300'),
        ('googlenet', {'width': 1e300}, 'width is 1e+300'),
        (
            'resnext50_32x4d',
            {'groups': 3, 'group_width': 0},
            'groups is 3; it must be a divisor of num_f',
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_compiled(name, fields, message):
    with pytest.raises(UserError) as error:
        make_model(name, **fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('name', 'images', 'message'),
    [
        ('lenet5', jnp.zeros((1, 4, 4, 1)), 'got 2x2 activations, expected at least 5x5'),
        ('lenet_small', jnp.zeros((1, 1, 9, 1)), 'max pool got 1x9 activations'),
        ('resnet20', jnp.zeros((32, 32, 3)), 'Got images float32[32, 32, 3], expected floats'),
        ('mlp', jnp.zeros((1, 8, 8, 1), jnp.uint8), 'Got images uint8[1, 8, 8, 1]'),
    ],
)
def test_images_that_do_not_fit_are_named_while_tracing(name, images, message):
    with pytest.raises(UserError) as error:
        shapes = functools.partial(make_model(name).init, train=False)
        jax.eval_shape(shapes, jax.random.key(0), images)
    assert message in str(error.value)


# Layers


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_bias_of_few_features_has_the_sum_of_the_gradients(dtype):
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6, 3)), dtype)
    expected = np.asarray(gradient, np.float64).sum((0, 1, 2))
    bias = jnp.zeros(3, dtype)
    found = jax.vjp(layers.add_bias, gradient, bias)[1](gradient)[1]
    for total in (found, layers._sum_by_rows(gradient)):
        assert total.dtype == dtype
        np.testing.assert_allclose(total.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


def test_partial_avg_pool_averages_what_is_there():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    y = layers.avg_pool(x, 2, 2, partial=True)[0, :, :, 0]
    np.testing.assert_allclose(y, [[3, 5, 6.5], [10.5, 12.5, 14]])
    np.testing.assert_allclose(layers.avg_pool(x, 2, 2)[0, :, :, 0], [[3, 5]])


def test_a_group_has_16_channels_or_the_next_divisor():
    counts = {c: layers.group_count(c) for c in (1, 4, 7, 16, 24, 64, 75, 100)}
    assert counts == {1: 1, 4: 1, 7: 1, 16: 1, 24: 1, 64: 4, 75: 3, 100: 5}


@pytest.mark.parametrize(
    ('norm', 'split', 'axes'),
    [
        ('batch', (4, 5, 1, 32), (0, 1, 2)),
        ('group', (4, 5, 2, 16), (1, 3)),
        ('layer', (4, 5, 1, 32), (3,)),
    ],
)
def test_a_norm_has_mean_0_and_variance_1_over_its_axes(norm, split, axes):
    x = 3 + 2 * images_of(4, 5, 32)
    layer = layers.NORMS[norm](32, True, layers.Style(), name='norm')
    y, _ = jax.jit(layer.init_with_output)(jax.random.key(0), x)
    y = np.asarray(y).reshape(split)
    np.testing.assert_allclose(y.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axes), 1, atol=1e-3)


@pytest.mark.parametrize(
    ('name', 'variance'),
    [
        ('zeros', 0),
        ('normal', 1e-4),
        ('truncated_normal', 4e-4),
        ('lecun_normal', 1 / (9 * 40)),
        ('glorot_normal', 2 / (9 * (40 + 80))),
        ('glorot_uniform', 2 / (9 * (40 + 80))),
        ('he_normal', 2 / (9 * 40)),
        ('he_uniform', 2 / (9 * 40)),
        ('he_normal_fan_out', 2 / (9 * 80)),
    ],
)
def test_the_variance_of_an_initialiser_is_that_of_its_paper(name, variance):
    draw = functools.partial(layers.INITIALIZERS[name], shape=(3, 3, 40, 80), dtype=jnp.float32)
    kernel = jax.jit(draw)(jax.random.key(0))
    np.testing.assert_allclose(kernel.var(), variance, rtol=0.05)


def test_orthogonal_kernels_are_orthogonal():
    draw = functools.partial(layers.INITIALIZERS['orthogonal'], shape=(3, 3, 4, 8))
    kernel = jax.jit(draw)(jax.random.key(0))
    flat = kernel.reshape(-1, 8)
    np.testing.assert_allclose(flat.T @ flat, np.eye(8), atol=1e-5)
    np.testing.assert_array_equal(
        draw(jax.random.key(0), dtype=jnp.bfloat16), kernel.astype(jnp.bfloat16)
    )


def test_relu_of_a_sum_is_a_maximum_where_it_is_exported():
    def lowered(platform):
        program = jax.jit(layers.relu_of_sum).trace(jnp.ones(3))
        return program.lower(lowering_platforms=(platform,)).as_text()

    assert all('stablehlo.select' in lowered(platform) for platform in ('cpu', 'cuda'))
    assert 'stablehlo.select' not in lowered('tpu') and 'stablehlo.maximum' in lowered('tpu')


@pytest.mark.parametrize(
    ('norm', 'train', 'of_sum'),
    [('none', True, True), ('none', False, False), ('batch', True, False)],
)
def test_relu_after_a_bias_is_of_a_sum_in_training(norm, train, of_sum):
    layer = layers.ConvNormAct(4, 1, layers.Style(norm=norm))
    x = jnp.ones((2, 3, 3, 3))
    variables = layer.init(jax.random.key(0), x, train=False)
    apply = functools.partial(layer.apply, train=train, mutable=['batch_stats'])
    lowered = jax.jit(apply).trace(variables, x).lower(lowering_platforms=('cuda',)).as_text()
    assert ('stablehlo.select' in lowered, 'stablehlo.maximum' in lowered) == (of_sum, not of_sum)


def test_a_pool_comes_before_the_activation_in_training_only(monkeypatch):
    pooled = []
    monkeypatch.setattr(layers, 'max_pool', lambda x, *_: pooled.append(x) or x)
    layer = layers.ConvNormAct(4, 3, layers.Style(norm='none'), pool=(2, 2))
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    for train in (True, False):
        layer.init_with_output(jax.random.key(1), x, train=train)
    assert [bool((x < 0).any()) for x in pooled] == [True, False]


@pytest.mark.parametrize(
    ('activation', 'norm', 'pool'),
    [*((name, 'none', (3, 2)) for name in layers.ACTIVATIONS), ('relu', 'batch', (2, 2))],
)
def test_a_pool_before_bias_and_activation_changes_nothing(activation, norm, pool):
    style = layers.Style(activation=activation, norm=norm)
    apart, together = (
        layers.ConvNormAct(4, 3, style, use_bias=True, pool=pool) for pool in (None, pool)
    )
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    variables = apart.init(jax.random.key(1), x, train=True)
    bias = variables['params']['conv']['bias']
    variables['params']['conv']['bias'] = jax.random.normal(jax.random.key(2), bias.shape)
    assert jax.tree.map(jnp.shape, together.init(jax.random.key(1), x, train=True)) == (
        jax.tree.map(jnp.shape, variables)
    )

    def outputs(params, pooled):
        layer = together if pooled else apart
        out, _ = layer.apply(
            {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
        )
        return out if pooled else (out, layers.max_pool(out, *pool))

    def loss(params, pooled):
        return sum(jnp.sin(part).sum() for part in outputs(params, pooled))

    found, expected = (outputs(variables['params'], pooled) for pooled in (True, False))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    found, expected = (jax.grad(loss)(variables['params'], pooled) for pooled in (True, False))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.mark.parametrize('name', layers.ACTIVATIONS)
def test_activations_keep_shape_and_dtype(name):
    x = jnp.linspace(-3, 3, 8, dtype=jnp.bfloat16)
    y = layers.ACTIVATIONS[name](x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize('relu', [layers.relu, layers.relu_of_sum])
def test_relu_is_that_of_jax_with_its_derivatives(relu):
    x = jnp.array([-jnp.inf, -2, -0.0, 0, 1e-30, 3, jnp.inf, jnp.nan])
    for ours, theirs in (
        (relu, jax.nn.relu),
        (jax.vmap(jax.grad(relu)), jax.vmap(jax.grad(jax.nn.relu))),
        (jax.vmap(jax.jacfwd(jax.grad(relu))), jnp.zeros_like),
    ):
        np.testing.assert_array_equal(jax.jit(ours)(x), theirs(x))


def test_relu_of_a_chain_of_blocks_is_computed_once_on_cpu():
    def bytes_moved(relu):
        def loss(x, kernels):
            for kernel in kernels:
                x = relu(x + layers.convolve(x, kernel, 1, (0, 0)))
            return x.sum()

        x, kernels = jnp.ones((4, 16, 16, 8)), jnp.ones((6, 1, 1, 8, 8))
        return jax.jit(jax.grad(loss)).lower(x, kernels).compile().cost_analysis()['bytes accessed']

    assert bytes_moved(layers.relu) < 0.9 * bytes_moved(jax.nn.relu)


# PyTorch


class TorchResNet:
    """The networks of He 2015, He 2016 and Zagoruyko 2016 with basic blocks, in plain PyTorch.

    Weights and statistics are looked up by our names.
    """

    def __init__(self, torch, model, variables):
        self.F, self.model, self.torch = torch.nn.functional, model, torch
        self.weights, self.stats = (
            {
                path: torch.tensor(np.array(to_torch(leaf)))
                for path, leaf in flax.traverse_util.flatten_dict(tree, sep='/').items()
            }
            for tree in (variables['params'], variables['batch_stats'])
        )
        for weight in self.weights.values():
            weight.requires_grad_()

    def conv(self, x, name, stride=1):
        kernel = self.weights[f'{name}/kernel']
        return self.F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def bn(self, x, name):
        stats = self.stats[f'{name}/mean'], self.stats[f'{name}/var']
        affine = self.weights[f'{name}/scale'], self.weights[f'{name}/bias']
        return self.F.batch_norm(x, *stats, *affine, training=self.train, momentum=0.1, eps=1e-5)

    def shortcut(self, x, name, stride, y):
        if self.model.shortcut == 'pad':
            channels = y.shape[1] - x.shape[1]
            return self.F.pad(
                x[:, :, ::stride, ::stride], (0, 0, 0, 0, channels // 2, channels // 2)
            )
        if self.model.preactivation:
            return self.conv(x, f'{name}/shortcut', stride)
        x = self.conv(x, f'{name}/shortcut/conv', stride)
        return self.bn(x, f'{name}/shortcut/norm')

    def block(self, x, name, stride):
        y = self.F.relu(self.bn(self.conv(x, f'{name}/conv1/conv', stride), f'{name}/conv1/norm'))
        y = self.bn(self.conv(y, f'{name}/conv2/conv'), f'{name}/conv2/norm')
        if y.shape != x.shape:
            x = self.shortcut(x, name, stride, y)
        return self.F.relu(x + y)

    def preactivation_block(self, x, name, stride):
        activated = self.F.relu(self.bn(x, f'{name}/norm1'))
        y = self.conv(activated, f'{name}/conv1', stride)
        y = self.conv(self.F.relu(self.bn(y, f'{name}/norm2')), f'{name}/conv2')
        if y.shape != x.shape:
            x = self.shortcut(activated, name, stride, y)
        return x + y

    def __call__(self, images, train):
        self.train, model = train, self.model
        x = self.torch.tensor(np.array(images).transpose(0, 3, 1, 2))
        if model.preactivation:
            x = self.conv(x, 'stem')
        else:
            x = self.conv(x, 'stem/conv', 2 if model.stem == 'large' else 1)
            x = self.F.relu(self.bn(x, 'stem/norm'))
        if model.stem == 'large':
            x = self.F.max_pool2d(x, 3, 2, padding=1)
        block = self.preactivation_block if model.preactivation else self.block
        for i, size in enumerate(model.stage_sizes, 1):
            for j in range(1, size + 1):
                x = block(x, f'stage{i}_block{j}', 2 if i > 1 and j == 1 else 1)
        if model.preactivation:
            x = self.F.relu(self.bn(x, 'final_norm'))
        return self.F.linear(x.mean((2, 3)), self.weights['head/kernel'], self.weights['head/bias'])


def to_torch(weight):
    """HWIO -> OIHW, [D, K] -> [K, D]."""
    return {4: lambda w: w.transpose(3, 2, 0, 1), 2: lambda w: w.T}.get(weight.ndim, lambda w: w)(
        np.asarray(weight)
    )


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ('name', 'fields', 'size'),
    [
        ('resnet20', {}, 15),
        ('resnet18', {'num_filters': 8, 'stage_sizes': (1, 1, 1, 1)}, 34),
        ('wrn16_4', {'num_filters': 4, 'width': 2, 'stage_sizes': (2, 1)}, 9),
    ],
)
def test_resnet_agrees_with_pytorch(name, fields, size):
    torch = pytest.importorskip('torch')
    model = make_model(name, **fields)
    images = images_of(4, size, size, 3)
    variables = random_variables(model, images)
    theirs = TorchResNet(torch, model, variables)

    with torch.no_grad():
        expected = theirs(images, train=False)
    logits, _ = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    assert relative_error(logits, expected) < 1e-4

    expected = theirs(images, train=True)
    (-torch.log_softmax(expected, 1)[:, 0].mean()).backward()
    compute = jax.jit(functools.partial(gradients_of, model))
    gradients, logits, updates = compute(variables, images)
    assert relative_error(logits, expected.detach()) < 1e-4
    ours = flax.traverse_util.flatten_dict(gradients, sep='/')
    assert ours.keys() == theirs.weights.keys()
    for path, gradient in ours.items():
        error = relative_error(to_torch(gradient), theirs.weights[path].grad)
        assert error < 1e-3, path
    means = flax.traverse_util.flatten_dict(updates['batch_stats'], sep='/')
    for path, mean in means.items():
        if path.endswith('/mean'):  # PyTorch's running variance is the unbiased one
            assert relative_error(mean, theirs.stats[path]) < 1e-4, path


def test_a_layer_with_a_skip_adds_its_input_where_the_widths_agree():
    images = jax.random.normal(jax.random.key(0), (2, 1, 3, 1))
    plain, skip = (make_model('mlp', hidden=(3, 4, 4), skip=skip) for skip in (False, True))
    variables = plain.init(jax.random.key(1), images)
    (_, without), (_, with_skip) = plain.apply(variables, images), skip.apply(variables, images)
    x = images.reshape(2, 3)
    np.testing.assert_allclose(with_skip['hidden1'], without['hidden1'] + x, rtol=1e-6)
    dense = variables['params']['hidden3']['dense']
    h = with_skip['hidden2']
    expected = h + jax.nn.relu(h @ dense['kernel'] + dense['bias'])
    np.testing.assert_allclose(with_skip['hidden3'], expected, rtol=1e-5)
