"""The learning-rate range test, on curves with a known answer and on the digits."""

import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fit, lr_find, pipeline
from jaxcls.errors import UserError

RATES = np.geomspace(1e-6, 10, 100)


def small(**fields):
    config = config_lib.get_config()
    config.update({'batch_size': 32, 'model': {'name': 'mlp', 'hidden': (16,)}, **fields})
    config.data.train = 'train[:200]'
    return config


def pretend(monkeypatch, losses):
    """A network whose loss at each step is given."""
    monkeypatch.setattr(lr_find, '_losses', lambda config, rates: iter(losses))
    return lr_find.lr_find(small())


def valley(rates):
    """Falls from 2.3 most steeply at 1e-3, and rises again, most steeply at 1."""
    position = np.log10(rates)
    return 2.3 - 2 / (1 + np.exp(-4 * (position + 3))) + 2 / (1 + np.exp(-4 * position))


def test_the_suggestion_is_the_lower_of_the_steepest_fall_and_a_tenth_of_the_minimum():
    chosen = lr_find.choose(RATES, valley(RATES))
    assert abs(np.log10(chosen['steepest']) + 3) < 0.08  # a step is 0.07
    assert abs(np.log10(chosen['minimum']) + 1.5) < 0.08
    assert chosen['suggestion'] == chosen['steepest']
    late = np.where(RATES < 1e-2, 2.3, 9.0 + np.log10(RATES))  # nothing falls before a cliff
    late = np.where((RATES > 1e-2) & (RATES < 1e-1), 2.3 - 2 * (np.log10(RATES) + 2), late)
    chosen = lr_find.choose(RATES, late)
    assert chosen['suggestion'] == chosen['minimum'] / 10 < chosen['steepest']


def test_a_single_lucky_step_is_not_the_steepest_fall():
    loss = valley(RATES) + 0.01 * np.random.default_rng(0).normal(size=100)
    loss[20] -= 0.3
    assert abs(np.log10(lr_find.choose(RATES, loss)['steepest']) + 3) < 0.3


def test_the_smoothed_loss_is_a_weighted_mean_of_the_losses_so_far(monkeypatch):
    raw = valley(RATES) + 1.0  # never four times its lowest
    result = pretend(monkeypatch, raw)
    for i in (0, 1, 50, 99):
        weights = 0.8 ** np.arange(i, -1, -1)
        assert result['loss'][i] == pytest.approx(np.average(raw[: i + 1], weights=weights))
    np.testing.assert_allclose(result['learning_rate'], RATES, rtol=1e-12)
    assert result['diverged_at'] is None and result['raw'] == list(raw)


def test_it_stops_where_the_loss_is_far_above_its_lowest_or_not_finite(monkeypatch):
    falling = [*np.linspace(2.0, 1.0, 50)]
    result = pretend(monkeypatch, [*falling, *[30.0] * 50])
    steps = len(result['raw'])
    assert 50 < steps < 55 and result['loss'][-1] > 4 * min(result['loss']) > result['loss'][-2]
    assert result['diverged_at'] == result['learning_rate'][-1]
    broken = pretend(monkeypatch, [*falling, None, 1.0])
    assert len(broken['raw']) == len(broken['learning_rate']) == 50
    assert broken['diverged_at'] == pytest.approx(RATES[50])


def test_a_loss_may_be_below_0(monkeypatch):
    shifted = pretend(monkeypatch, valley(RATES) - 1.0)
    assert shifted['diverged_at'] is None and min(shifted['loss']) < 0
    to_zero = pretend(monkeypatch, [*np.linspace(2.0, -0.01, 60), *[0.0, 0.05] * 20])
    assert to_zero['diverged_at'] is None
    diverged = pretend(monkeypatch, [*np.linspace(-1.0, -2.0, 60), *[9.0] * 40])
    assert len(diverged['raw']) < 65


def test_a_suggestion_that_was_not_tried_is_an_error():
    with pytest.raises(UserError, match='lowest at .* 3.1e-02, .* Start from a --low of at most'):
        lr_find.choose(np.geomspace(4e-3, 10, 100), valley(np.geomspace(4e-3, 10, 100)))


@pytest.mark.parametrize('losses', [[None], [1.0, 9.0], [*np.linspace(1, 2, 100)]])
def test_a_loss_that_never_falls_is_an_error(monkeypatch, losses):
    with pytest.raises(UserError, match='does not fall: after .* Start from a lower --low'):
        pretend(monkeypatch, losses)


@pytest.mark.parametrize(
    ('fields', 'problem'),
    [
        ({'low': 1.0, 'high': 0.5}, '--low is 1.0; it must be above 0 and below --high, 0.5'),
        ({'low': 0.0}, '--low is 0.0'),
        ({'high': float('inf')}, 'below --high, inf'),
        ({'steps': 39}, '--steps is 39; it must be at least 40'),
    ],
)
def test_ranges_that_are_none_are_errors(fields, problem):
    with pytest.raises(UserError, match=problem):
        lr_find.lr_find(small(), **fields)


def test_the_rates_are_geometric_and_warm_up_is_off():
    config = small(warmup_epochs=3.0, schedule={'name': 'cosine'}, clip_norm=1.0)
    rates = np.geomspace(1e-4, 10, 40)
    rising = lr_find._rising(experiment_lib.resolve(config), rates, 200)
    experiment = experiment_lib.build(rising, (8, 8, 1), 10, 200)
    assert experiment.total_steps == 40
    np.testing.assert_allclose(experiment.learning_rate(np.arange(40)), rates, rtol=1e-5)
    changed = config_lib.differences(experiment_lib.resolve(config), rising)
    assert {field.partition('.')[0] for field in changed} == {
        'learning_rate', 'schedule', 'warmup_epochs', 'epochs',
    }  # fmt: skip


def test_the_losses_are_those_of_a_hand_written_loop_until_they_diverge():
    """Softmax regression on the digits by gradient descent, in NumPy."""
    config = small(model={'name': 'linear'}, optimizer={'name': 'sgd', 'momentum': 0.0})
    result = lr_find.lr_find(config, low=1e-3, high=1e4, steps=60)
    rates = np.array(result['learning_rate'])
    np.testing.assert_allclose(rates[1:] / rates[:-1], 1e7 ** (1 / 59), rtol=1e-9)
    assert 1e-2 < result['suggestion'] < 1 < result['diverged_at']
    assert result['suggestion'] == min(result['steepest'], result['minimum'] / 10)
    assert len(rates) < 60 and all(map(np.isfinite, result['raw'] + result['loss']))
    split = experiment_lib.load_split(config, config.data.train)
    kernel, bias = np.zeros((64, 10)), np.zeros(10)
    for step, rate in enumerate(rates[rates < 1]):
        index = pipeline.training_order(0, 200, 32, step)['index']
        image = (split.source.images[index].reshape(32, -1) / 255 - 0.5) / 0.5
        exponentials = np.exp(image @ kernel + bias)
        probability = exponentials / exponentials.sum(1, keepdims=True)
        label = split.source.labels[index]
        loss = -np.log(probability[range(32), label]).mean()
        assert result['raw'][step] == pytest.approx(loss, rel=1e-3)
        error = (probability - np.eye(10)[label]) / 32
        kernel, bias = kernel - rate * image.T @ error, bias - rate * error.sum(0)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['sgd', 'adam', 'lion'])
def test_the_default_network_trains_at_the_suggested_rate(tmp_path, optimizer):
    config = config_lib.get_config()
    config.update({'optimizer': {'name': optimizer}, 'epochs': 5.0})
    config.learning_rate = lr_find.lr_find(config)['suggestion']
    assert fit(config, tmp_path).metrics['top1'] > 0.96, config.learning_rate


def test_a_step_that_overflows_has_no_loss():
    config = small(optimizer={'name': 'sgd'}, model={'name': 'linear'})
    config.loss = {'name': 'cross_entropy', 'balance': 'inverse'}  # wants the counts of classes
    losses = list(lr_find._losses(config, np.full(4, 3e38)))
    assert losses[0] > 1 and losses[-1] is None


def test_the_picture_and_the_text_name_the_suggestion(monkeypatch, tmp_path):
    result = pretend(monkeypatch, [*valley(RATES), None])
    result['diverged_at'] = 10.0
    figure = lr_find.plot(result)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    suggestion = f'{result["suggestion"]:.1e}'
    assert axes.get_xscale() == 'log' and f'steepest fall, {suggestion}: suggested' in labels
    assert 'diverged' in labels
    lines = lr_find.text(result).splitlines()
    assert 10 < len(lines) < 22 and suggestion in lines[-1] and '1.0e+01' in lines[-2]
    lr_find.write(result, tmp_path / 'lr_find.png')
    assert (tmp_path / 'lr_find.png').stat().st_size > 5_000
    with pytest.raises(UserError, match='cannot be written: .* Choose another --picture'):
        lr_find.write(result, tmp_path / 'lr_find.xyz')
