"""The deep belief network: RBMs against enumeration, pretraining laws, the unrolled network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.errors import UserError
from jaxcls.models import dbn
from jaxcls.models.dbn import DBN, RBM, Recipe

gradient_of = jax.jit(dbn.contrastive_divergence, static_argnames='cd_steps')
RECIPE = Recipe(
    epochs=8, batch_size=10, learning_rate=0.1, momentum=(0.5, 0.9), weight_decay=2e-4, cd_steps=1
)
BATCH_OF_3 = RECIPE._replace(batch_size=3, learning_rate=0.5, weight_decay=0.01)


def states(n):
    """All binary vectors, float32 [2^n, n]."""
    return np.array(list(itertools.product([0, 1], repeat=n)), np.float32)


def random_rbm(visible, hidden):
    rng = np.random.default_rng(0)
    shapes = (visible, hidden), visible, hidden
    return RBM(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes))


def joint_weights(rbm):
    """exp(-E(v, h)) of all states, float64 [2^V, 2^H]."""
    kernel, visible_bias, hidden_bias = (np.asarray(leaf, np.float64) for leaf in rbm)
    v, h = states(len(visible_bias)), states(len(hidden_bias))
    return np.exp(v @ kernel @ h.T + (v @ visible_bias)[:, None] + h @ hidden_bias)


def log_likelihood(rbm, visible):
    every = dbn.free_energy(rbm, states(visible.shape[1]))
    return float(jnp.mean(-dbn.free_energy(rbm, visible)) - jax.nn.logsumexp(-every))


def patterns(seed, examples):
    """Noisy bars, float32 [N, 6]: learnable, since pixels depend on each other."""
    rng = np.random.default_rng(seed)
    bars = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], np.float32)
    flips = rng.random((examples, 6)) < 0.02
    return jnp.asarray(np.abs(bars[rng.integers(3, size=examples)] - flips))


@functools.cache
def network():
    # As wide as the images, so that both layers are one program.
    model = DBN(hidden=(6, 6), pretrain_epochs=2, pretrain_batch_size=8)
    images = patterns(0, 20).reshape(20, 2, 3, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    return model, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes), images


def start(model, params, images, seed=1):
    reports = []
    return model.start_from_data(jax.random.key(seed), params, images, reports.append), reports


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# RBMs


def test_the_free_energy_sums_over_all_hidden_states():
    rbm = random_rbm(4, 3)
    expected = -np.log(joint_weights(rbm).sum(1))
    np.testing.assert_allclose(dbn.free_energy(rbm, states(4)), expected, rtol=1e-5, atol=1e-5)


def test_conditional_probabilities_are_those_of_the_joint_distribution():
    rbm = random_rbm(4, 3)
    joint = joint_weights(rbm)
    given_visible = joint @ states(3) / joint.sum(1, keepdims=True)
    given_hidden = joint.T @ states(4) / joint.sum(0)[:, None]
    np.testing.assert_allclose(dbn.hidden_probabilities(rbm, states(4)), given_visible, rtol=1e-4)
    np.testing.assert_allclose(dbn.visible_probabilities(rbm, states(3)), given_hidden, rtol=1e-4)


@pytest.mark.parametrize('cd_steps', [1, 2, 100])
def test_contrastive_divergence_has_the_mean_of_enumerated_chains(cd_steps):
    # Chains of 100 steps have arrived at the model's distribution: the likelihood's gradient.
    rbm, joint = random_rbm(4, 3), joint_weights(random_rbm(4, 3))
    up, down = joint / joint.sum(1, keepdims=True), joint / joint.sum(0)
    data = np.full(16, 0.0)
    data[[3, 5, 12]] = 0.5, 0.25, 0.25
    model = joint.sum(1) / joint.sum()
    if cd_steps < 100:
        model = data @ np.linalg.matrix_power(up @ down.T, cd_steps)
    difference = (data - model)[:, None] * up
    expected = (
        states(4).T @ difference @ states(3),
        difference.sum(1) @ states(4),
        difference.sum(0) @ states(3),
    )
    visible = jnp.asarray(np.repeat(states(4), (4000 * data).astype(int), axis=0))
    gradient, _ = gradient_of(jax.random.key(0), rbm, visible, cd_steps=cd_steps)
    for ours, exact in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours, exact, atol=0.03)  # standard error: at most 0.008
    assert max(np.abs(exact).max() for exact in expected) > 0.3


def certain_rbm():
    """An RBM whose probabilities are 0 or 1 on binary data, so that a step is not random."""
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(100 * rng.choice([-1.0, 1.0], (4, 3)), jnp.float32)
    return RBM(kernel, jnp.full(4, 50.0), jnp.full(3, -50.0))


def test_a_gradient_step_is_that_of_scikit_learn():
    neural_network = pytest.importorskip('sklearn.neural_network')
    rbm, visible = certain_rbm(), states(4)[[1, 6, 11, 12]]
    theirs = neural_network.BernoulliRBM(n_components=3, learning_rate=0.5)
    theirs.components_ = np.array(rbm.kernel.T, np.float64)
    theirs.intercept_visible_ = np.array(rbm.visible_bias, np.float64)
    theirs.intercept_hidden_ = np.array(rbm.hidden_bias, np.float64)
    theirs.h_samples_ = np.array(dbn.hidden_probabilities(rbm, visible))  # its chains persist
    theirs._fit(np.asarray(visible, np.float64), np.random.RandomState(0))
    gradient, _ = gradient_of(jax.random.key(0), rbm, visible)
    ours = jax.tree.map(lambda p, g: p + 0.5 * g, rbm, gradient)
    assert np.abs(gradient.kernel).max() > 0.1
    np.testing.assert_allclose(ours.kernel.T, theirs.components_, atol=1e-4)
    np.testing.assert_allclose(ours.visible_bias, theirs.intercept_visible_, atol=1e-4)
    np.testing.assert_allclose(ours.hidden_bias, theirs.intercept_hidden_, atol=1e-4)


def test_an_epoch_without_its_incomplete_batch_is_momentum_and_decay_by_hand():
    rbm = certain_rbm()
    data = jnp.tile(states(4)[1], (5, 1))
    velocity = jax.tree.map(jnp.ones_like, rbm)
    new, moved, error = dbn.train_epoch(jax.random.key(0), rbm, velocity, data, 0.8, BATCH_OF_3)
    hidden = np.round(dbn.hidden_probabilities(rbm, data[0]))
    reconstruction = np.round(dbn.visible_probabilities(rbm, hidden))
    hidden_again = np.round(dbn.hidden_probabilities(rbm, reconstruction))
    positive, negative = np.outer(data[0], hidden), np.outer(reconstruction, hidden_again)
    gradient = RBM(
        positive - negative - 0.01 * rbm.kernel, data[0] - reconstruction, hidden - hidden_again
    )
    for leaf, g, v, old in zip(new, gradient, moved, rbm, strict=True):
        np.testing.assert_allclose(v, 0.8 + 0.5 * g, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(leaf, old + v, rtol=1e-6)
    np.testing.assert_allclose(error, np.mean((data[0] - reconstruction) ** 2), atol=1e-6)
    assert error > 0


def test_the_key_shuffles_the_data():
    rbm = certain_rbm()  # whose errors depend on the rows of the one batch only
    data, velocity = jnp.asarray(states(4)[1:6]), jax.tree.map(jnp.ones_like, rbm)
    epochs = [
        dbn.train_epoch(jax.random.key(i), rbm, velocity, data, 0.8, BATCH_OF_3) for i in range(5)
    ]
    assert len({float(error) for _, _, error in epochs}) > 1


def test_pretraining_lowers_the_error_and_raises_the_exact_likelihood():
    data, unseen, reports = patterns(0, 205), patterns(1, 100), []
    recipe = RECIPE._replace(epochs=30)
    before = dbn.pretrain_rbm(jax.random.key(0), data, 8, RECIPE._replace(epochs=0), reports.append)
    rbm = dbn.pretrain_rbm(jax.random.key(0), data, 8, recipe, reports.append)
    assert [entry['epoch'] for entry in reports] == list(range(1, 31))
    assert reports[-1]['reconstruction_error'] < 0.3 * reports[0]['reconstruction_error']
    assert log_likelihood(before, unseen) < -4  # 6 ln 2 = 4.16: uniform
    assert log_likelihood(rbm, unseen) > -2.5  # of 1.67, the data's entropy


def test_the_second_momentum_begins_after_five_epochs():
    errors = {}
    for last in (0.5, 0.9):
        reports = []
        recipe = RECIPE._replace(momentum=(0.5, last))
        dbn.pretrain_rbm(jax.random.key(0), patterns(0, 40), 4, recipe, reports.append)
        errors[last] = [entry['reconstruction_error'] for entry in reports]
    assert errors[0.5][:5] == errors[0.9][:5]
    assert all(a != b for a, b in zip(errors[0.5][5:], errors[0.9][5:], strict=True))


def test_training_that_diverges_is_an_error():
    recipe = RECIPE._replace(momentum=(0.5, 0.5))
    with pytest.raises(UserError, match=r'pretrain_learning_rate=0.1 diverged .*epoch 1: lower it'):
        dbn.pretrain_rbm(jax.random.key(0), patterns(0, 40) * np.nan, 4, recipe, lambda _: None)


# The network


def test_the_unrolled_network_is_the_stack_of_rbms():
    model, params, images = network()
    started, reports = start(model, params, images)
    fields = {name: getattr(model, f'pretrain_{name}') for name in Recipe._fields[:-1]}
    data, keys = images.reshape(20, 6), jax.random.key(1)
    _, features = model.apply({'params': started}, images)
    for layer, width in enumerate(model.hidden, 1):
        key = jax.random.fold_in(keys, layer)
        rbm = dbn.pretrain_rbm(key, data, width, Recipe(**fields, cd_steps=1), lambda _: None)
        data = dbn.hidden_probabilities(rbm, data)
        np.testing.assert_allclose(features[f'hidden{layer}'], data, rtol=1e-3)
    assert_trees_equal(started['head'], params['head'])
    assert [(e['layer'], e['epoch']) for e in reports] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(0 < e['reconstruction_error'] < 1 for e in reports)


def test_large_data_are_propagated_in_parts_to_the_same_probabilities():
    rbm = random_rbm(6, 3)
    data = patterns(0, 2005)
    expected = dbn.hidden_probabilities(rbm, data)
    np.testing.assert_allclose(dbn._propagate(rbm, data), expected, rtol=1e-5)


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    model, params, images = network()
    (first, _), (again, _) = start(model, params, images), start(model, params, np.asarray(images))
    other, _ = start(model, params, images, seed=2)
    assert_trees_equal(first, again)
    assert (first['hidden1']['dense']['kernel'] != other['hidden1']['dense']['kernel']).any()


def test_without_pretraining_the_parameters_are_untouched():
    _, params, images = network()
    model = DBN(hidden=(6, 6), pretrain_epochs=0)
    started, reports = start(model, params, images - 3)
    assert_trees_equal(started, params)
    assert reports == []


def test_structure_shapes_and_dtypes_are_kept_and_lists_will_do():
    _, params, images = network()
    fields = {'pretrain_epochs': 2, 'pretrain_batch_size': 8, 'pretrain_momentum': [0.5, 0.9]}
    model = DBN(hidden=[6, 6], param_dtype=jnp.bfloat16, **fields)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    before = jax.tree.map(jnp.copy, params)
    started, _ = start(model, params, images)
    assert_trees_equal(params, before)
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (started, params)]
    assert described[0] == described[1]


@pytest.mark.parametrize('low, high', [(-0.5, 1), (0, 1.5), (0, np.nan)])
def test_images_outside_0_to_1_are_an_error(low, high):
    model, params, images = network()
    wrong = jnp.where(images > 0.5, high, low).astype(jnp.float32)
    with pytest.raises(UserError, match=r'within \[0, 1\].*config.data.mean=\(0,\).*std=\(1,\)'):
        start(model, params, wrong)


def test_fewer_images_than_a_batch_are_an_error():
    model, params, images = network()
    with pytest.raises(UserError, match='pretrain_batch_size is 8; it must be at most 7'):
        start(model, params, images[:7])


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'activation': 'relu'}, "activation is 'relu'.*pretrain_epochs=0"),
        ({'pretrain_momentum': (0.5,)}, 'pretrain_momentum'),
        ({'pretrain_momentum': (0.5, 1.0)}, 'pretrain_momentum'),
        ({'pretrain_epochs': -1}, 'pretrain_epochs'),
        ({'pretrain_learning_rate': float('nan')}, 'pretrain_learning_rate'),
        ({'pretrain_weight_decay': -1.0}, 'pretrain_weight_decay'),
        ({'pretrain_batch_size': 0}, 'pretrain_batch_size'),
        ({'cd_steps': 0}, 'cd_steps'),
        ({'hidden': (4, 0)}, 'hidden'),
    ],
)
def test_values_out_of_range_are_errors(fields, message):
    with pytest.raises(UserError, match=message):
        DBN(**fields)


def test_without_pretraining_any_activation_will_do():
    model = DBN(hidden=(4,), activation='relu', pretrain_epochs=0)
    images = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert shapes['params']['hidden1']['dense']['kernel'].shape == (16, 4)
