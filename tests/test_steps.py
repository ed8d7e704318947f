import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxcls import augment, losses, optimizers, schedules, steps
from jaxcls.models import make_model

pytestmark = pytest.mark.usefixtures('optimized')

SHAPE, CLASSES, BATCH = (6, 6, 1), 3, 8


def make(gradients=steps.plain_gradients, optimizer='sgd', ema_decay=0.0, model=None, **chain):
    model = model or make_model('mlp', num_classes=CLASSES, hidden=(5,))
    rate = schedules.make_schedule(
        name='constant', learning_rate=0.1, total_steps=100, steps_per_epoch=10
    )
    tx = optimizers.make_optimizer(name=optimizer, schedule=rate, **chain)
    prepare = steps.make_prepare(augment.make_augment([]), (0.5,), (0.5,), CLASSES, jnp.float32)
    objective = steps.make_objective(model, losses.make_loss(name='cross_entropy'))
    step = steps.make_train_step(prepare, objective, gradients, tx, ema_decay)
    key, run_key = jax.random.split(jax.random.key(0))
    variables = model.init(key, jnp.zeros((1, *SHAPE)))
    state = steps.init_state(variables, tx, run_key, ema_decay)
    return jax.jit(step), state, model


def batch(seed=0, size=BATCH, **fields):
    rng = np.random.default_rng(seed)
    return {
        'image': rng.integers(0, 256, (size, *SHAPE), np.uint8),
        'label': rng.integers(0, CLASSES, size, np.int32),
        'mask': np.ones(size, bool),
        'index': np.arange(size, dtype=np.int32),
        'epoch': np.zeros(size, np.int32),
        **fields,
    }


def assert_close(first, second, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), first, second)


def norm_model():
    return make_model('mlp', num_classes=CLASSES, hidden=(5,), norm='batch')


def test_a_step_is_that_of_a_hand_written_loop():
    train_step, state, model = make(momentum=0.0)
    data = batch()
    image = jnp.asarray(data['image'] / 255.0 - 0.5, jnp.float32) / 0.5

    def loss(params):
        logits, _ = model.apply({'params': params}, image, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data['label']).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    new, sums = train_step(state, data)
    assert_close(new.params, expected, rtol=1e-5, atol=1e-7)
    assert int(new.step) == 1 and int(sums['examples']) == BATCH
    np.testing.assert_allclose(sums['loss'] / BATCH, value, rtol=1e-6)


def test_padding_changes_nothing():
    train_step, state, _ = make()
    data = batch(size=5)
    padded = {
        key: np.concatenate([value, np.full((3, *value.shape[1:]), 1).astype(value.dtype)])
        for key, value in data.items()
    }
    padded['mask'][5:] = False
    plain, sums = train_step(state, data)
    masked, masked_sums = train_step(state, padded)
    assert_close(plain.params, masked.params, rtol=1e-5, atol=1e-7)
    assert_close(sums, masked_sums, rtol=1e-5)


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    plain, state, _ = make()
    accumulated, _, _ = make(steps.accumulated_gradients(parts))
    data = batch(mask=np.arange(BATCH) < 6)
    (whole, sums), (split, split_sums) = plain(state, data), accumulated(state, data)
    assert_close(whole.params, split.params, rtol=1e-5, atol=1e-7)
    assert_close(sums, split_sums, rtol=1e-5)


def test_accumulation_updates_batch_statistics_part_by_part():
    model = norm_model()
    accumulated, state, _ = make(steps.accumulated_gradients(2), model=model)
    new, _ = accumulated(state, batch())
    assert not np.allclose(
        jax.tree.leaves(new.batch_stats)[0], jax.tree.leaves(state.batch_stats)[0]
    )


def test_sam_without_radius_is_plain_and_with_one_is_not():
    plain, state, _ = make()
    new = plain(state, batch())[0]
    neutral = make(steps.sam_gradients(0.0))[0](state, batch())[0]
    assert_close(new.params, neutral.params, rtol=1e-6)
    sharp = make(steps.sam_gradients(0.5))[0](state, batch())[0]
    assert not np.allclose(new.params['head']['kernel'], sharp.params['head']['kernel'])


def test_sam_is_the_gradient_at_the_ascended_parameters():
    data = {'x': jnp.array([1.0, 2.0])}

    def objective(params, batch_stats, batch, key):
        return (params['w'] ** 2 * batch['x']).sum(), {}

    _, grads = steps.sam_gradients(0.1)(objective, {'w': jnp.array([3.0, -1.0])}, {}, data, None)
    g = np.array([6.0, -4.0])
    ascended = np.array([3.0, -1.0]) + 0.1 * g / np.sqrt((g**2).sum())
    np.testing.assert_allclose(grads['w'], 2 * ascended * np.array([1.0, 2.0]), rtol=1e-6)


def test_a_non_finite_step_changes_nothing_but_the_counters():
    train_step, state, _ = make(optimizer='adam', ema_decay=0.9, model=norm_model())
    state, _ = train_step(state, batch())
    broken = state.replace(
        params=jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.inf), state.params)
    )
    new, sums = train_step(broken, batch(1))
    for field in ('params', 'batch_stats', 'opt_state', 'ema'):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, field), getattr(broken, field))
    assert (int(new.step), int(new.bad_steps)) == (2, 1)
    assert {key: float(value) for key, value in sums.items()} == {
        'examples': 0, 'loss': 0, 'top1': 0, 'top5': 0, 'bad_steps': 1,
    }  # fmt: skip
    recovered, sums = train_step(new.replace(params=state.params), batch(2))
    assert int(recovered.bad_steps) == 0 and int(sums['bad_steps']) == 0


def test_the_average_follows_the_parameters_and_is_what_is_evaluated():
    train_step, state, _ = make(ema_decay=0.99)
    new, _ = train_step(state, batch())
    expected = jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, state.ema, new.params)  # (1+0)/(10+0)
    assert_close(new.ema, expected, rtol=1e-5, atol=1e-7)
    assert steps.evaluation_variables(new)['params'] is new.ema
    _, plain, _ = make()
    assert steps.evaluation_variables(plain)['params'] is plain.params


def test_bfloat16_parameters_have_float32_averages_and_optimiser_state():
    model = make_model('mlp', num_classes=CLASSES, hidden=(5,), param_dtype=jnp.bfloat16)
    train_step, state, _ = make(
        steps.accumulated_gradients(2), optimizer='adam', ema_decay=0.999, model=model
    )
    new, _ = train_step(state, batch())
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(new.params)}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.leaves((new.ema, new.opt_state))
    assert {leaf.dtype for leaf in wide if leaf.ndim} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


def test_an_overflow_in_the_optimiser_state_is_skipped_too():
    train_step, state, _ = make(optimizer='adam')
    grown = jax.tree.map(lambda x: x + jnp.inf if x.ndim else x, state.opt_state)
    new, sums = train_step(state.replace(opt_state=grown), batch())
    assert int(sums['bad_steps']) == 1 and int(new.bad_steps) == 1


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_noticed_wherever_it_is(value):
    params = {'a': jnp.ones((2, 3)), 'b': {'c': jnp.ones(4)}}
    # Moments are like the parameters, in another type; the others are not.
    moments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    trees = params, (jnp.float32(1), {'stats': jnp.ones(3)}, (moments, jnp.int32(7), params))
    assert steps._all_finite(*trees)
    leaves, structure = jax.tree.flatten(trees)
    for i, leaf in enumerate(leaves):
        if leaf.dtype != jnp.int32:
            broken = [*leaves[:i], leaf.at[(-1,) * leaf.ndim].set(value), *leaves[i + 1 :]]
            assert not steps._all_finite(*jax.tree.unflatten(structure, broken)), i


def test_many_steps_in_one_program_are_the_same_steps():
    train_step, state, _ = make(optimizer='adam')
    items = [batch(seed) for seed in range(3)]
    run_steps = jax.jit(steps.make_run_steps(train_step, lambda data, item: item))
    zeros = jax.tree.map(jnp.zeros_like, train_step(state, items[0])[1])
    together, totals = run_steps(state, zeros, (), jax.tree.map(lambda *x: np.stack(x), *items))
    apart, apart_totals = state, zeros
    for item in items:
        stacked = jax.tree.map(lambda x: x[None], item)
        apart, apart_totals = run_steps(apart, apart_totals, (), stacked)
    assert int(together.step) == int(apart.step) == 3
    assert_close(together.params, apart.params, rtol=1e-5, atol=1e-7)
    assert_close(totals, apart_totals, rtol=1e-5)


def test_penalties_are_added_to_the_loss():
    model = make_model('mlp', num_classes=CLASSES, hidden=(5,))
    loss = losses.make_loss(name='cross_entropy')
    params = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)['params']
    prepare = steps.make_prepare(augment.make_augment([]), (0.5,), (0.5,), CLASSES, jnp.float32)
    data = prepare(jax.random.key(0), batch(), None)
    plain, _ = steps.make_objective(model, loss)(params, {}, data, jax.random.key(1))
    decayed, _ = steps.make_objective(model, loss, 0.01, 0.1)(params, {}, data, jax.random.key(1))
    kernels = [np.asarray(p) for p in jax.tree.leaves(params) if p.ndim > 1]
    expected = sum(0.01 * np.abs(k).sum() + 0.05 * (k**2).sum() for k in kernels)
    np.testing.assert_allclose(decayed - plain, expected, rtol=1e-4)


def test_heads_in_the_middle_count_in_the_loss_and_not_in_the_metrics():
    class Heads(nn.Module):  # as GoogLeNet has them, which takes long to compile
        aux_weight: float = 0.3

        @nn.compact
        def __call__(self, images, *, train=False):
            x = images.reshape(len(images), -1)
            heads = {f'aux_logits{i}': nn.Dense(CLASSES)(x) for i in (1, 2)} if train else {}
            return nn.Dense(CLASSES)(x), heads

    model = Heads()
    images = np.random.default_rng(0).standard_normal((4, 4, 4, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), images, train=True)
    target = jax.nn.one_hot(np.arange(4) % CLASSES, CLASSES)
    batch = {
        'image': images,
        'target': target,
        'label': target.argmax(-1),
        'mask': np.ones(4, bool),
    }
    loss = losses.make_loss(name='cross_entropy')
    objective = steps.make_objective(model, loss)
    total, aux = objective(variables['params'], {}, batch, jax.random.key(1))
    (logits, features), _ = model.apply(variables, images, train=True, mutable=['batch_stats'])
    middle = [loss(features[f'aux_logits{i}'], target).mean() for i in (1, 2)]
    main = loss(logits, target).mean()
    np.testing.assert_allclose(total, main + 0.3 * sum(middle), rtol=1e-5)
    np.testing.assert_allclose(aux['sums']['loss'] / 4, main, rtol=1e-5)
