"""The speed run: its optimiser against the steps written out, and a run from end to end."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import scripts
from jaxcls import experiment
from jaxcls.models import airbench
from jaxcls.steps import init_state

PATH = Path(__file__).parent.parent / 'experiments' / 'speedrun_cifar.py'
STEPS, BATCH = 8, 10


@pytest.fixture(scope='module')
def speedrun():
    return scripts.load(PATH)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def tree(seed):
    """Leaves of every kind, as parameters or as gradients of the mean loss."""
    return {
        'stem': {'whitening': draw(2, 2, 1, 8, seed=seed), 'bias': draw(8, seed=seed)},
        'stage1': {
            'conv1': {'kernel': draw(3, 3, 8, 6, seed=seed)},
            'norm1': {'bias': draw(6, seed=seed)},
        },
        'head': {'kernel': draw(6, 3, seed=seed)},
    }


def leaf(node, path):
    return functools.reduce(dict.get, path, node)


def nesterov(p, gradients, rate, steps):
    """PyTorch's SGD on the loss summed over the batch, its rate falling to 0 in `steps`."""
    buffer = 0.0
    for i, gradient in enumerate(gradients):
        total = BATCH * gradient + 2e-6 * BATCH / rate * p
        buffer = 0.85 * buffer + total
        p = p - rate * max(0, 1 - i / steps) * (total + 0.85 * buffer)
    return p


def orthogonal(x):
    """Three steps of Newton and Schulz with Jordan's coefficients, on [inputs, outputs]."""
    x = x.T / np.linalg.norm(x)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T


def test_the_steps_of_muons_recipe_are_those_written_out(speedrun):
    tx = speedrun.with_muon(None, ConfigDict({'batch_size': BATCH}), STEPS)
    start, gradients = tree(0), [tree(i) for i in (1, 2, 3, 4)]
    params, state = jax.tree.map(jnp.asarray, start), tx.init(start)
    for i, gradient in enumerate(gradients):
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        if i == 0:
            kernel = start['stage1']['conv1']['kernel']
            update = orthogonal(gradient['stage1']['conv1']['kernel'].reshape(72, 6))
            expected = kernel * np.sqrt(6) / np.linalg.norm(kernel) - 0.24 * update.reshape(
                3, 3, 8, 6
            )
            np.testing.assert_allclose(params['stage1']['conv1']['kernel'], expected, atol=1e-5)
    parts = {
        ('stem', 'bias'): (0.053, 3),
        ('stage1', 'norm1', 'bias'): (0.053, STEPS),
        ('head', 'kernel'): (0.67, STEPS),
    }
    for path, (rate, steps) in parts.items():
        expected = nesterov(
            leaf(start, path), [leaf(gradient, path) for gradient in gradients], rate, steps
        )
        np.testing.assert_allclose(leaf(params, path), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(params['stem']['whitening'], start['stem']['whitening'])


def test_the_covariance_on_the_device_is_that_of_the_model(speedrun):
    images = np.random.default_rng(0).integers(0, 256, (50, 9, 9, 3), np.uint8)
    found = speedrun.covariance(images, 2, (0.5,) * 3, (0.25,) * 3)
    expected = airbench.patch_covariance((images / 255 - 0.5) / 0.25, 2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def experiments_of(speedrun, augment):
    """The network of airbench96_faster and its proxy, small, and a raw batch of eight."""
    config = speedrun.get_config('airbench96_faster', batch_size=8, epochs=2, augment=augment)
    config.precision, config.model.widths = 'float32', (4,)
    net = experiment.build(experiment.resolve(config), (8, 8, 3), 4, 80)
    selection = speedrun.Selection({'name': 'airbench94', 'widths': (2,)}, 1.0, every=2)
    built = [net, speedrun.make_proxy(net, selection)]
    rng = np.random.default_rng(0)
    rows = {name: np.arange(8, dtype=np.int32) for name in ('index', 'epoch')}
    label = rng.integers(0, 4, 8, np.int32)
    image = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    batch = {**rows, 'label': label, 'image': image, 'mask': label >= 0}
    states = jax.jit(lambda: [experiment.init(part, 0) for part in built])()
    return built, states, jax.tree.map(jnp.asarray, batch)


def assert_close(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_the_examples_of_the_proxys_highest_losses_are_trained_on(speedrun):
    (net, proxy), states, batch = experiments_of(speedrun, augment=[])
    batch['mask'] = batch['mask'].at[0].set(False)  # of an image that could not be decoded
    step = speedrun.make_selective_step(net, proxy, speedrun.Selection({}, share=3 / 8, every=2))
    (state, small), sums = jax.jit(step)(states, batch)
    mean, std = map(np.float32, (net.config.data.mean, net.config.data.std))
    image = (batch['image'] / 255 - mean) / std
    variables = {'params': states[1].params, 'batch_stats': states[1].batch_stats}
    (logits, _), _ = proxy.model.apply(variables, image, train=True, mutable=['batch_stats'])
    values = proxy.loss(logits, jax.nn.one_hot(batch['label'], 4))
    chosen = 1 + np.argsort(values[1:])[-3:]
    plain, _ = jax.jit(net.train_step)(states[0], {k: x[chosen] for k, x in batch.items()})
    assert_close(state.params, plain.params)
    masked = {**batch, 'mask': np.isin(np.arange(8), chosen)}
    learnt, _ = jax.jit(proxy.train_step)(states[1], masked)
    assert_close(small.params, learnt.params)
    assert sums['examples'] == 3


def test_a_whole_batch_is_trained_on_as_without_a_proxy_which_learns_every_other_step(speedrun):
    flip = [{'name': 'flip'}, {'name': 'pad_crop', 'padding': 2}]
    (net, proxy), states, batch = experiments_of(speedrun, flip)
    step = speedrun.make_selective_step(net, proxy, speedrun.Selection({}, share=1.0, every=2))
    assert (net.total_steps, proxy.total_steps) == (20, 10)
    plain, found = states[0], [states]
    step, plain_step = jax.jit(step), jax.jit(net.train_step)
    for _ in range(2):
        plain, _ = plain_step(plain, batch)
        found.append(step(found[-1], batch)[0])
    assert_close(found[-1][0].params, plain.params)
    before, after, last = (jax.tree.leaves(small.params) for _, small in found)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    assert all((a == b).all() for a, b in zip(after, last, strict=True))


def test_the_recipe_with_a_proxy_has_the_numbers_of_its_script(speedrun):
    config = speedrun.get_config('airbench96_faster')
    steps = round(config.epochs * 50_000 / 1024)
    assert steps == 2160 and round(config.warmup_epochs * 50_000 / 1024) == 216
    # Of the sum over a batch, as there: the rate, and what it takes off a weight each step.
    rate = 9 / (1024 * (1 + 1 / (1 - 0.85)))
    np.testing.assert_allclose(config.learning_rate, 512 * rate)
    decay = 0.012 * 1024 / (1024 * (1 + 1 / (1 - 0.85)))
    np.testing.assert_allclose(config.learning_rate * config.l2, decay)


def test_the_share_of_the_warm_up_stays_with_other_epochs(speedrun):
    shares = {
        name: [
            c.warmup_epochs / c.epochs
            for c in (speedrun.get_config(name, **more) for more in ({}, {'epochs': 3.0}))
        ]
        for name in ('airbench96', 'airbench96_faster')
    }
    assert shares['airbench96'] == pytest.approx([2.3 / 9.9] * 2)
    assert shares['airbench96_faster'] == pytest.approx([0.1] * 2)


def test_the_proxys_stem_stays_and_its_biases_are_fast(speedrun):
    (_, proxy), (_, state), batch = experiments_of(speedrun, augment=[])
    params = {**state.params, 'stem': jax.tree.map(lambda x: x + 1, state.params['stem'])}
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = proxy.tx.update(gradients, state.opt_state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates['stem']))
    bias, kernel = (
        updates['stage1'][name][leaf] for name, leaf in (('norm1', 'bias'), ('conv1', 'kernel'))
    )
    np.testing.assert_allclose(bias, 64 * kernel[0, 0, 0], rtol=1e-5)
    learnt, _ = jax.jit(proxy.train_step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, learnt.params['stem'], state.params['stem'])


def test_biases_learn_and_decay_as_by_the_scripts_groups(speedrun):
    torch = pytest.importorskip('torch', exc_type=ImportError)
    count, rate, momentum = 8, 0.01, 0.85
    config = ConfigDict({'l2': 0.3, 'warmup_epochs': 0.0, 'epochs': 1.0})
    rng = np.random.default_rng(0)
    start = {'stem': {'bias': rng.normal(size=5)}, 'norm1': {'bias': rng.normal(size=5)}}
    params = jax.tree.map(jnp.asarray, start)
    tx = speedrun.as_published(optax.sgd(rate, momentum, nesterov=True), config, 3)
    stem, norm = theirs = [torch.nn.Parameter(torch.tensor(x)) for x in leaves_of(start)]
    # Theirs is the sum over a batch, whose rate and decay are divided by each other.
    lr, wd = rate / count, rate * config.l2
    groups = [
        {'params': [norm], 'lr': 64 * lr, 'weight_decay': wd / (64 * lr)},
        {'params': [stem], 'lr': lr, 'weight_decay': wd / lr},
    ]
    sgd, state = torch.optim.SGD(groups, momentum=momentum, nesterov=True), tx.init(params)
    for _ in range(3):
        gradient = jax.tree.map(lambda x: rng.normal(size=x.shape), start)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for bias, mean in zip(theirs, leaves_of(gradient), strict=True):
            bias.grad = torch.tensor(count * mean)
        sgd.step()
    for found, expected in zip(leaves_of(params), theirs, strict=True):
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_rates_are_those_of_the_script(speedrun):
    config = speedrun.get_config('airbench96_faster', epochs=2.0)
    config.warmup_epochs = 0.2
    built = experiment.build(experiment.resolve(config), (8, 8, 3), 4, 100 * 1024)
    total, warmup = built.total_steps, built.total_steps // 10
    tx = speedrun.as_published(optax.sgd(built.learning_rate), built.config, total)
    params = {'kernel': jnp.ones((2, 2))}
    state, found = tx.init(params), []
    for _ in range(total):
        updates, state = jax.jit(tx.update)(params, state, params)
        found.append(-updates['kernel'][0, 0] / config.learning_rate)
    rising = [0.2 + 0.8 * step / warmup for step in range(warmup)]
    falling = [(total - step) / (total - warmup) for step in range(warmup, total)]
    np.testing.assert_allclose(found, [*rising, *falling], rtol=1e-5)


def test_the_network_goes_to_its_average_as_in_the_script(speedrun):
    total, rng = 12, np.random.default_rng(0)
    moves = rng.normal(size=(total, 2))

    def train_step(states, batch):
        [state] = states
        params, stats = state.params + batch[0], 0.9 * state.batch_stats + batch[1]
        return [state.replace(step=state.step + 1, params=params, batch_stats=stats)], {}

    start = init_state(
        {'params': jnp.float32(1.0), 'batch_stats': jnp.float32(2.0)},
        optax.identity(), jax.random.key(0), ema_decay=0.0,
    )  # fmt: skip
    states = [start, speedrun.learnt(start)]
    step = jax.jit(speedrun.with_lookahead(train_step, total))
    net, average = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    for i, move in enumerate(moves, 1):
        states, _ = step(states, jnp.asarray(move, jnp.float32))
        net = net * (1, 0.9) + move
        if i % 5 == 0:
            decay = 0.95**5 * (i / total) ** 3
            net = average = decay * average + (1 - decay) * net
        if i == total:
            net = average
        np.testing.assert_allclose(speedrun.learnt(states[0]), net, rtol=1e-5)


def leaves_of(params):
    return params['stem']['bias'], params['norm1']['bias']


def test_a_batch_of_which_nothing_would_be_chosen_is_refused(speedrun, monkeypatch, capsys):
    command = ['speedrun_cifar.py', '--recipe=airbench96_faster', '--batch-size=1']
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(SystemExit):
        speedrun.main()
    assert 'batch_size is 1; it must be at least 2' in capsys.readouterr().err


@pytest.mark.parametrize(
    'name',
    [
        'airbench94_muon',
        'airbench96_faster',
        pytest.param('airbench94', marks=pytest.mark.slow),
    ],
)
def test_a_run_depends_on_its_seed_alone(speedrun, name, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f'{kind}_{split}': rng.integers(0, high, (40, *shape), np.uint8)
        for split in ('train', 'test')
        for kind, high, shape in (('x', 256, (24, 24, 3)), ('y', 4, ()))
    }
    np.savez(tmp_path / 'data.npz', **arrays)
    config = speedrun.get_config(name, batch_size=8, epochs=0.6)
    config.model.widths = (4, 4)
    config.data.name = f'npz:{tmp_path / "data.npz"}'
    recipe = speedrun.RECIPES[name]
    if recipe.selection:
        selection = speedrun.Selection(
            {**recipe.selection.model, 'widths': (2, 2)}, share=0.5, every=2
        )
        recipe = recipe._replace(selection=selection)
    run = speedrun.make_run(config, recipe, 'none')
    found = [run(seed)['top1'] for seed in (1, 2, 1)]
    assert found[0] == found[2] and 0 <= min(found) <= max(found) <= 1
