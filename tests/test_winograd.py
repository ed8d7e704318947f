"""Winograd's forms against XLA's convolution, in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import inspection
from jaxcls.models import convolutions, winograd


def alone(function):
    return function


def in_rows(x, kernel, padding):
    convolve = functools.partial(convolutions._convolution, (1, (0, padding[1]), 1))
    return winograd.in_rows(x, kernel, padding, convolve, alone)


def kernel_gradient_in_rows(x, gradient, padding):
    of_rows = functools.partial(convolutions._kernel_gradient_of_all, (1, (0, padding[1])), (1, 3))
    return winograd.kernel_gradient_in_rows(x, gradient, padding, of_rows, alone)


FORMS = {
    'rows': (in_rows, kernel_gradient_in_rows),
    'tiles': (
        functools.partial(winograd.in_tiles, apart=alone),
        functools.partial(winograd.kernel_gradient_in_tiles, apart=alone),
    ),
}


@pytest.mark.parametrize('padding', [(0, 0), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize('size', [(4, 8), (7, 5), (3, 3)], ids=str)
@pytest.mark.parametrize('form', FORMS)
def test_values_and_gradients_are_those_of_xla(form, size, padding):
    convolve, kernel_gradient = FORMS[form]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.standard_normal((2, *size, 3)), rng.standard_normal((3, 3, 3, 5))
        plain = lambda x, kernel: convolutions._convolution((1, padding, 1), x, kernel)  # noqa: E731
        expected, pull = jax.vjp(plain, jnp.asarray(x), jnp.asarray(kernel))
        gradient = rng.standard_normal(expected.shape)
        found = convolve(jnp.asarray(x), jnp.asarray(kernel), padding)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        found = kernel_gradient(jnp.asarray(x), jnp.asarray(gradient), padding)
        np.testing.assert_allclose(found, pull(gradient)[1], rtol=0, atol=1e-12)


def test_rows_are_taken_where_few_are_left_over_and_features_are_many():
    def pays(batch, size, channels=32, kernel=3, stride=1, groups=1):
        kernel_shape = (kernel, kernel, channels // groups, channels)
        shape = batch, size, size, channels
        return winograd.pays_in_rows(shape, kernel_shape, (1, 1), stride, groups)

    assert pays(8, 7) and pays(1, 16) and pays(8, 14)
    assert not pays(4, 7) and not pays(64, 5) and not pays(64, 2)  # a small batch, rows left over
    assert not pays(64, 16, channels=16) and not pays(64, 16, kernel=5)
    assert not pays(64, 16, stride=2) and not pays(64, 16, groups=2)


def test_tiles_are_taken_in_large_batches_of_many_features_alone():
    def cost(batch, size, channels=128, kernel=3, stride=1, groups=1):
        kernel_shape = (kernel, kernel, channels // groups, channels)
        return winograd.cost_of_tiles(
            (batch, size, size, channels), kernel_shape, (1, 1), stride, groups
        )

    assert cost(128, 16) < 0.3 < 0.4 < cost(8, 14) < 0.6 < cost(8, 7) < 1 < cost(1, 16)
    assert cost(128, 16, channels=64) == cost(128, 16, kernel=5) == np.inf
    assert cost(128, 16, stride=2) == cost(128, 16, groups=2) == np.inf


@pytest.mark.parametrize(
    ('features', 'in_convolutions', 'products'), [(64, 6, 0), (128, 6, 0), (256, 0, 36)]
)
def test_in_single_precision_a_layer_of_many_features_is_near_xlas(
    features, in_convolutions, products
):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 16, 16, features)), jnp.float32)
    kernel = rng.standard_normal((3, 3, features, features)) / (3 * features**0.5)
    kernel = jnp.asarray(kernel, jnp.float32)
    apply = lambda x, k: convolutions.convolve(x, k, 1, (1, 1))  # noqa: E731
    text = jax.jit(apply).lower(x, kernel).as_text()
    assert text.count('dot_general') == products
    assert text.count('stablehlo.convolution') == in_convolutions

    assert inspection.count_flops(apply, x, kernel) == 2 * 16 * 16**2 * 9 * features**2

    def loss(convolve):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sin(convolve(x, k)).sum(), (0, 1)))

    ours = loss(apply)(x, kernel)
    plain = loss(lambda x, k: convolutions._convolution((1, (1, 1), 1), x, k))(x, kernel)
    for a, b in zip(jax.tree.leaves(ours)[1:], jax.tree.leaves(plain)[1:], strict=True):
        assert float(jnp.abs(a - b).max() / jnp.abs(b).max()) < 1e-4
