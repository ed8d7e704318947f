import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from jaxcls import registry
from jaxcls.errors import UserError
from jaxcls.losses import LOSSES, make_loss, masked_mean

B, K = 6, 5


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, K)).astype(np.float32) * 3
    target = rng.dirichlet(np.ones(K), size=B).astype(np.float32)
    target[0] = np.eye(K)[2]
    return jnp.asarray(logits), jnp.asarray(target)


@pytest.mark.parametrize('name', LOSSES)
def test_one_finite_float32_an_example_and_finite_gradients(name, batch):
    logits, target = batch
    loss = make_loss(name=name)
    values = jax.jit(loss)(logits, target)
    assert values.shape == (B,)
    assert values.dtype == jnp.float32
    saturated = jnp.where(target == target.max(-1, keepdims=True), 200.0, -200.0)
    for z in (logits, saturated, -saturated):
        gradient = jax.grad(lambda z: loss(z, target).sum())(z)
        assert np.isfinite(loss(z, target)).all()
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize('name', LOSSES)
def test_examples_do_not_mix(name, batch):
    logits, target = batch
    loss = make_loss(name=name, label_smoothing=0.1)
    whole = loss(logits, target)
    np.testing.assert_allclose(loss(logits[2:3], target[2:3]), whole[2:3], rtol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_smoothing_is_the_same_as_a_smoothed_target(name, batch):
    logits, target = batch
    smooth = 0.9 * target + 0.1 / K
    expected = make_loss(name=name)(logits, smooth)
    np.testing.assert_allclose(
        make_loss(name=name, label_smoothing=0.1)(logits, target), expected, rtol=1e-5
    )


def test_cross_entropy_by_scipy(batch):
    logits, target = map(np.asarray, batch)
    expected = -(target * scipy.special.log_softmax(logits.astype(np.float64), -1)).sum(-1)
    np.testing.assert_allclose(make_loss(name='cross_entropy')(*batch), expected, rtol=1e-5)


def test_sigmoid_cross_entropy_by_scipy(batch):
    logits, target = map(np.asarray, batch)
    p = scipy.special.expit(logits.astype(np.float64))
    expected = -(target * np.log(p) + (1 - target) * np.log1p(-p)).sum(-1)
    np.testing.assert_allclose(make_loss(name='sigmoid_cross_entropy')(*batch), expected, rtol=1e-5)


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_focal_by_scipy(batch, gamma):
    logits, target = map(np.asarray, batch)
    p = scipy.special.softmax(logits.astype(np.float64), -1)
    expected = -(target * (1 - p) ** gamma * np.log(p)).sum(-1)
    focal = make_loss(name='focal', gamma=gamma)
    np.testing.assert_allclose(focal(*batch), expected, rtol=1e-5)


def test_focal_without_gamma_is_cross_entropy_and_so_is_its_gradient(batch):
    logits, target = batch
    focal, plain = make_loss(name='focal', gamma=0.0), make_loss(name='cross_entropy')
    np.testing.assert_allclose(focal(logits, target), plain(logits, target), rtol=1e-6)
    gradients = [jax.grad(lambda z, f=f: f(z, target).sum())(logits) for f in (focal, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0])
def test_focal_gradients_are_finite_where_a_probability_is_1(gamma):
    logits, target = jnp.array([[200.0, -200.0, 0.0]]), jnp.array([[0.9, 0.1, 0.0]])
    gradient = jax.grad(lambda z: make_loss(name='focal', gamma=gamma)(z, target).sum())(logits)
    assert np.isfinite(gradient).all()


def test_focal_gradient_is_that_of_its_values(batch):
    logits, target = batch
    focal = make_loss(name='focal', gamma=1.5)
    check_grads(lambda z: focal(z, target), (logits,), order=1, rtol=1e-2)


def test_equal_to_pytorch(batch):
    torch = pytest.importorskip('torch')
    logits, target = (torch.from_numpy(np.array(x)) for x in batch)
    functional = torch.nn.functional
    np.testing.assert_allclose(
        make_loss(name='cross_entropy', label_smoothing=0.1)(*batch),
        functional.cross_entropy(logits, target, label_smoothing=0.1, reduction='none'),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        make_loss(name='sigmoid_cross_entropy')(*batch),
        functional.binary_cross_entropy_with_logits(logits, target, reduction='none').sum(-1),
        rtol=1e-5,
    )


def test_masked_mean_ignores_padding_and_is_0_of_nothing():
    values = jnp.array([1.0, 3.0, jnp.nan])
    assert masked_mean(values, jnp.array([True, True, False])) == 2.0
    assert masked_mean(values, jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'cross_entropy', 'label_smoothing': 1.0}, 'label_smoothing is 1.0'),
        ({'name': 'cross_entropy', 'label_smoothing': -0.1}, 'label_smoothing'),
        ({'name': 'focal', 'gamma': -1.0}, 'gamma'),
        ({'name': 'focal', 'gamma': math.inf}, 'gamma'),
        ({'name': 'focal', 'gamma': math.nan}, 'gamma'),
        ({'name': 'focal', 'gama': 1.0}, "Did you mean 'gamma'"),
        ({'name': 'crossentropy'}, "Did you mean 'cross_entropy'"),
    ],
)
def test_mistakes_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        make_loss(**arguments)


def test_every_default_is_a_float_in_its_range():
    for name, loss in LOSSES.items():
        defaults = registry.defaults(loss)
        assert all(type(value) is float for value in defaults.values())
        make_loss(name=name, **defaults)
