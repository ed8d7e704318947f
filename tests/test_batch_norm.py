"""Batch norm against Flax's module: values, statistics and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.models.batch_norm import BatchNorm

SHAPE = (6, 5, 4, 3)
FIELDS = [{}, {'use_scale': False}, {'use_bias': False}, {'momentum': 0.6, 'epsilon': 1e-3}]


def draws(shape=SHAPE, seed=0, dtype=jnp.float32):
    return jnp.asarray(3 + 2 * np.random.default_rng(seed).normal(size=shape), dtype)


def variables_of(module, x):
    """As after some training: nothing is 0 or 1."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), shapes
    )


def run(kind, x, fields, train=True):
    """The output, the new statistics, and the gradients by x and the parameters."""
    module = kind(use_running_average=not train, dtype=x.dtype, **fields)
    variables = variables_of(module, x)
    stats, params = variables['batch_stats'], variables.get('params', {})

    def loss(x, params):
        y, new = module.apply({'params': params, 'batch_stats': stats}, x, mutable=['batch_stats'])
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return (weights * y.astype(jnp.float32) ** 2).sum(), (y, new)

    gradients, (y, new) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, params)
    return y, new, gradients


def close(ours, theirs, rtol, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (a, b)), rtol, atol)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('fields', FIELDS, ids=str)
def test_it_is_flax_batch_norm_with_its_gradients(fields, train):
    close(*(run(kind, draws(), fields, train) for kind in (BatchNorm, nn.BatchNorm)), 1e-4, 1e-4)


def test_statistics_of_half_precision_are_single():
    x = draws(dtype=jnp.bfloat16)
    ours, theirs = (run(kind, x, {}) for kind in (BatchNorm, nn.BatchNorm))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours[1])} == {jnp.dtype('float32')}
    close(ours, theirs, 2e-2, 2e-2)


def test_a_large_mean_leaves_the_gradient_as_it_is():
    x = draws() + 100
    (_, _, ours), (_, _, theirs) = (run(kind, x, {}) for kind in (BatchNorm, nn.BatchNorm))
    close(ours, theirs, 2e-3, 2e-3)


def test_the_first_batch_is_no_statistic():
    variables = BatchNorm(use_running_average=False).init(jax.random.key(0), draws())
    np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
    np.testing.assert_array_equal(variables['batch_stats']['var'], 1)
