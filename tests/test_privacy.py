"""DP-SGD: each example's share of a step, the noise, the batches and what is spent."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_privacy import accounting
from scipy import stats
from scipy.special import comb, logsumexp

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fit, optimizers, pipeline, privacy, runs, seeds, steps, workdir
from jaxcls.errors import UserError
from jaxcls.sweep import fit_seeds

NEUTRAL = {'name': 'dp_sgd', 'clip_norm': 0.0, 'epsilon': 0.0}


def small(**fields):
    config = config_lib.get_config()
    config.update({
        'epochs': 2.0,
        'batch_size': 32,
        'log_every_steps': 5,
        'learning_rate': 0.2,
        'data': {'train': 'train[:400]', 'validation': 'test[:50]'},
    })  # fmt: skip
    config.model = {'name': 'linear'}
    config.optimizer = {'name': 'sgd', 'momentum': 0.9}
    for section in ('model', 'optimizer', 'privacy', 'loss', 'teacher'):
        config[section] = fields.pop(section, config[section])
    config.update(fields)
    return config


def build(config):
    return experiment_lib.build(experiment_lib.resolve(config), (8, 8, 1), 10, 400)


def plan(**fields):
    return privacy.dp_sgd(**fields)


# The gradient


def model_and_batch(rows=12):
    """A small network's objective, its parameters and a batch, two rows of it padding."""
    built = build(small(model={'name': 'mlp', 'hidden': (8,), 'norm': 'none'}))
    params = experiment_lib.init(built, 0).params
    params = jax.tree.map(lambda p: p + 0.1, params)  # zero heads would have no gradient below
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, rows).astype(np.int32)
    batch = {
        'image': jnp.asarray(rng.normal(size=(rows, 8, 8, 1)), jnp.float32),
        'label': jnp.asarray(label),
        'target': jax.nn.one_hot(label, 10),
        'mask': jnp.arange(rows) < rows - 2,
    }
    return steps.make_objective(built.model, built.loss), params, batch


@pytest.fixture(scope='module')
def network():
    return model_and_batch()


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def settings(**fields):
    values = {'clip_norm': 0.5, 'noise_multiplier': 0.0, 'delta': 1e-5, 'examples': 400}
    values |= {'batch_size': 16, 'rows': 12, 'total_steps': 10, 'microbatch': 0, **fields}
    return privacy.Plan(**values)


def private(network, seed=0, l2=0.0, **fields):
    objective, params, batch = network
    gradients = privacy.make_gradients(settings(**fields), 0.0, l2)
    step = jax.jit(lambda params, batch, key: gradients(objective, params, {}, batch, key))
    return step(params, batch, jax.random.key(seed))


def by_hand(network, clip_norm, batch_size):
    """The sum of clipped gradients over the batch size, in a loop over the examples."""
    objective, params, batch = network
    one = jax.jit(jax.grad(lambda p, row: objective(p, {}, row, jax.random.key(0))[0]))
    total = 0.0
    for i in np.flatnonzero(batch['mask']):
        gradient = np.float64(flat(one(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))))
        total = total + gradient * min(1, clip_norm / np.linalg.norm(gradient))
    return total / batch_size


@pytest.mark.parametrize('microbatch', [0, 4])
def test_each_example_is_clipped_alone_and_padding_adds_nothing(network, microbatch):
    (_, aux), grads = private(network, microbatch=microbatch)
    expected = by_hand(network, 0.5, 16)
    np.testing.assert_allclose(flat(grads), expected, atol=1e-6)
    assert not np.allclose(expected, by_hand(network, math.inf, 16), atol=1e-3)
    assert int(aux['sums']['examples']) == 10
    objective, params, batch = network
    _, plain = objective(params, {}, batch, jax.random.key(0))
    for name, value in plain['sums'].items():
        np.testing.assert_allclose(aux['sums'][name], value, rtol=1e-5)
        assert aux['sums'][name].dtype == value.dtype


def test_without_clip_and_noise_it_is_the_gradient_of_the_mean(network):
    objective, params, batch = network
    (loss, _), grads = private(network, l2=0.1, clip_norm=math.inf, batch_size=10)

    def mean(p):
        value, _ = objective(p, {}, batch, jax.random.key(0))
        return value + optimizers.penalty(p, 0.0, 0.1), value

    (_, value), expected = jax.value_and_grad(mean, has_aux=True)(params)
    np.testing.assert_allclose(flat(grads), flat(expected), atol=1e-6)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)


def test_no_example_moves_a_step_by_more_than_the_clip_norm(network):
    objective, params, batch = network
    image = batch['image'].at[0].set(1e4).at[1].set(jnp.nan)  # a NaN counts as nothing
    others = {**batch, 'mask': batch['mask'].at[0].set(False).at[1].set(False)}
    with_them = flat(private((objective, params, {**batch, 'image': image}))[1])
    without = flat(private((objective, params, others))[1])
    assert np.isfinite(with_them).all()
    assert np.linalg.norm(with_them - without) <= 0.5 / 16 * (1 + 1e-5)


def test_noise_has_its_standard_deviation_and_depends_on_the_key_alone(network):
    still = flat(private(network)[1])
    found = [private(network, seed, noise_multiplier=3.0) for seed in (0, 0, 1)]
    noise, again, other = (flat(grads) - still for _, grads in found)
    np.testing.assert_array_equal(noise, again)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.2
    scaled = np.concatenate([noise, other]) / (3.0 * 0.5 / 16)
    assert stats.kstest(scaled, 'norm').pvalue > 1e-3
    assert scaled.std() == pytest.approx(1, abs=5 / math.sqrt(2 * len(scaled)))
    # What is not private reaches nothing but the log.
    assert float(found[0][0][0]) == 0


# The batches


def test_each_example_joins_each_batch_independently():
    examples, steps_, chance = 200, 600, 0.16
    joined = np.zeros((steps_, examples), bool)
    for step in range(steps_):
        batch = privacy.poisson_order(7, examples, 32, 104, step)
        index = batch['index'][batch['mask']]
        assert len(set(index.tolist())) == len(index) and len(batch['index']) == 104
        joined[step, index] = True
    # Sizes are binomial, all examples are as likely, and neither pairs nor neighbours in time go together.
    size = joined.sum(1)
    assert size.mean() == pytest.approx(32, abs=5 * math.sqrt(200 * chance * 0.84 / steps_))
    assert size.var() == pytest.approx(200 * chance * 0.84, rel=5 * math.sqrt(2 / steps_))
    rate = stats.chisquare(joined.sum(0)).statistic / 0.84
    assert stats.chi2.sf(rate, examples - 1) > 1e-4
    pairs = np.corrcoef(joined.T)[np.triu_indices(examples, 1)]
    assert abs(pairs.mean()) < 5 / math.sqrt(steps_ * len(pairs))
    assert pairs.std() == pytest.approx(1 / math.sqrt(steps_), rel=0.05)
    later = np.mean(joined[1:] & joined[:-1])
    assert later == pytest.approx(chance**2, abs=5 * math.sqrt(chance**2 / joined.size))


def test_a_batch_is_a_function_of_seed_and_step_and_never_larger_than_its_rows():
    first = privacy.poisson_order(1, 100, 50, 64, 3)
    privacy.poisson_order.cache_clear()
    again = privacy.poisson_order(1, 100, 50, 64, 3)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    others = [privacy.poisson_order(*at) for at in ((2, 100, 50, 64, 3), (1, 100, 50, 64, 4))]
    assert all(not np.array_equal(first['index'], other['index']) for other in others)
    assert privacy.poisson_order(1, 100, 50, 40, 3)['mask'].sum() == 40


# The accountant


def closed_form(noise, q, steps_, order):
    """Renyi divergence of a whole order, from the binomial expansion (Mironov 2019, section 3.3)."""
    k = np.arange(order + 1)
    terms = np.log(comb(order, k)) + k * math.log(q) + (order - k) * math.log1p(-q)
    return steps_ * logsumexp(terms + k * (k - 1) / (2 * noise**2)) / (order - 1)


@pytest.mark.parametrize(
    ('noise', 'batch_size', 'epochs', 'published'),
    # Of TensorFlow Privacy's tutorial on MNIST, and of Bu et al. 2020, https://arxiv.org/abs/1911.11607.
    [(1.3, 256, 15, 1.19), (1.1, 256, 60, 3.01), (0.7, 256, 45, 7.10), (1.3, 256, 20, 1.34)],
)
def test_what_is_spent_is_a_little_less_than_published(noise, batch_size, epochs, published):
    steps_ = round(epochs * 60_000 / batch_size)
    orders = np.arange(2, 64)
    divergence = [closed_form(noise, batch_size / 60_000, steps_, order) for order in orders]
    moments = min(divergence + math.log(1e5) / (orders - 1))
    assert moments == pytest.approx(published, abs=0.03)
    found = settings(noise_multiplier=noise, examples=60_000, batch_size=batch_size, rows=512)
    assert 0.6 * published < found.epsilon(steps_) < published


def test_what_is_spent_is_that_of_dp_accounting():
    found = settings(noise_multiplier=1.3, examples=60_000, batch_size=250, rows=512)
    event = dp_accounting.PoissonSampledDpEvent(250 / 60_000, dp_accounting.GaussianDpEvent(1.3))
    exact = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    exact.compose(event, 3600)
    assert found.epsilon(3600) == pytest.approx(exact.get_epsilon(1e-5), rel=1e-3)
    assert found.epsilon(0) == 0
    rows = plan(noise_multiplier=1.3, epsilon=0.0)(60_000, 250, 3600).rows
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(60_000, 250 / 60_000, rows, 1.3)
    cut = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    cut.compose(event, 3600)
    assert 250 < rows < 400
    # The bound on what cutting a batch costs is no less than what it costs.
    assert found._replace(rows=rows).epsilon(3600) >= cut.get_epsilon(1e-5)
    assert found._replace(rows=280).epsilon(3600) == math.inf


def test_the_noise_is_calibrated_to_the_budget_and_the_budget_ends_the_run():
    spent = {}
    for epsilon in (1.0, 3.0):
        found = plan(epsilon=epsilon)(400, 32, 25)
        spent[epsilon] = found.noise_multiplier
        assert epsilon * 0.99 < found.epsilon(25) <= epsilon and found.total_steps == 25
        params = accounting.DpParams(
            noise_multipliers=found.noise_multiplier, num_samples=400, batch_size=32, delta=1e-5
        )
        coarse = accounting.DpsgdTrainingAccountant(accounting.RdpAccountantConfig())
        assert found.epsilon(25) < coarse.compute_epsilon(25, params)
    assert spent[1.0] > spent[3.0]
    found = plan(noise_multiplier=1.0, epsilon=3.0)(400, 32, 1000)
    assert found.epsilon(found.total_steps) <= 3.0 < found.epsilon(found.total_steps + 1)
    assert plan(noise_multiplier=1.0, epsilon=0.0)(400, 32, 1000).total_steps == 1000
    assert plan(noise_multiplier=1.0, epsilon=3.0)(400, 32, 10).total_steps == 10
    assert plan(epsilon=0.0)(400, 32, 10).epsilon(1) == math.inf


# Runs


def log(path):
    timed = ('seconds', 'images_per_second')
    return [{k: v for k, v in r.items() if k not in timed} for r in workdir.read_metrics(path)]


def test_no_noise_and_no_clip_is_plain_training(tmp_path):
    plain = fit(small(l2=1e-3), tmp_path / 'plain')
    neutral = fit(small(l2=1e-3, privacy=NEUTRAL), tmp_path / 'neutral')
    np.testing.assert_allclose(flat(neutral.state.params), flat(plain.state.params), atol=2e-6)
    found, expected = ([r['loss'] for r in run.records] for run in (neutral, plain))
    assert found[0] == pytest.approx(expected[0], rel=0.1)  # the log has no penalty in either
    assert neutral.metrics['epsilon'] is None and 'epsilon' not in plain.metrics


class Stop(Exception):
    pass


def test_a_run_spends_its_budget_and_resumes_to_the_same_bits(tmp_path):
    config = small(
        privacy={'name': 'dp_sgd', 'noise_multiplier': 1.0, 'epsilon': 3.0},
        epochs=3.0,
        validate_every_epochs=0.5,
    )
    whole = fit(config, tmp_path / 'whole')
    spent = [r['epsilon'] for r in whole.records if r['kind'] == 'validation']
    assert spent == sorted(spent) and 2.8 < spent[-1] <= 3.0
    assert int(whole.state.step) == build(config).total_steps < 38
    assert workdir.read_json(tmp_path / 'whole' / 'result.json')['epsilon'] == spent[-1]
    examples = sum(r['examples'] for r in whole.records if r['kind'] == 'train')
    assert examples != whole.state.step * 32  # batches differ in size

    def stop(event):
        if event['kind'] == 'checkpoint' and event['step'] == 13:
            raise Stop

    stream = small(**{})
    stream.update(config)
    stream.data.pipeline = 'stream'
    stream.checkpoint_every_epochs = 0.5
    with pytest.raises(Stop):
        fit(stream, tmp_path / 'resumed', stop)
    resumed = fit(stream, tmp_path / 'resumed')
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(whole.state.params),
        jax.device_get(resumed.state.params),
    )
    assert log(tmp_path / 'whole') == log(tmp_path / 'resumed')


def test_seeds_in_one_program_have_their_own_batches_and_noise():
    built = build(small(privacy={'name': 'dp_sgd'}))
    found = seeds.orders([built.order(0), built.order(5)], 3)
    assert found['index'].shape == (2, built.rows) and built.rows > 32
    np.testing.assert_array_equal(found['index'][1], built.order(5)(3)['index'])
    plain = build(small())
    expected = pipeline.training_order(4, 400, 32, 7)
    jax.tree.map(np.testing.assert_array_equal, plain.order(4)(7), expected)


def test_seeds_that_share_a_program_are_the_runs_that_they_are_alone(tmp_path):
    config = small(epochs=0.5, privacy={'name': 'dp_sgd'}, seeds=2, seeds_per_program=2)
    fit_seeds(config, tmp_path / 'both')
    alone = fit(small(epochs=0.5, privacy={'name': 'dp_sgd'}, seed=1), tmp_path / 'alone')
    both = runs.open_run(tmp_path / 'both' / 'seed-1')
    np.testing.assert_allclose(
        flat(both.variables['params']), flat(alone.state.params), rtol=1e-4, atol=1e-5
    )
    assert workdir.read_metrics(tmp_path / 'both' / 'seed-1')[-1]['epsilon'] == pytest.approx(
        alone.metrics['epsilon']
    )


# What is refused


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'clip_norm': -1.0}, 'privacy.clip_norm is -1.0; it must be at least 0'),
        ({'noise_multiplier': math.nan}, 'privacy.noise_multiplier is nan'),
        ({'epsilon': -1.0}, 'privacy.epsilon is -1.0'),
        ({'delta': 0.0}, 'privacy.delta is 0.0'),
        ({'microbatch': -1}, 'privacy.microbatch'),
        ({'clip_norm': 0.0}, 'does not clip, and noise hides only what is bounded'),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(UserError, match=message):
        experiment_lib.resolve(small(privacy={'name': 'dp_sgd', **fields}))


def test_without_noise_a_batch_is_of_whole_microbatches():
    plan = privacy.make_privacy(name='dp_sgd', epsilon=0.0, microbatch=48)
    assert plan(1000, 96, 10).rows == 96
    with pytest.raises(
        UserError, match='microbatch is 48; it must be a divisor of config.batch_size=64'
    ):
        plan(1000, 64, 10)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'augment': [{'name': 'mixup'}]}, 'augment.*mixes examples'),
        ({'accumulate_steps': 2}, 'accumulate_steps: privacy.microbatch saves memory'),
        ({'sam_rho': 0.1}, 'sam_rho'),
        ({'clip_norm': 1.0}, 'config.clip_norm: privacy.clip_norm clips each example'),
        ({'loss': {'name': 'cross_entropy', 'balance': 'inverse'}}, 'counts the labels'),
        ({'optimizer': {'name': 'momo'}}, 'momo reads the loss'),
        ({'model': {'name': 'dbn'}}, 'starts from the training examples'),
        ({'model': {'name': 'knn'}}, 'no network'),
        ({'teacher': {'name': 'logits', 'workdir': 'x'}}, 'what the teacher saw'),
    ],
)
def test_what_the_accountant_does_not_know_of_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        experiment_lib.resolve(small(privacy={'name': 'dp_sgd'}, **fields))


def test_batch_statistics_are_refused_and_another_norm_named():
    model = {'name': 'mlp', 'hidden': (8,), 'norm': 'batch'}
    with pytest.raises(UserError, match='mlp and its batch norm.*config.model.norm=group'):
        build(small(privacy={'name': 'dp_sgd'}, model=model))
    for norm in ('group', 'frozen_batch'):
        build(small(privacy={'name': 'dp_sgd'}, model={**model, 'norm': norm}))


def test_a_budget_that_one_step_exceeds_and_a_useless_delta():
    with pytest.raises(UserError, match='less than one step spends'):
        plan(noise_multiplier=0.3, epsilon=0.1)(400, 32, 25)
    with pytest.raises(UserError, match='delta less than one of them, 2.5e-03'):
        plan(delta=0.01)(400, 32, 25)
    with pytest.raises(UserError, match='at most all of them'):
        plan()(16, 32, 25)


def test_the_libraries_are_an_extra(monkeypatch):
    monkeypatch.setattr(privacy.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxcls\[privacy\]'"):
        plan()(400, 32, 25)


def test_padded_batches_must_divide_over_the_devices():
    built = build(small(privacy={'name': 'dp_sgd'}))

    class Mesh:
        size = 7

    with pytest.raises(UserError, match='do not divide over 7 devices'):
        experiment_lib.check_rows(built, Mesh)
    experiment_lib.check_rows(build(small()), Mesh)
