"""Kernels as products: whole at full rank, the best of their rank, and only where it pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import inspection, low_rank, weights
from jaxcls.errors import UserError
from small_nets import NETS, build, logits


@pytest.mark.parametrize('name', NETS)
def test_full_rank_is_the_network_itself(name):
    model, flat, image = build(name)
    kernels = [path for path in flat if path.endswith('kernel')]
    assert sorted(kernels) == sorted(low_rank._kernels(model, NETS[name][0]))
    full = {path: min(low_rank._matrix(flat[path]).shape) for path in kernels}
    factors = low_rank.factorize(weights.unflatten(flat), full)
    expected = logits(model, flat, image)
    found = logits(low_rank.Factorized(model), weights.flatten(factors), image)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_rank_is_the_lowest_that_keeps_the_energy_and_pays():
    model, flat, image = build('mlp', hidden=(40, 30))
    u, _, v = np.linalg.svd(np.random.default_rng(2).normal(size=(40, 30)), full_matrices=False)
    flat['params/hidden2/dense/kernel'] = np.float32(u * np.array([4, 2, 1] + [0.0] * 27) @ v)
    variables, shape = weights.unflatten(flat), NETS['mlp'][0]
    path = 'params/hidden2/dense/kernel'
    ranks = [low_rank.choose_ranks(model, variables, shape, e)[path] for e in (0.7, 0.95, 0.999)]
    assert ranks == [1, 2, 3]  # of 16, 20 and 21 of 21
    assert 'params/head/kernel' not in low_rank.choose_ranks(model, variables, shape, 1.0)
    factors = low_rank.factorize(variables, {path: 3})
    kernel_in, kernel_out = (
        factors['params']['hidden2']['dense'][n] for n in ('kernel_in', 'kernel_out')
    )
    np.testing.assert_allclose(kernel_in @ kernel_out, flat[path], atol=1e-5)
    fewer, all_ = (
        inspection.count_flops(m.apply, v, jnp.asarray(image))
        for m, v in ((low_rank.Factorized(model), factors), (model, variables))
    )
    assert all_ - fewer == 2 * len(image) * (40 * 30 - 3 * 70)


def test_an_energy_out_of_range_is_named():
    with pytest.raises(UserError, match='the energy to keep is 0; it must be more than 0'):
        low_rank.choose_ranks(None, {}, (8, 8, 1), 0)


def test_a_factorised_network_has_a_gradient():
    model, flat, image = build('lenet_small')
    path = 'params/conv2/conv/kernel'
    factors = low_rank.factorize(weights.unflatten(flat), {path: 2})
    loss = lambda variables: low_rank.Factorized(model).apply(variables, image)[0].sum()  # noqa: E731
    gradient = jax.grad(loss)(factors)['params']['conv2']['conv']
    assert set(gradient) == {'kernel_in', 'kernel_out'}


def test_a_pool_in_front_of_the_bias_in_training_stays():
    model, flat, image = build('lenet_small', norm='none')
    path = 'params/conv2/conv/kernel'
    full = {path: min(low_rank._matrix(flat[path]).shape)}
    factors = low_rank.factorize(weights.unflatten(flat), full)
    found, expected = (
        net.apply(variables, image, train=True)[0]
        for net, variables in (
            (low_rank.Factorized(model), factors),
            (model, weights.unflatten(flat)),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
