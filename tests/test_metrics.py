import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from jaxcls import metrics
from jaxcls.errors import UserError

K = 7


@jax.jit
def sums_of(logits, label, loss, mask):
    sums = metrics.batch_sums(logits, label, loss, mask)
    return {**sums, 'confusion': metrics.confusion(logits, label, mask)}


def split(n=60, classes=K, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n).astype(np.int32)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), label] += 1
    return logits, label, rng.random(n).astype(np.float32), np.ones(n, bool)


def padded(arrays, n):
    logits, label, loss, mask = arrays
    rows = n - len(label)
    return (
        np.concatenate([logits, np.full((rows, logits.shape[1]), np.nan, np.float32)]),
        np.concatenate([label, np.full(rows, -1, np.int32)]),
        np.concatenate([loss, np.full(rows, np.nan, np.float32)]),
        np.concatenate([mask, np.zeros(rows, bool)]),
    )


def by_sklearn(label, predicted):
    options = {'average': 'macro', 'zero_division': 0}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # predicted classes that are never true
        balanced = sklearn.metrics.balanced_accuracy_score(label, predicted)
    return {
        'top1': sklearn.metrics.accuracy_score(label, predicted),
        'balanced_accuracy': balanced,
        'precision_macro': sklearn.metrics.precision_score(label, predicted, **options),
        'recall_macro': sklearn.metrics.recall_score(label, predicted, **options),
        'f1_macro': sklearn.metrics.f1_score(label, predicted, **options),
        'iou_mean': sklearn.metrics.jaccard_score(label, predicted, **options),
        'f1_weighted': sklearn.metrics.f1_score(
            label, predicted, average='weighted', zero_division=0
        ),
    }


CASES = {
    'random': (
        np.random.default_rng(0).integers(0, K, 50),
        np.random.default_rng(1).integers(0, K, 50),
    ),
    'perfect': (np.arange(K), np.arange(K)),
    'all wrong': (np.arange(K), (np.arange(K) + 1) % K),
    'absent from truth': (np.array([0, 0, 1, 1]), np.array([0, 1, 1, 3])),
    'absent from predictions': (np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1])),
    'one class': (np.full(5, 2), np.full(5, 2)),
    'one class, never found': (np.full(5, 2), np.full(5, 4)),
    'one example': (np.array([3]), np.array([3])),
}


@pytest.mark.parametrize('case', CASES)
def test_equal_to_scikit_learn(case):
    label, predicted = CASES[case]
    n = len(label)
    logits = np.eye(K, dtype=np.float32)[predicted]
    arrays = padded((logits, label.astype(np.int32), np.zeros(n, np.float32), np.ones(n, bool)), 50)
    sums = sums_of(*arrays)
    matrix = sklearn.metrics.confusion_matrix(label, predicted, labels=range(K))
    np.testing.assert_array_equal(sums['confusion'], matrix)
    summary = metrics.summarize(sums)
    for name, expected in by_sklearn(label, predicted).items():
        assert summary[name] == pytest.approx(expected, abs=1e-12), name
        assert type(summary[name]) is float
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        label, predicted, labels=range(K), zero_division=0
    )
    classes = metrics.per_class(matrix)
    np.testing.assert_allclose(classes['precision'], precision)
    np.testing.assert_allclose(classes['recall'], recall)
    np.testing.assert_allclose(classes['f1'], f1)
    np.testing.assert_array_equal(classes['support'], support)
    np.testing.assert_array_equal(classes['predicted'], matrix.sum(0))


def test_loss_and_top_k_equal_to_scikit_learn():
    logits, label, loss, mask = split()
    summary = metrics.summarize(sums_of(logits, label, loss, mask))
    assert summary['examples'] == 60
    assert summary['loss'] == pytest.approx(loss.mean(dtype=np.float64), rel=1e-6)
    for k in (1, 5):
        expected = sklearn.metrics.top_k_accuracy_score(label, logits, k=k, labels=range(K))
        assert summary[f'top{k}'] == pytest.approx(expected)


def test_padding_changes_nothing():
    arrays = split()
    plain, more = sums_of(*arrays), sums_of(*padded(arrays, 77))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, more)
    assert np.isfinite(more['loss'])


@pytest.mark.parametrize('size', [1, 7, 16, 60])
def test_any_batching_gives_the_same_sums(size):
    arrays = split()
    parts = [
        sums_of(*padded(tuple(a[i : i + size] for a in arrays), size)) for i in range(0, 60, size)
    ]
    total = functools.reduce(metrics.add, parts)
    whole = sums_of(*arrays)
    loss, expected = total.pop('loss'), whole.pop('loss')
    jax.tree.map(np.testing.assert_array_equal, total, whole)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert {v.dtype for v in total.values()} == {jnp.dtype('int32')}


def test_a_constant_model_is_right_as_often_as_its_first_class():
    label = np.arange(K, dtype=np.int32)
    sums = sums_of(np.zeros((K, K), np.float32), label, np.zeros(K, np.float32), np.ones(K, bool))
    assert sums['top1'] == 1
    assert sums['top5'] == 5
    np.testing.assert_array_equal(sums['confusion'][:, 0], np.ones(K))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_wrong(bad):
    logits, label, loss, mask = split(n=K)
    logits = np.eye(K, dtype=np.float32)[label] * 9
    logits[0, label[0]] = bad
    sums = sums_of(logits, label, loss, mask)
    assert sums['top1'] == sums['top5'] == K - 1
    assert np.trace(sums['confusion']) == K - 1
    assert sums['confusion'].sum() == K


@pytest.mark.parametrize('classes', [1, 2, 4])
def test_top5_of_fewer_classes_is_always_right(classes):
    sums = sums_of(*split(classes=classes))
    assert sums['top5'] == sums['examples'] == 60


def test_top1_is_the_trace_of_the_confusion_matrix():
    sums = sums_of(*split(n=200, seed=3))
    assert sums['top1'] == np.trace(sums['confusion'])


def test_no_examples_have_no_metrics():
    logits, label, loss, mask = split()
    summary = metrics.summarize(sums_of(logits, label, loss, ~mask))
    assert summary['examples'] == 0
    assert all(math.isnan(summary[name]) for name in ('loss', 'top1', 'top5'))
    assert summary['f1_macro'] == 0


def test_the_float32_sum_of_a_long_pass_stays_close():
    losses = np.random.default_rng(0).gamma(2.0, 128.0, 5000).astype(np.float32)
    total, _ = jax.jit(lambda x: jax.lax.scan(lambda s, v: (s + v, None), jnp.float32(0), x))(
        losses
    )
    assert float(total) == pytest.approx(losses.sum(dtype=np.float64), rel=1e-5)


@pytest.mark.parametrize(('successes', 'n'), [(0, 10), (10, 10), (7, 10), (9601, 10000), (0, 1)])
@pytest.mark.parametrize('confidence', [0.68, 0.95])
def test_wilson_interval_equal_to_scipy(successes, n, confidence):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method='wilson')
    interval = metrics.wilson_interval(successes, n, confidence)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert interval[0] <= successes / n <= interval[1]


def test_mean_interval_equal_to_scipy():
    values = [0.91, 0.93, 0.92, 0.95]
    mean, half = metrics.mean_interval(values, 0.9)
    expected = scipy.stats.t.interval(0.9, 3, np.mean(values), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected)


def test_intervals_of_next_to_nothing():
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    assert metrics.mean_interval([0.5]) == (0.5, math.inf)


@pytest.mark.parametrize(
    'mistake',
    [
        lambda: metrics.wilson_interval(11, 10),
        lambda: metrics.wilson_interval(-1, 10),
        lambda: metrics.wilson_interval(1, 10, confidence=95),
        lambda: metrics.mean_interval([]),
        lambda: metrics.mean_interval([1.0], confidence=1.0),
    ],
)
def test_mistakes_are_user_errors(mistake):
    with pytest.raises(UserError):
        mistake()
