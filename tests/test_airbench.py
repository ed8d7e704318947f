"""The airbench networks against plain ones in PyTorch; whitening, and where training starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity
from jaxcls import optimizers, weights
from jaxcls.errors import UserError
from jaxcls.models import airbench, layers, make_model
from jaxcls.models.references import CONV
from parity import Pair, check_evaluation, check_training


def torch_airbench(widths, depth=2, residual=False, sum_first=False):
    """The network that Jordan 2024 describes."""

    def make():
        torch = pytest.importorskip('torch')
        nn = torch.nn

        class Norm(nn.BatchNorm2d):
            def __init__(self, channels):
                super().__init__(channels, eps=1e-12, momentum=0.4, affine=False)
                self.shift = nn.Parameter(torch.zeros(channels))

            def forward(self, x):
                return super().forward(x) + self.shift[:, None, None]

        class Group(nn.Module):
            def __init__(self, inputs, outputs):
                super().__init__()
                sizes = [inputs] + [outputs] * (depth - 1)
                self.convs = nn.ModuleList(
                    nn.Conv2d(size, outputs, 3, padding=1, bias=False) for size in sizes
                )
                self.norms = nn.ModuleList(Norm(outputs) for _ in sizes)

            def forward(self, x):
                x = nn.functional.max_pool2d(self.convs[0](x), 2)
                x = first = nn.functional.gelu(self.norms[0](x))
                for conv, norm in zip(self.convs[1:-1], self.norms[1:-1], strict=True):
                    x = nn.functional.gelu(norm(conv(x)))
                x = self.norms[-1](self.convs[-1](x))
                if sum_first:
                    return nn.functional.gelu(x + first)
                x = nn.functional.gelu(x)
                return x + first if residual else x

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.whiten = nn.Conv2d(3, 24, 2)
                self.whiten.weight.requires_grad = False
                pairs = zip((24, *widths[:-1]), widths, strict=True)
                self.groups = nn.Sequential(*(Group(*pair) for pair in pairs))
                self.head = nn.Linear(widths[-1], 5, bias=False)

            def forward(self, x):
                x = self.groups(nn.functional.gelu(self.whiten(x)))
                return self.head(nn.functional.max_pool2d(x, 3).flatten(1)) / 9

        return Net()

    return make


NAMES = (
    (r'stem/whitening', lambda _: ('whiten.weight', CONV)),
    (r'stem', lambda _: 'whiten'),
    (r'stage(\d)/conv(\d)', lambda _, s, i: f'groups.{s - 1}.convs.{i - 1}'),
    (r'stage(\d)/norm(\d)/bias', lambda _, s, i: f'groups.{s - 1}.norms.{i - 1}.shift'),
    (r'stage(\d)/norm(\d)', lambda _, s, i: f'groups.{s - 1}.norms.{i - 1}'),
    (r'head', lambda _: 'head'),
)
PAIRS = {
    'airbench94': Pair('airbench94', torch_airbench((8, 12)), {'widths': (8, 12)}, 16, 'torch'),
    'airbench96': Pair(
        'airbench96', torch_airbench((8, 12), 3, True), {'widths': (8, 12)}, 16, 'torch'
    ),
    'airbench96, sum first': Pair(
        'airbench96',
        torch_airbench((8, 12), 3, sum_first=True),
        {'widths': (8, 12), 'sum_first': True},
        16,
        'torch',
    ),
}
FULL = {
    'airbench94': Pair('airbench94', torch_airbench((64, 256, 256)), {}, 32, 'torch'),
    'airbench96': Pair('airbench96', torch_airbench((128, 512, 512), 3, True), {}, 32, 'torch'),
}


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setitem(weights.WEIGHT_NAMES, airbench.AirBench, {'torch': NAMES})


@pytest.mark.parametrize('name', PAIRS)
def test_logits_equal_the_reference(name, names):
    check_evaluation(PAIRS[name])


@pytest.mark.parametrize('name', PAIRS)
def test_a_step_of_sgd_equals_the_reference(name, names):
    check_training(PAIRS[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', airbench.MODELS)
def test_full_size_logits_equal_the_reference(name, names):
    check_evaluation(FULL[name])


# Whitening


def photos(count=40, size=9, channels=3, seed=0):
    """Images whose pixels depend on their neighbours and channels on each other, mean not 0."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, size + 2, size + 2, channels))
    smooth = sum(noise[:, i : i + size, j : j + size] for i in range(3) for j in range(3))
    mixed = smooth @ (np.eye(channels) + 0.5 * rng.random((channels, channels)))
    return (0.3 * mixed + 0.5).astype(np.float32)


def patches_of(images, size):
    """float64 [N, size * size * C], by slices."""
    rows, columns = (n - size + 1 for n in images.shape[1:3])
    patches = [
        images[:, i : i + size, j : j + size].reshape(len(images), -1)
        for i in range(rows)
        for j in range(columns)
    ]
    return np.concatenate(patches).astype(np.float64)


@pytest.mark.parametrize(('size', 'channels'), [(2, 3), (3, 1)])
def test_the_covariance_is_that_of_all_patches(size, channels):
    images = photos(1100, 5, channels)  # more than two parts
    expected = np.cov(patches_of(images, size).T, bias=True)
    np.testing.assert_allclose(airbench.patch_covariance(images, size), expected, atol=1e-9)


@functools.cache
def started(channels=3, size=2):
    model = make_model('airbench94', widths=(8,), whitening_size=size)
    images = photos(channels=channels)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), images[:1])['params'])
    return model, images, params, start(model, params, images)


def start(model, params, images, seed=0):
    return model.start_from_data(jax.random.key(seed), params, images, lambda _: None)


@pytest.mark.parametrize(('channels', 'size'), [(3, 2), (1, 2), (1, 3)])
def test_whitened_patches_have_the_identity_as_covariance(channels, size):
    _, images, _, params = started(channels, size)
    dimensions = size * size * channels
    assert params['stem']['whitening'].shape == (size, size, channels, 2 * dimensions)
    white = jax.jit(airbench.Whiten(size, layers.Style()).apply)({'params': params['stem']}, images)
    white = np.asarray(white, np.float64).reshape(-1, 2 * dimensions)
    np.testing.assert_allclose(white[:, dimensions:], -white[:, :dimensions], atol=1e-4)
    covariance = np.cov(white[:, :dimensions].T, bias=True)
    variances = np.linalg.eigvalsh(np.cov(patches_of(images, size).T, bias=True))[::-1]
    np.testing.assert_allclose(covariance, np.diag(variances / (variances + 5e-4)), atol=1e-3)
    np.testing.assert_allclose(covariance, np.eye(dimensions), atol=0.1)


def test_filters_are_the_principal_components_of_scikit_learn():
    decomposition = pytest.importorskip('sklearn.decomposition')
    patches = patches_of(photos(), 2)
    filters = airbench.whitening_filters(np.cov(patches.T), 5e-4)
    theirs = decomposition.PCA().fit(patches)
    scaled = theirs.components_ / np.sqrt(theirs.explained_variance_[:, None] + 5e-4)
    signs = np.sign((scaled * filters.T[:12]).sum(1, keepdims=True))
    np.testing.assert_allclose(
        filters.T, np.concatenate([signs * scaled, -signs * scaled]), atol=1e-6
    )


def test_a_direction_without_variance_has_a_finite_filter():
    images = np.repeat(photos(channels=1), 3, axis=-1)
    filters = airbench.whitening_filters(airbench.patch_covariance(images, 2), 5e-4)
    assert np.isfinite(filters).all()
    np.testing.assert_allclose(np.abs(filters).max(), 5e-4**-0.5, rtol=0.5)


def test_starting_from_data_is_pure_and_changes_the_whitening_alone():
    model, images, params, first = started()
    before = jax.tree.map(np.copy, params)
    again = start(model, params, jnp.asarray(images), seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    other = start(model, params, images[:20])['stem']['whitening']
    assert not np.array_equal(first['stem']['whitening'], other)
    assert not np.array_equal(first['stem']['whitening'], params['stem']['whitening'])
    rest = {**first, 'stem': {**first['stem'], 'whitening': params['stem']['whitening']}}
    jax.tree.map(np.testing.assert_array_equal, rest, params)


def test_shapes_and_dtypes_are_kept():
    model, images, params, _ = started()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    described = [
        jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        for tree in (params, start(model, params, images))
    ]
    assert described[0] == described[1]


def test_without_data_the_filters_are_orthogonal_and_paired():
    params = started()[2]
    kernel = params['stem']['whitening'].reshape(12, 24)
    np.testing.assert_allclose(kernel[:, :12].T @ kernel[:, :12], np.eye(12), atol=1e-5)
    np.testing.assert_array_equal(kernel[:, 12:], -kernel[:, :12])


def test_all_learns_but_the_whitening_which_is_not_decayed():
    model, images, _, params = started()
    stats = {'stage1': {f'norm{i}': {'mean': jnp.zeros(8), 'var': jnp.ones(8)} for i in (1, 2)}}

    def loss(params):
        variables = {'params': params, 'batch_stats': stats}
        (logits, _), _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    gradients = weights.flatten({'params': jax.jit(jax.grad(loss))(params)})
    still = [path for path, gradient in gradients.items() if not np.any(gradient)]
    assert still == ['params/stem/whitening']
    decayed = weights.flatten({'params': optimizers.decay_mask(params)})
    kernels = {path for path, is_decayed in decayed.items() if is_decayed}
    assert kernels == {path for path in gradients if path.endswith('kernel')}


# Where training starts


@pytest.mark.parametrize('shape', [(3, 3, 4, 12), (3, 3, 12, 4)])
def test_dirac_kernels_copy_their_input_and_draw_the_rest(shape):
    torch = pytest.importorskip('torch')
    inputs, outputs = shape[-2:]
    draw = jax.jit(functools.partial(layers.INITIALIZERS['dirac'], shape=shape))
    kernel = np.asarray(draw(jax.random.key(0)))
    theirs = torch.zeros(outputs, inputs, *shape[:2])
    torch.nn.init.dirac_(theirs[:inputs])
    theirs, copies = theirs.numpy().transpose(2, 3, 1, 0), min(inputs, outputs)
    np.testing.assert_array_equal(kernel[..., :copies], theirs[..., :copies])
    if outputs > inputs:
        bound, drawn = np.prod(shape[:-1]) ** -0.5, kernel[..., copies:]
        assert np.abs(drawn).max() <= bound
        np.testing.assert_allclose(drawn.var(), bound**2 / 3, rtol=0.2)


def test_a_group_without_norm_and_activation_starts_as_a_pool_of_its_input():
    style = layers.Style('identity', 'none', 'dirac')
    group = airbench.Group(6, 3, False, style)
    x = parity.images_of(8, channels=4)
    y, _ = jax.jit(lambda x: group.init_with_output(jax.random.key(0), x, train=False))(x)
    np.testing.assert_allclose(y[..., :4], layers.max_pool(x, 2, 2), atol=1e-6)


def test_logits_are_scaled_by_a_ninth():
    images = photos(2, 16)
    plain = make_model('airbench94', widths=(8,), logit_scale=1.0)
    variables = jax.jit(plain.init)(jax.random.key(0), images)
    scaled = plain.clone(logit_scale=1 / 9)
    assert scaled == make_model('airbench94', widths=(8,))
    (theirs, features), (ours, _) = (jax.jit(m.apply)(variables, images) for m in (plain, scaled))
    np.testing.assert_allclose(9 * ours, theirs, rtol=1e-5)
    kernel = variables['params']['head']['kernel']
    np.testing.assert_allclose(theirs, features['pooled'] @ kernel, rtol=1e-4, atol=1e-5)


# Fields


@pytest.mark.parametrize(
    ('size', 'channels', 'pooled'), [(32, 3, 256), (28, 1, 256), (64, 3, 4 * 256)]
)
def test_the_head_reads_what_is_left_of_the_image(size, channels, pooled):
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    model = make_model('airbench94', num_classes=7)
    (logits, features), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert set(features) == {'stem', 'stage1', 'stage2', 'stage3', 'pooled'}
    assert features['stem'].shape == (2, size - 1, size - 1, 8 * channels)
    assert features['pooled'].shape == (2, pooled)
    assert logits.shape == (2, 7)


@pytest.mark.parametrize('norm', layers.NORMS)
def test_norms_have_no_scale_and_without_one_the_convolutions_have_biases(norm):
    shapes = parity.shapes_of(make_model('airbench94', norm=norm), 32)
    assert not [path for path in shapes if path.endswith('scale')]
    biases = {path.split('/')[2][:4] for path in shapes if 'stage1' in path and 'bias' in path}
    assert biases == {'conv' if norm == 'none' else 'norm'}


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'widths': ()}, 'groups=0'),
        ({'widths': (8, 0)}, 'widths=(8, 0)'),
        ({'depth': 0}, 'depth=0'),
        ({'depth': 1, 'residual': True}, 'depth is 1; it must be at least 2'),
        ({'sum_first': True}, 'sum_first is True; it must be False without residual=True'),
        ({'whitening_size': 0}, 'whitening_size=0'),
        ({'whitening_epsilon': 0.0}, 'whitening_epsilon is 0.0'),
        ({'logit_scale': float('nan')}, 'logit_scale is nan'),
        ({'activation': 'gleu'}, "Unknown activation 'gleu'. Did you mean 'gelu'"),
    ],
)
def test_values_out_of_range_are_errors(fields, message):
    with pytest.raises(UserError) as error:
        make_model('airbench94', **fields)
    assert message in str(error.value)


def test_images_that_leave_nothing_to_pool_are_an_error():
    with pytest.raises(UserError, match='3x3 max pool got 1x1'):
        parity.shapes_of(make_model('airbench94'), 16)
