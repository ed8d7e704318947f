"""Pruning: masks against NumPy, the schedule by hand, exact zeros, and the same bits after a break."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fit, optimizers, pruning, runs, schedules, steps, verify
from jaxcls.errors import UserError

SHAPES = {'first': (3, 3, 2, 4), 'second': (8, 5), 'head': (5, 3)}


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {'kernel': rng.normal(size=shape).astype(np.float32), 'bias': np.ones(shape[-1], 'f')}
        for name, shape in SHAPES.items()
    }


def config(**fields):
    built = config_lib.get_config()
    built.update({'epochs': 2.0, 'batch_size': 64, 'model': {'name': 'mlp', 'hidden': (16,)}})
    built.data.update({'train': 'train[:640]', 'validation': 'test[:64]'})
    built.pruning = fields.pop('pruning', {'name': 'magnitude', 'every': 3})
    built.update(fields)
    return built


def zeros(tree):
    return {path: np.asarray(leaf) == 0 for path, leaf in pruning._by_path(tree).items()}


def size(kernel):
    return np.abs(kernel)


def adaptive(kernel):
    """Lee et al. 2021, equation 5, weight by weight."""
    squares = np.float64(kernel) ** 2
    return squares / np.array([squares[squares >= s].sum() for s in squares.ravel()]).reshape(
        kernel.shape
    )


@pytest.mark.parametrize('sparsity', [0.0, 0.25, 0.9])
@pytest.mark.parametrize(('scope', 'score'), [('global', size), ('adaptive', adaptive)])
def test_masks_over_all_layers_are_those_of_a_sort_in_numpy(scope, score, sparsity):
    pruned, masks = pruning.prune(params(), sparsity, scope)
    kernels = [params()[name]['kernel'] for name in sorted(SHAPES)]
    order = np.argsort(np.concatenate([score(kernel).ravel() for kernel in kernels]))
    expected = np.ones(order.size, bool)
    expected[order[: round(sparsity * order.size)]] = False
    found = np.concatenate([np.asarray(masks[f'{name}/kernel']).ravel() for name in sorted(SHAPES)])
    np.testing.assert_array_equal(found, expected)
    assert (zeros(pruned)['second/kernel'] == ~np.asarray(masks['second/kernel'])).all()
    assert not any(zeros(pruned)[f'{name}/bias'].any() for name in SHAPES)


def test_each_layer_alone_loses_its_share_and_what_is_kept_none():
    pruned, masks = pruning.prune(params(), 0.6, scope='layer', keep='^head')
    assert set(masks) == {'first/kernel', 'second/kernel'}
    counts = [int(zeros(pruned)[f'{name}/kernel'].sum()) for name in ('first', 'second', 'head')]
    assert counts == [round(0.6 * 72), round(0.6 * 40), 0]
    assert pruning.density(pruned) == (127 + 12 - 43 - 24, 139)


def test_the_schedule_by_hand():
    at = [float(pruning.sparsity_at(step, 0.8, 10, 30)) for step in (0, 10, 15, 20, 30, 31)]
    expected = [0, 0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8, 0.8]
    np.testing.assert_allclose(at, expected, rtol=1e-6)
    assert float(pruning.sparsity_at(5, 0.8, 5, 5)) == pytest.approx(0.8)
    assert float(pruning.sparsity_at(4, 0.8, 5, 5)) == 0


@pytest.mark.parametrize('name', ['adamw', 'schedule_free_sgd'])
def test_zeros_are_exact_and_stay_whatever_the_optimiser(name):
    schedule = schedules.make_schedule(
        name='constant', learning_rate=0.1, total_steps=20, steps_per_epoch=1, warmup_epochs=0
    )
    prune = pruning.make_pruning(
        name='magnitude', total_steps=20, sparsity=0.75, begin=0.25, end=0.5, every=2
    )
    tx = optax.chain(optimizers.make_optimizer(name=name, schedule=schedule), prune)

    @jax.jit
    def step(state, grads):
        p, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, p, value=jnp.float32(1))
        return optax.apply_updates(p, updates), opt_state

    p = jax.tree.map(jnp.asarray, params())
    state, before, shares = (p, tx.init(p)), None, []
    for i in range(20):
        state = step(state, params(seed=i))
        now = zeros(state[0])
        assert before is None or all((now[path] >= before[path]).all() for path in now)
        before = now
        shares.append(sum(z.sum() for z in now.values()) / 127)
    assert shares[3] == 0 and 0 < shares[6] < shares[8] < 0.75
    assert shares[9] == shares[19] == pytest.approx(0.75, abs=1 / 127)
    evaluated = pruning.masked(state[1], optimizers.evaluation_params(state[1], state[0]))
    assert all((zeros(evaluated)[path] >= z).all() for path, z in before.items())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('pruned') / 'run'
    return fit(config(ema_decay=0.9, freeze='^hidden1.*bias'), path)


def test_a_run_ends_at_its_sparsity_and_its_average_too(run):
    opened = runs.open_run(run.workdir)
    kernels = 64 * 16 + 16 * 10
    for tree in (run.state.params, opened.variables['params']):
        count, size = pruning.density(tree)
        assert size == kernels + 26 and count <= size - round(0.9 * kernels)
    assert pruning.density(run.state.ema)[0] > pruning.density(opened.variables['params'])[0]


def test_a_run_stopped_in_the_middle_of_the_ramp_ends_as_one_left_alone(run, tmp_path):
    same = config(ema_decay=0.9, freeze='^hidden1.*bias')
    paused = fit(same, tmp_path / 'run', until_epoch=1.0)
    share = 1 - pruning.density(paused.state.params)[0] / pruning.density(paused.state.params)[1]
    assert paused.stopped == 'paused' and 0.3 < share < 0.85
    fit(same, tmp_path / 'run')
    assert verify.differences(run.workdir, tmp_path / 'run') == []


def test_no_sparsity_is_the_plain_step():
    def traced(pruning_):
        resolved = experiment_lib.resolve(config(pruning=pruning_))
        experiment = experiment_lib.build(resolved, (8, 8, 1), 10, 640)
        state = jax.eval_shape(lambda: experiment_lib.init(experiment, 0))
        batch = experiment_lib.raw_batch(experiment)
        return str(jax.make_jaxpr(experiment.train_step)(state, batch))

    assert traced({'name': 'magnitude', 'sparsity': 0.0}) == traced({'name': 'none'})


def test_without_a_pruned_state_nothing_is_masked():
    tree = params()
    assert pruning.masked(optax.adam(0.1).init(tree), tree) is tree
    state = steps.init_state({'params': tree}, optax.sgd(0.1), jax.random.key(0), 0.0)
    assert steps.evaluation_variables(state)['params'] is state.params


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'sparsity': 1.0}, 'config.pruning.sparsity is 1.0; it must be at least 0 and below 1'),
        ({'begin': 0.9}, 'config.pruning.begin is 0.9; it must be in'),
        ({'every': 0}, 'config.pruning.every is 0'),
        ({'keep': '('}, r"config.pruning.keep is '\(', not a regular expression: missing"),
        ({'scope': 'layers'}, "Did you mean 'layer'"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(fields, message):
    with pytest.raises(UserError, match=message):
        experiment_lib.resolve(config(pruning={'name': 'magnitude', **fields}))


def test_nothing_left_to_prune_says_what_to_do():
    resolved = experiment_lib.resolve(config(pruning={'name': 'magnitude', 'keep': 'kernel'}))
    built = experiment_lib.build(resolved, (8, 8, 1), 10, 640)
    with pytest.raises(UserError, match='finds no kernel to prune'):
        jax.eval_shape(lambda: experiment_lib.init(built, 0))
