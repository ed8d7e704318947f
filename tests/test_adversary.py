"""Adversarial training: its neutral setting, what it makes of a batch, and what it buys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcls import adversary, attacks, augment, losses, optimizers, schedules, steps
from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.models import make_model

SHAPE, CLASSES, BATCH = (4, 4, 1), 3, 8
KINDS = {
    'pgd': {'name': 'pgd', 'epsilon': 0.1, 'steps': 2},
    'trades': {'name': 'trades', 'epsilon': 0.1, 'steps': 2, 'beta': 2.0},
}


def build(**section):
    config = config_lib.get_config()
    config.update({'model': {'name': 'mlp', 'hidden': (5,)}, 'batch_size': BATCH})
    config.update({'optimizer': {'name': 'sgd'}, 'learning_rate': 0.1})
    config.adversary = section or {'name': 'none'}
    return experiment_lib.build(experiment_lib.resolve(config), SHAPE, CLASSES, 100)


def batch(size=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'image': rng.integers(0, 256, (size, *SHAPE), np.uint8),
        'label': rng.integers(0, CLASSES, size, np.int32),
        'mask': np.ones(size, bool),
        'index': np.arange(size, dtype=np.int32),
        'epoch': np.zeros(size, np.int32),
    }


@pytest.fixture(scope='module')
def stepped():
    """The state of step 0, and by kind what one step makes of it, and its sums."""
    start = jax.jit(lambda: experiment_lib.init(build(), 0))()
    return start, {
        name: jax.jit(build(**section).train_step)(start, batch())
        for name, section in {'none': {'name': 'none'}, **KINDS}.items()
    }


def jaxpr(experiment):
    state = jax.eval_shape(lambda: experiment_lib.init(experiment, 0))
    return str(jax.make_jaxpr(experiment.train_step)(state, experiment_lib.raw_batch(experiment)))


def test_epsilon_0_and_beta_0_are_plain_training():
    plain = jaxpr(build())
    for section in ({'name': 'fgsm'}, *KINDS.values()):
        assert jaxpr(build(**{**section, 'epsilon': 0.0})) == plain
        assert jaxpr(build(**section)) != plain
    assert jaxpr(build(**{**KINDS['trades'], 'beta': 0.0})) == plain


@pytest.mark.parametrize('name', KINDS)
def test_a_tiny_epsilon_is_almost_plain_training(stepped, name):
    start, results = stepped
    tiny = jax.jit(build(**{**KINDS[name], 'epsilon': 1e-6}).train_step)(start, batch())[0]
    plain = results['none'][0].params
    near, far = (
        optax.tree.norm(optax.tree.sub(state.params, plain)) for state in (tiny, results[name][0])
    )
    assert near < 1e-4 * optax.tree.norm(plain) < far, (near, far)


def test_the_loss_is_of_adversarial_images_for_pgd_and_of_clean_ones_for_trades(stepped):
    sums = {name: float(sums['loss']) for name, (_, sums) in stepped[1].items()}
    assert sums['pgd'] > sums['none'] * 1.001
    assert sums['trades'] == pytest.approx(sums['none'], rel=1e-6)


def network(model='mlp', **fields):
    model = make_model(model, num_classes=CLASSES, **fields)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    forward = steps.make_float_forward(model, (0.5,), (0.5,))
    return model, variables, forward


def attacked(section, data, key=0):
    """The batch that a step of plain or adversarial training sees, images in [0, 1]."""
    _, variables, forward = network(hidden=(5,))
    attack, _ = adversary.make_parts(section, forward, losses.make_loss(name='cross_entropy'))
    prepare = steps.make_prepare(
        augment.make_augment([]), (0.0,), (1.0,), CLASSES, jnp.float32, attack
    )
    state = steps.TrainState(0, variables['params'], {}, (), {}, 0, None)
    return jax.jit(lambda data: prepare(jax.random.key(key), data, state))(data), forward, variables


@pytest.mark.parametrize(('name', 'field'), [('pgd', 'image'), ('trades', 'adversarial')])
@pytest.mark.parametrize('norm', attacks.NORMS)
def test_images_move_no_further_than_epsilon_towards_a_higher_loss(name, field, norm):
    section = {**KINDS[name], 'norm': norm, 'steps': 5, 'epsilon': 0.2}
    data = batch()
    found, forward, variables = attacked(section, data)
    clean = data['image'] / np.float32(255)
    change = np.asarray(found[field] - clean).reshape(BATCH, -1)
    size = np.abs(change).max(1) if norm == 'linf' else np.linalg.norm(change, axis=1)
    assert 0.1 < size.max() <= 0.2 + 1e-6
    assert found[field].min() >= 0 and found[field].max() <= 1
    logits, moved = (np.asarray(forward(variables, x)[0]) for x in (clean, found[field]))
    if name == 'pgd':
        loss = losses.make_loss(name='cross_entropy')
        assert np.all(loss(moved, found['target']) > loss(logits, found['target']))
    else:
        np.testing.assert_allclose(found['image'], clean, rtol=1e-6)
        # What another image's change does to it.
        aimless = np.asarray(forward(variables, clean + change.reshape(clean.shape)[::-1])[0])
        by_chance = losses.divergence(logits, aimless).mean()
        assert losses.divergence(logits, moved).mean() > by_chance


def test_padding_does_not_change_what_an_example_becomes():
    data = batch()
    few = {key: value[:5] for key, value in data.items()}
    for name, field in (('pgd', 'image'), ('trades', 'adversarial')):
        all_, of_few = (attacked(KINDS[name], x)[0][field] for x in (data, few))
        np.testing.assert_allclose(all_[:5], of_few, atol=1e-6)


def test_trades_is_cross_entropy_plus_beta_times_the_divergence():
    model, variables, forward = network(hidden=(5,))
    loss = losses.make_loss(name='cross_entropy')
    _, penalty = adversary.make_parts(KINDS['trades'], forward, loss)
    rng = np.random.default_rng(1)
    image, other = rng.normal(size=(2, BATCH, *SHAPE)).astype(np.float32)
    label = rng.integers(0, CLASSES, BATCH, np.int32)
    mask = np.arange(BATCH) < 6
    data = {'image': image, 'adversarial': other, 'label': label, 'mask': mask}
    data['target'] = np.eye(CLASSES, dtype=np.float32)[label]
    objective = steps.make_objective(model, loss, penalty=penalty)
    value, _ = objective(variables['params'], {}, data, jax.random.key(0))
    logits, moved = (model.apply(variables, x)[0] for x in (image, other))
    expected = loss(logits, data['target']) + 2.0 * losses.divergence(logits, moved)
    np.testing.assert_allclose(value, expected[:6].mean(), rtol=1e-5)


def test_the_attack_leaves_running_statistics_alone_and_trades_updates_them_by_both():
    model, variables, forward = network(hidden=(5,), norm='batch')
    loss = losses.make_loss(name='cross_entropy')
    data = batch()
    image = jnp.asarray(data['image'] / 255, jnp.float32)
    target = jax.nn.one_hot(data['label'], CLASSES)

    def updated(section, images):
        _, penalty = adversary.make_parts(section, forward, loss)
        objective = steps.make_objective(model, loss, penalty=penalty)
        _, aux = objective(
            variables['params'], variables['batch_stats'],
            {**images, 'target': target, 'label': data['label'], 'mask': data['mask']},
            jax.random.key(0),
        )  # fmt: skip
        return aux['batch_stats'][
            'norm1' if 'norm1' in aux['batch_stats'] else next(iter(aux['batch_stats']))
        ]

    plain = updated({'name': 'none'}, {'image': image})
    twice = updated(KINDS['trades'], {'image': image, 'adversarial': image})
    old = jax.tree.leaves(variables['batch_stats'])
    assert all(x.shape == y.shape for x, y in zip(old, jax.tree.leaves(plain), strict=True))
    # The second update moves them by as much of the rest of the way.
    for before, once, both in zip(*map(jax.tree.leaves, (old, plain, twice)), strict=True):
        share = np.asarray((once - before) / np.where(both == before, 1, both - before))
        assert np.all(share < 0.95)


def weak_and_strong():
    """Two classes, told apart by one strong pixel and by fifteen weak ones."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 512)
    sign = 2.0 * label[:, None] - 1
    strong = 0.5 + 0.35 * sign + 0.02 * rng.normal(size=(512, 1))
    weak = 0.5 + 0.05 * sign + 0.02 * rng.normal(size=(512, 15))
    image = np.clip(np.concatenate([strong, weak], 1), 0, 1).reshape(512, *SHAPE)
    return batch(512) | {'image': np.uint8(255 * image), 'label': np.int32(label)}


def robust_share(section, data):
    """The share of the images that PGD at 0.1 does not fool, of a linear net trained on them."""
    model, variables, forward = network('linear')
    loss = losses.make_loss(name='cross_entropy')
    attack, penalty = adversary.make_parts(section, forward, loss)
    rate = schedules.make_schedule(
        name='constant', learning_rate=0.02, total_steps=100, steps_per_epoch=10
    )
    tx = optimizers.make_optimizer(name='adam', schedule=rate)
    prepare = steps.make_prepare(
        augment.make_augment([]), (0.5,), (0.5,), CLASSES, jnp.float32, attack
    )
    objective = steps.make_objective(model, loss, penalty=penalty)
    step = jax.jit(steps.make_train_step(prepare, objective, steps.plain_gradients, tx))
    state = steps.init_state(variables, tx, jax.random.key(1), 0.0)
    for _ in range(60):
        state, _ = step(state, data)

    @jax.jit
    def margin(params):
        keys = attacks.example_keys(jax.random.key(2), jnp.arange(512))
        image = augment.to_float(jnp.asarray(data['image']))
        return attacks.run(
            attacks.pgd(steps=5), lambda x: forward({'params': params}, x)[0],
            keys, image, data['label'], 0.1,
        ).margin  # fmt: skip

    return float(np.mean(np.asarray(margin(state.params)) < 0))


def test_training_on_adversarial_images_gives_up_weak_evidence_and_is_robust():
    plain, pgd = (
        robust_share(section, weak_and_strong())
        for section in ({'name': 'none'}, {'name': 'pgd', 'epsilon': 0.1, 'steps': 3})
    )
    assert pgd > 0.95 > 0.5 > plain, (pgd, plain)


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'name': 'pdg'}, "Unknown adversary 'pdg'. Did you mean 'pgd'"),
        (
            {'name': 'pgd', 'epsilon': -0.1},
            'config.adversary.epsilon is -0.1; it must be at least 0',
        ),
        ({'name': 'pgd', 'epsilon': 8.0}, 'config.adversary.epsilon is 8.0; it must be at most 1'),
        ({'name': 'pgd', 'steps': 0}, 'config.adversary.steps is 0; it must be at least 1'),
        ({'name': 'pgd', 'norm': 'l1'}, "config.adversary.norm is 'l1'; it must be linf or l2"),
        ({'name': 'trades', 'beta': -1.0}, 'config.adversary.beta is -1.0; it must be at least 0'),
        ({'name': 'pgd', 'beta': 1.0}, "adversary 'pgd' has no argument 'beta'"),
    ],
)
def test_mistakes_are_found_when_the_config_is_resolved(section, message):
    with pytest.raises(UserError, match=message):
        build(**section)
