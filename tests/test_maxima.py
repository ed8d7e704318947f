"""The maximum over windows against XLA's own and its gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.models import layers, maxima
from jaxcls.models.maxima import window_maxima

PLACES = [  # window, stride, padding before and after
    (2, 2, (0, 0)),
    (3, 3, (0, 0)),
    (3, 2, (0, 0)),
    (3, 2, (1, 1)),
    (3, 2, (0, 1)),
    (3, 1, (1, 1)),
    (2, 1, (0, 1)),
    (2, 3, (0, 0)),
]


def ours(place, x):
    window, stride, pads = place
    return window_maxima(x, window, stride, (pads, pads))


def plain(place, x):
    window, stride, pads = place
    return nn.max_pool(x, (window, window), (stride, stride), (pads, pads))


def value_and_gradient(form, place, x):
    """The maxima, and the gradient of a sum that weighs each differently."""

    def weighted(x):
        y = form(place, x)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)).sum(), y

    return jax.jit(jax.grad(weighted, has_aux=True))(x)


def draws(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize('shape', [(2, 6, 8, 3), (2, 7, 9, 1)])
@pytest.mark.parametrize('place', PLACES)
def test_it_is_reduce_window_with_its_gradient(place, shape):
    x = draws(shape)
    np.testing.assert_array_equal(ours(place, x), plain(place, x))
    (gradient, value), (expected, _) = (value_and_gradient(f, place, x) for f in (ours, plain))
    np.testing.assert_array_equal(value, plain(place, x))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('shape', [(2, 4, 6, 3), (2, 5, 7, 1)])
@pytest.mark.parametrize('window', [2, 3])
def test_disjoint_max_pool_is_reduce_window_with_its_gradient(shape, window):
    x = draws(shape)
    pools = [
        lambda x: layers.max_pool(x, window, window),
        lambda x: nn.max_pool(x, (window, window), (window, window)),
    ]

    @jax.jit
    def value_and_gradient(x):
        return [jax.value_and_grad(lambda x, p=pool: (p(x) ** 2).sum())(x) for pool in pools]

    ours, theirs = value_and_gradient(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize('shape', [(2, 6, 6, 3), (2, 7, 8, 1)])
@pytest.mark.parametrize('window', [2, 3])
def test_both_gradients_of_disjoint_windows_are_the_same(shape, window):
    place, x = (window, window, ((0, 0), (0, 0))), draws(shape)
    y, first = maxima._with_places(place, x)
    values, pull = jax.vjp(functools.partial(maxima._values, place), x)
    np.testing.assert_array_equal(y, values)
    of_places = maxima._of_disjoint(place, x, first, jnp.cos(y))
    np.testing.assert_array_equal(of_places, pull(jnp.cos(y))[0])


def test_a_window_may_have_more_places_than_a_byte_counts():
    x = draws((1, 20, 20, 1))
    gradients = [value_and_gradient(form, (17, 3, (0, 0)), x)[0] for form in (ours, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_it_keeps_the_dtype(dtype):
    x = draws((1, 5, 5, 2), dtype)
    gradient, value = value_and_gradient(ours, (3, 2, (1, 1)), x)
    assert gradient.dtype == value.dtype == dtype


def test_of_equal_maxima_the_first_has_the_gradient():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 7, 7, 4)), jnp.float32)
    place = (3, 2, (1, 1))
    gradients = [value_and_gradient(form, place, x)[0] for form in (ours, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('place', [(3, 2, (1, 1)), (3, 1, (1, 1))])
def test_what_is_not_a_number_is_seen(place):
    _, value = value_and_gradient(ours, place, draws((1, 5, 5, 1)).at[0, 2, 2, 0].set(jnp.nan))
    assert bool(jnp.isnan(value).any())


def test_examples_have_gradients_of_their_own():
    x = draws((3, 5, 5, 2))
    gradient = jax.grad(lambda x: (ours((3, 2, (1, 1)), x[None]) ** 2).sum())
    each = jnp.stack([gradient(row) for row in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(x), each, rtol=1e-6)


def test_partial_windows_count_at_the_end():
    x = draws((1, 6, 6, 1))
    pool = functools.partial(layers.max_pool, window=3, stride=2, partial=True)
    np.testing.assert_array_equal(pool(x), plain((3, 2, (0, 1)), x))
