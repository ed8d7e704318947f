"""Winograd's form against XLA's convolution, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import inspection
from jaxcls.models import convolutions, winograd


def alone(function):
    return function


@pytest.mark.parametrize('padding', [(0, 0), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize('size', [(4, 8), (7, 5), (3, 3)], ids=str)
def test_values_and_gradients_are_those_of_xla(size, padding):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = rng.standard_normal((2, *size, 3)), rng.standard_normal((3, 3, 3, 5))
        plain = lambda x, kernel: convolutions._convolution((1, padding, 1), x, kernel)  # noqa: E731
        expected, pull = jax.vjp(plain, jnp.asarray(x), jnp.asarray(kernel))
        gradient = rng.standard_normal(expected.shape)
        found = winograd.in_tiles(jnp.asarray(x), jnp.asarray(kernel), padding, alone)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        found = winograd.kernel_gradient_in_tiles(
            jnp.asarray(x), jnp.asarray(gradient), padding, alone
        )
        np.testing.assert_allclose(found, pull(gradient)[1], rtol=0, atol=1e-12)


def test_it_is_taken_in_large_batches_of_many_features_alone():
    def cost(batch, size, channels=128, kernel=3, stride=1, groups=1):
        kernel_shape = (kernel, kernel, channels // groups, channels)
        return winograd.cost_of_tiles(
            (batch, size, size, channels), kernel_shape, (1, 1), stride, groups
        )

    assert cost(128, 16) < 0.3 < 0.4 < cost(8, 14) < 0.6 < cost(8, 7) < 1 < cost(1, 16)
    assert cost(128, 16, channels=64) == cost(128, 16, kernel=5) == np.inf
    assert cost(128, 16, stride=2) == cost(128, 16, groups=2) == np.inf


def test_in_single_precision_a_layer_of_many_features_is_near_xlas():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 16, 16, 128)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 128, 128)) / 34, jnp.float32)
    apply = lambda x, k: convolutions.convolve(x, k, 1, (1, 1))  # noqa: E731
    text = jax.jit(apply).lower(x, kernel).as_text()
    assert text.count('dot_general') == 36 and 'stablehlo.convolution' not in text

    assert inspection.count_flops(apply, x, kernel) == 2 * 16 * 16**2 * 9 * 128**2

    def loss(convolve):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sin(convolve(x, k)).sum(), (0, 1)))

    ours = loss(apply)(x, kernel)
    plain = loss(lambda x, k: convolutions._convolution((1, (1, 1), 1), x, k))(x, kernel)
    for a, b in zip(jax.tree.leaves(ours)[1:], jax.tree.leaves(plain)[1:], strict=True):
        assert float(jnp.abs(a - b).max() / jnp.abs(b).max()) < 1e-4
