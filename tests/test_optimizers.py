import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcls import optimizers, registry
from jaxcls.errors import UserError
from jaxcls.optimizers import OPTIMIZERS, make_optimizer
from jaxcls.schedules import make_schedule

STEPS = 30
# Where the default rate of 0.05 or a slow start would need more steps than a test has.
SETTINGS = {
    'adadelta': {'rate': 5.0},
    'cocob': {'rate': 1.0},
    'dadapt_adamw': {'rate': 1.0, 'estim_lr0': 1e-3},
    'dog': {'rate': 1.0, 'init_step': 0.1},
    'dowg': {'rate': 1.0},
    'lars': {'rate': 10.0},
    'mechanic_adam': {'rate': 1.0, 's_init': 0.1},
    'momo': {'rate': 1.0},
    'noisy_sgd': {'rate': 0.5},
    'optimistic_gradient_descent': {'rate': 0.5},
    'polyak_sgd': {'rate': 1.0},
    'prodigy': {'rate': 1.0, 'estim_lr0': 1e-3},
    'radam': {'rate': 0.2},
    'schedule_free_sgd': {'rate': 0.5},
}


@pytest.fixture(scope='module')
def problem():
    """The loss and gradient of a convolution and a dense layer on 24 examples; its parameters."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 2, 2, 3)).astype(np.float32), rng.integers(0, 3, 24)
    params = {
        'conv': jnp.asarray(rng.normal(size=(2, 2, 3, 4)) * 0.3, jnp.float32),
        'dense': jnp.asarray(rng.normal(size=(4, 3)) * 0.5, jnp.float32),
        'bias': jnp.array([0.1, 0.2, 0.3]),
    }

    def loss(params):
        hidden = jnp.tanh(jnp.einsum('bhwi,hwio->bo', x, params['conv']))
        logits = hidden @ params['dense'] + params['bias']
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax.jit(jax.value_and_grad(loss)), params


def schedule(name='constant', rate=1.0, warmup_epochs=0.0):
    return make_schedule(
        name=name,
        learning_rate=rate,
        total_steps=STEPS,
        steps_per_epoch=10.0,
        warmup_epochs=warmup_epochs,
    )


def one_update(params, grads, **kwargs):
    tx = make_optimizer(**{'schedule': schedule(), **kwargs})
    update = jax.jit(lambda p, g: tx.update(g, tx.init(p), p, value=jnp.float32(1.0))[0])
    return update(params, grads)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, 'weak_type', False)), tree)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_loss_falls_in_one_program_on_donated_arrays(name, problem):
    loss, params = problem
    settings = {'rate': 0.05, **SETTINGS.get(name, {})}
    rate = schedule('cosine' if 'free' not in name else 'constant', settings.pop('rate'), 0.3)
    tx = make_optimizer(name=name, schedule=rate, weight_decay=1e-3, **settings)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, value, grads):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    first, before = loss(params)[0], types((params, state))
    params = jax.tree.map(jnp.copy, params)
    for _ in range(STEPS):
        params, state = update(params, state, *loss(params))
    assert update._cache_size() == 1
    assert types((params, state)) == before
    assert float(loss(optimizers.evaluation_params(state, params))[0]) < 0.9 * first


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_states_keep_their_types_with_bfloat16_parameters(name, problem):
    _, params = problem
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = make_optimizer(name=name, schedule=schedule(), weight_decay=0.1, clip_norm=1.0)

    def update(params):
        state = tx.init(params)
        return state, tx.update(params, state, params, value=jnp.float32(1.0))[1]

    before, after = jax.eval_shape(update, params)
    assert types(before) == types(after)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_defaults_are_plain_data_in_their_ranges(name):
    defaults = registry.defaults(OPTIMIZERS[name])
    for field, value in defaults.items():
        assert type(value) in (bool, int, float) or {type(v) for v in value} == {float}, field
    assert not {field for field in defaults if 'decay' in field} - {
        'decay',
        'decay_rate',
        'decay_offset',
    }
    make_optimizer(name=name, schedule=schedule(), **defaults)


@pytest.mark.parametrize(
    'name', ['adam', 'dog', 'lamb', 'lars', 'mechanic_adam', 'prodigy', 'schedule_free_adamw']
)
def test_decay_shrinks_kernels_and_nothing_else(name, problem):
    _, params = problem
    if name in ('prodigy', 'mechanic_adam'):  # their estimates divide by the gradient
        grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    else:
        grads = jax.tree.map(jnp.zeros_like, params)
    plain, decayed = (
        one_update(params, grads, name=name, schedule=schedule(rate=0.1), weight_decay=decay)
        for decay in (0.0, 0.5)
    )
    change = jax.tree.map(jnp.subtract, decayed, plain)
    np.testing.assert_array_equal(change['bias'], 0.0)
    for kernel in ('conv', 'dense'):
        assert float(jnp.vdot(change[kernel], params[kernel])) < 0


@pytest.mark.parametrize('name', ['sgd', 'lion'])
def test_decoupled_decay_follows_the_schedule(name, problem):
    _, params = problem
    rate = schedule('linear', 0.2, warmup_epochs=0.5)
    tx = make_optimizer(name=name, schedule=rate, weight_decay=0.5)
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(3):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_allclose(
            updates['dense'], -rate(step) * 0.5 * params['dense'], rtol=1e-5, atol=1e-8
        )


def test_adamw_step_by_hand():
    params, grads = {'w': jnp.array([[2.0, -3.0]])}, {'w': jnp.array([[0.5, -0.01]])}
    updates = one_update(params, grads, name='adamw', schedule=schedule(rate=0.1), weight_decay=0.2)
    expected = [[-0.1 - 0.1 * 0.2 * 2, 0.1 + 0.1 * 0.2 * 3]]
    np.testing.assert_allclose(updates['w'], expected, rtol=1e-5)


def torch_run(torch, optimizer, kernel, target, **kwargs):
    weight = torch.from_numpy(np.array(kernel)).requires_grad_()
    optimizer = optimizer([weight], lr=0.1, **kwargs)
    for _ in range(5):
        optimizer.zero_grad()
        ((weight - torch.from_numpy(np.array(target))) ** 4).sum().backward()
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize(
    ('theirs', 'their_arguments', 'ours'),
    [
        ('SGD', {}, {'name': 'sgd', 'momentum': 0.0}),
        ('SGD', {'momentum': 0.9}, {'name': 'sgd'}),
        ('SGD', {'momentum': 0.9, 'nesterov': True}, {'name': 'sgd', 'nesterov': True}),
        ('SGD', {'momentum': 0.9, 'weight_decay': 0.3}, {'name': 'sgd', 'l2': 0.3}),
        ('Adam', {'weight_decay': 0.3}, {'name': 'adam', 'l2': 0.3}),
        ('AdamW', {'weight_decay': 0.3}, {'name': 'adamw', 'weight_decay': 0.3}),
    ],
)
def test_equal_to_pytorch(theirs, their_arguments, ours, problem):
    torch = pytest.importorskip('torch')
    kernel, target = problem[1]['dense'], jnp.ones((4, 3))
    theirs = getattr(torch.optim, theirs)
    expected = torch_run(torch, theirs, kernel, target, **their_arguments)
    ours = dict(ours)
    l2 = ours.pop('l2', 0.0)
    tx = make_optimizer(schedule=schedule(rate=0.1), **ours)

    def loss(params):
        return jnp.sum((params['w'] - target) ** 4) + optimizers.penalty(params, 0.0, l2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = {'w': kernel}, tx.init({'w': kernel})
    for _ in range(5):
        params, state = step(params, state)
    np.testing.assert_allclose(params['w'], expected, rtol=1e-4, atol=1e-6)


def test_neutral_settings_equal_the_plain_chain(problem):
    _, params = problem
    grads = params
    updates = one_update(
        params, grads, name='adam', weight_decay=0.0, clip_norm=0.0, adaptive_clip=0.0
    )
    plain = optax.adam(1.0)
    expected = jax.jit(lambda g: plain.update(g, plain.init(g))[0])(grads)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_clip_norm_bounds_the_gradient_and_leaves_small_ones(problem):
    _, params = problem
    clipped = one_update(params, params, name='sgd', momentum=0.0, clip_norm=0.01)
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.01, rel=1e-5)
    small = one_update(params, params, name='sgd', momentum=0.0, clip_norm=1e3)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -p, rtol=1e-6), small, params)


def test_adaptive_clip_bounds_every_unit(problem):
    _, params = problem
    grads = jax.tree.map(lambda p: 10 * p, params)
    updates = one_update(params, grads, name='sgd', momentum=0.0, adaptive_clip=0.02)
    unit = functools.partial(jnp.linalg.norm, axis=0)
    for name in ('conv', 'dense'):
        kernel = params[name].reshape(-1, params[name].shape[-1])
        update = updates[name].reshape(kernel.shape)
        np.testing.assert_allclose(unit(update), 0.02 * unit(kernel), rtol=1e-4)


def test_muon_orthogonalises_convolutions_over_their_inputs(problem):
    with jax.enable_x64(True):  # in single precision, small updates are mostly rounding
        kernel = problem[1]['conv'].astype(jnp.float64)
        params = {'conv': kernel, 'flat': kernel.reshape(12, 4)}
        updates = one_update(params, params, name='muon')
    np.testing.assert_allclose(updates['conv'].reshape(12, 4), updates['flat'], rtol=1e-9)
    singular = np.linalg.svd(updates['flat'], compute_uv=False) / (0.2 * math.sqrt(12))
    assert 0.5 < singular.min() <= singular.max() < 1.5


def test_polyak_steps_are_the_gap_over_the_squared_gradient_and_capped(problem):
    _, params = problem
    grads = jax.tree.map(jnp.ones_like, params)
    step = 1.0 / float(optax.tree.norm(grads)) ** 2
    for rate, expected in ((1.0, step), (step / 2, step / 2)):
        update = one_update(params, grads, name='polyak_sgd', schedule=schedule(rate=rate))
        np.testing.assert_allclose(update['bias'], -expected, rtol=1e-5)


def test_schedule_free_evaluates_the_average_and_others_the_parameters(problem):
    _, params = problem
    tx = make_optimizer(name='schedule_free_sgd', schedule=schedule(rate=0.1), clip_norm=1e3)
    update, state, iterates, current = jax.jit(tx.update), tx.init(params), [], params
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, current)
        current = optax.apply_updates(current, updates)
        iterates.append(params['bias'] - 0.1 * (len(iterates) + 1))
    average = optimizers.evaluation_params(state, current)['bias']
    np.testing.assert_allclose(average, np.mean(iterates, axis=0), rtol=1e-4, atol=1e-6)
    plain = make_optimizer(name='adam', schedule=schedule())
    assert optimizers.evaluation_params(plain.init(params), params) is params


def test_decay_mask_keeps_kernels(problem):
    assert optimizers.decay_mask(problem[1]) == {'conv': True, 'dense': True, 'bias': False}


def test_penalty_by_hand_and_without_biases(problem):
    _, params = problem
    kernels = np.concatenate([np.ravel(params['conv']), np.ravel(params['dense'])])
    expected = 0.3 * np.abs(kernels).sum() + 0.5 / 2 * (kernels**2).sum()
    assert float(optimizers.penalty(params, 0.3, 0.5)) == pytest.approx(expected, rel=1e-5)
    assert optimizers.penalty(params, 0.0, 0.0) == 0.0
    gradient = jax.grad(lambda params: optimizers.penalty(params, 0.3, 0.5))
    found = jax.jit(gradient)(params)
    assert not found['bias'].any()
    by_hand = 0.3 * np.sign(params['conv']) + 0.5 * params['conv']
    np.testing.assert_allclose(found['conv'], by_hand, rtol=1e-5)


def test_ema_by_hand():
    update = jax.jit(optimizers.ema_update)
    ema, params = {'w': jnp.array([0.0])}, {'w': jnp.array([1.0])}
    np.testing.assert_allclose(update(ema, params, 0.9, jnp.int32(0))['w'], 0.9, rtol=1e-6)
    np.testing.assert_allclose(update(ema, params, 0.9, jnp.int32(10))['w'], 0.45, rtol=1e-6)
    np.testing.assert_allclose(update(ema, params, 0.9, jnp.int32(9999))['w'], 0.1, rtol=1e-5)
    assert update(ema, params, 0.0, jnp.int32(9999))['w'] == 1.0


def test_ema_keeps_its_dtype():
    tree = {'w': jnp.ones(2, jnp.bfloat16)}
    assert optimizers.ema_update(tree, tree, 0.9, jnp.int32(3))['w'].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'sgd', 'momentum': 1.0}, r'optimizer.momentum is 1.0; it must be in \[0, 1\)'),
        ({'name': 'sgd', 'momentum': -0.1}, 'momentum'),
        ({'name': 'adam', 'b1': math.nan}, 'b1'),
        ({'name': 'adam', 'eps': -1e-8}, 'eps'),
        ({'name': 'prodigy', 'betas': (0.9, 1.0)}, 'betas'),
        ({'name': 'prodigy', 'betas': (0.9,)}, '2 values'),
        ({'name': 'schedule_free_sgd', 'b1': 0.0}, 'b1'),
        ({'name': 'sgd', 'weight_decay': -1.0}, 'weight_decay'),
        ({'name': 'sgd', 'weight_decay': math.nan}, 'weight_decay'),
        ({'name': 'sgd', 'clip_norm': math.inf}, 'clip_norm'),
        ({'name': 'sgd', 'adaptive_clip': -0.01}, 'adaptive_clip'),
        ({'name': 'sgd', 'momentun': 0.9}, "Did you mean 'momentum'"),
        ({'name': 'lion', 'mask': 1}, 'no argument'),
        ({'name': 'adan', 'learning_rate': 1.0}, 'no argument'),
        ({'name': 'adammw'}, "Did you mean 'adamw'"),
    ],
)
def test_mistakes_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(schedule=schedule(), **arguments)
