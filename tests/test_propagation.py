import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import propagation


def fresh(**model):
    config = config_lib.get_config()
    config.model = {'name': 'mlp', **model}
    experiment = experiment_lib.build(experiment_lib.resolve(config), (8, 8, 1), 10, 100)
    state = experiment_lib.init(experiment, 0)
    return experiment, {'params': state.params, 'batch_stats': state.batch_stats}


def test_the_numbers_of_a_network_of_one_layer_by_hand():
    experiment, variables = fresh(hidden=(16,), activation='identity', head_init='he_normal')
    rng = np.random.default_rng(0)
    images, label = rng.integers(0, 256, (4, 8, 8, 1), np.uint8), jnp.array([0, 1, 2, 3])
    found = propagation.of(experiment, variables, images, label)
    x = (images.reshape(4, -1) / 255 - 0.5) / 0.5
    params = jax.tree.map(np.asarray, variables['params'])
    hidden = x @ params['hidden1']['dense']['kernel']
    logits = hidden @ params['head']['kernel']
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    d = (p - np.eye(10)[np.asarray(label)]) / 4
    head = np.sqrt(np.sum((hidden.T @ d) ** 2) + np.sum(d.sum(0) ** 2))
    assert found.names == ['hidden1', 'head']
    assert found.activation == pytest.approx([hidden.std(), logits.std()], rel=1e-5)
    assert found.gradient[1] == pytest.approx(head, rel=1e-5)


def test_nothing_is_dropped():
    images, label = np.full((4, 8, 8, 1), 9, np.uint8), jnp.arange(4)
    plain, dropping = (
        propagation.of(*fresh(hidden=(16,), dropout=rate), images, label) for rate in (0.0, 0.5)
    )
    assert dropping == plain


def test_the_layers_are_in_order_and_sigmoids_lose_the_gradient():
    experiment, variables = fresh(hidden=(16,) * 11, activation='sigmoid', head_init='he_normal')
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    found = propagation.of(experiment, variables, images, jnp.arange(8))
    assert found.names == [*(f'hidden{i}' for i in range(1, 12)), 'head']
    assert found.gradient[0] < 1e-3 * found.gradient[-1]
