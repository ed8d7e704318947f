import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from jaxcls import intervals
from jaxcls.errors import UserError
from jaxcls.predictions import Predictions


@pytest.mark.parametrize(('successes', 'n'), [(0, 10), (10, 10), (7, 10), (9601, 10000), (0, 1)])
@pytest.mark.parametrize('confidence', [0.68, 0.95])
def test_wilson_interval_equal_to_scipy(successes, n, confidence):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method='wilson')
    interval = intervals.wilson_interval(successes, n, confidence)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert interval[0] <= successes / n <= interval[1]


def test_mean_interval_equal_to_scipy():
    values = [0.91, 0.93, 0.92, 0.95]
    mean, half = intervals.mean_interval(values, 0.9)
    expected = scipy.stats.t.interval(0.9, 3, np.mean(values), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected)


def test_equal_values_have_an_interval_of_no_width():
    assert intervals.mean_interval([6.016] * 3)[1] == 0  # their deviation is rounded to 1e-15


def test_intervals_of_next_to_nothing():
    assert intervals.wilson_interval(0, 0) == (0.0, 1.0)
    assert intervals.mean_interval([0.5]) == (0.5, math.inf)
    for n in range(1, 400):  # rounding goes either way
        assert intervals.wilson_interval(0, n)[0] == 0 and intervals.wilson_interval(n, n)[1] == 1


def macro_f1(label, predicted):
    return sklearn.metrics.f1_score(label, predicted, average='macro', zero_division=0)


@pytest.mark.parametrize('method', ['percentile', 'BCa'])
def test_the_bootstrap_interval_of_a_mean_is_near_the_t_interval(method):
    values = np.random.default_rng(0).normal(3, 2, 300)
    mean, half = intervals.mean_interval(values, 0.9)
    low, high = intervals.bootstrap_interval(values, np.mean, 0.9, 2000, method)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_the_bootstrap_interval_equals_scipy():
    values = np.random.default_rng(1).exponential(size=50)
    found = intervals.bootstrap_interval(values, np.std, 0.8, 200, 'BCa', seed=3)
    expected = scipy.stats.bootstrap(
        (values,),
        np.std,
        confidence_level=0.8,
        n_resamples=200,
        random_state=np.random.default_rng(3),
    )
    assert found == pytest.approx(expected.confidence_interval)


def test_the_bootstrap_draws_examples_whole():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 200)
    predicted = np.where(rng.random(200) < 0.8, label, 0)
    low, high = intervals.bootstrap_interval((label, predicted), macro_f1, resamples=50)
    assert 0.6 < low < macro_f1(label, predicted) < high < 0.95
    assert (low, high) == intervals.bootstrap_interval((label, predicted), macro_f1, resamples=50)
    assert (low, high) != intervals.bootstrap_interval(
        (label, predicted), macro_f1, resamples=50, seed=1
    )
    split = Predictions(np.eye(3, dtype=np.float32)[predicted], label)
    assert (low, high) == intervals.bootstrap_interval(
        split, lambda logits, label: macro_f1(label, logits.argmax(-1)), resamples=50
    )


@pytest.mark.parametrize('method', ['percentile', 'BCa'])
def test_the_bootstrap_of_degenerate_examples(method):
    def interval(values, statistic):
        return intervals.bootstrap_interval(np.array(values), statistic, 0.9, 50, method)

    assert interval([0.5], np.mean) == (-math.inf, math.inf)
    assert interval([2.0, 2.0, 2.0], np.mean) == (2, 2)
    assert all(map(math.isnan, interval([1.0, 2.0], lambda x: math.nan)))


TABLES = [(0, 0), (1, 0), (0, 7), (4, 4), (5, 15), (30, 90), (1000, 1100)]


def mcnemar(only_a, only_b):
    a = np.repeat([True, True, False, False], [50, only_a, only_b, 9])
    b = np.repeat([True, False, True, False], [50, only_a, only_b, 9])
    return intervals.mcnemar(a, b)


@pytest.mark.parametrize(('only_a', 'only_b'), TABLES)
def test_mcnemar_equal_to_scipy(only_a, only_b):
    found, tested = mcnemar(only_a, only_b), only_a + only_b
    assert (found['only_a'], found['only_b']) == (only_a, only_b)
    expected = scipy.stats.binomtest(only_a, tested).pvalue if tested else 1
    assert found['p_value'] == pytest.approx(expected, rel=1e-9)
    assert found['p_value'] == mcnemar(only_b, only_a)['p_value']


@pytest.mark.slow  # to import
@pytest.mark.parametrize(('only_a', 'only_b'), TABLES)
def test_mcnemar_equal_to_statsmodels(only_a, only_b):
    statsmodels = pytest.importorskip('statsmodels.stats.contingency_tables')
    expected = statsmodels.mcnemar([[50, only_a], [only_b, 9]], exact=True)
    assert mcnemar(only_a, only_b)['p_value'] == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize('n', [2, 5, 30])
def test_paired_interval_equal_to_scipy(n):
    rng = np.random.default_rng(n)
    a = rng.normal(0.9, 0.01, n)
    b = a - rng.normal(0.005, 0.01, n)
    mean, half, p = intervals.paired_interval(a, b, 0.9)
    expected = scipy.stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.9)
    assert (mean - half, mean + half) == pytest.approx(tuple(interval), rel=1e-9)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)


def test_paired_intervals_of_degenerate_values():
    assert intervals.paired_interval([0.75], [0.5]) == (0.25, math.inf, 1)
    assert intervals.paired_interval([0.5, 0.7], [0.5, 0.7]) == (0, 0, 1)
    assert intervals.paired_interval([0.5, 0.75], [0.25, 0.5]) == (0.25, 0, 0)
    for resolution in (0.0, 0.1):
        found = intervals.paired_interval([0.5, math.nan], [0.25, 0.5], resolution=resolution)
        assert all(map(math.isnan, found))


def test_paired_differences_spread_at_least_by_the_resolution():
    a, b, step = np.array([0.90, 0.91, 0.92]), np.array([0.89, 0.90, 0.91]), 0.01
    mean, half, p = intervals.paired_interval(a, b, resolution=step)
    assert mean == pytest.approx(0.01)
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * step / math.sqrt(3))
    assert p == pytest.approx(2 * scipy.stats.t.sf(math.sqrt(3), 2))
    assert intervals.paired_interval(b, b, resolution=step)[2] == 1
    wide = [0.90, 0.95, 0.93]
    assert intervals.paired_interval(wide, b, resolution=step) == intervals.paired_interval(wide, b)


@pytest.mark.parametrize(
    'mistake',
    [
        lambda: intervals.wilson_interval(11, 10),
        lambda: intervals.wilson_interval(-1, 10),
        lambda: intervals.wilson_interval(1, 10, confidence=95),
        lambda: intervals.mean_interval([]),
        lambda: intervals.mean_interval([1.0], confidence=1.0),
        lambda: intervals.bootstrap_interval(np.zeros(0), np.mean),
        lambda: intervals.bootstrap_interval((np.zeros(3), np.zeros(2)), np.mean),
        lambda: intervals.bootstrap_interval(np.zeros(3), np.mean, method='bca'),
        lambda: intervals.bootstrap_interval(np.zeros(3), np.mean, confidence=0),
        lambda: intervals.bootstrap_interval(np.zeros(3), np.mean, resamples=1),
        lambda: intervals.bootstrap_interval(np.zeros(3), np.mean, seed=-1),
        lambda: intervals.bootstrap_interval([np.zeros(3), np.zeros(3)], np.mean),
        lambda: intervals.mcnemar(np.ones(3, bool), np.ones(2, bool)),
        lambda: intervals.mcnemar(np.ones(3), np.ones(3)),
        lambda: intervals.paired_interval([0.5, 0.6], [0.5]),
        lambda: intervals.paired_interval([], []),
        lambda: intervals.paired_interval([0.5, 0.6], [0.5, 0.4], confidence=95),
        lambda: intervals.paired_interval([0.5, 0.6], [0.5, 0.4], resolution=-0.1),
    ],
)
def test_mistakes_are_user_errors(mistake):
    with pytest.raises(UserError):
        mistake()
