import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from jaxcls import metrics, sharding

K = 7
ROWS = 64


def sums_of(logits, label, loss, mask):
    """Padded to one number of rows, so that it compiles once a number of classes."""
    return sums_of_batch(*padded((logits, label, loss, mask), ROWS))


@jax.jit
def sums_of_batch(logits, label, loss, mask):
    sums = metrics.batch_sums(logits, label, loss, mask)
    sums |= metrics.calibration_sums(logits, label, mask)
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
        kappa = sklearn.metrics.cohen_kappa_score(label, predicted)
        matthews = sklearn.metrics.matthews_corrcoef(label, predicted)
    return {
        'top1': sklearn.metrics.accuracy_score(label, predicted),
        'balanced_accuracy': balanced,
        'kappa': kappa,
        'matthews': matthews,
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
    arrays = (logits, label.astype(np.int32), np.zeros(n, np.float32), np.ones(n, bool))
    sums = sums_of(*arrays)
    matrix = sklearn.metrics.confusion_matrix(label, predicted, labels=range(K))
    np.testing.assert_array_equal(sums['confusion'], matrix)
    summary = metrics.summarize(sums)
    for name, expected in by_sklearn(label, predicted).items():
        assert summary[name] == pytest.approx(expected, abs=1e-12, nan_ok=True), name
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


@pytest.mark.parametrize('k', [1, 2, 3, K, K + 2])
def test_top_k_equal_to_scikit_learn(k):
    logits, label, _, _ = split()
    expected = sklearn.metrics.top_k_accuracy_score(label, logits, k=min(k, K - 1), labels=range(K))
    found = np.asarray(metrics.top_k(logits, label, k))
    assert found.mean() == pytest.approx(expected if k < K else 1)
    assert (found.dtype, found.shape) == (bool, (60,))


def test_log_loss_equal_to_scikit_learn():
    logits, label, loss, mask = split()
    summary = metrics.summarize(sums_of(logits, label, loss, mask))
    probabilities = scipy.special.softmax(logits.astype(np.float64), -1)
    expected = sklearn.metrics.log_loss(label, probabilities, labels=range(K))
    assert summary['log_loss'] == pytest.approx(expected, abs=1e-6)


def test_calibration_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.94, 0.06], [0.7, 0.3], [0.5, 0.5]])
    label = np.array([0, 1, 0, 0], np.int32)
    arrays = (
        np.log(probabilities).astype(np.float32),
        label,
        np.zeros(4, np.float32),
        np.ones(4, bool),
    )
    sums = sums_of(*arrays)
    summary = metrics.summarize(sums)
    assert summary['ece'] == pytest.approx((abs(1 - 0.95 - 0.94) + 0.3 + 0.5) / 4, abs=1e-6)
    assert summary['log_loss'] == pytest.approx(-np.log([0.95, 0.06, 0.7, 0.5]).mean(), abs=1e-6)
    brier = 2 * np.mean(np.square([0.05, 0.94, 0.3, 0.5]))
    assert summary['brier'] == pytest.approx(brier, abs=1e-6)
    rows = metrics.reliability(sums)
    assert [row['count'] for row in rows] == [0] * 7 + [1, 0, 0, 1, 0, 0, 0, 2]
    assert rows[14]['confidence'] == pytest.approx(0.945)
    assert (rows[14]['low'], rows[14]['high'], rows[14]['accuracy']) == (14 / 15, 1, 0.5)
    assert rows[0] == {'low': 0, 'high': 1 / 15, 'count': 0, 'confidence': None, 'accuracy': None}


@pytest.mark.parametrize(('equals', 'bin_'), [(1, 14), (3, 4), (5, 2)])
def test_a_confidence_on_an_edge_is_in_the_bin_below(equals, bin_):
    logits, label, loss, mask = split(n=4)
    logits[:] = np.where(np.arange(K) < equals, 0, -200)
    count = np.asarray(sums_of(logits, label, loss, mask)['bin_count'])
    assert count.tolist() == [4 * (i == bin_) for i in range(15)]


def test_padding_changes_nothing():
    arrays = split(n=7)
    plain, more = sums_of_batch(*arrays), sums_of(*arrays)
    assert_same(more, plain)
    assert np.isfinite(more['loss'])


def test_any_batching_gives_the_same_sums():
    arrays, size = split(), 7
    parts = [
        sums_of_batch(*padded(tuple(a[i : i + size] for a in arrays), size))
        for i in range(0, 60, size)
    ]
    assert_same(functools.reduce(metrics.add, parts), sums_of(*arrays))


def assert_same(found, expected):
    """Counts to the last bit, sums of float32 but for their order."""
    floats = {'loss', 'log_loss', 'brier', 'bin_confidence'}
    for name, value in expected.items():
        assert found[name].dtype == (jnp.float32 if name in floats else jnp.int32)
        rtol = 1e-6 if name in floats else 0
        np.testing.assert_allclose(found[name], value, rtol=rtol, err_msg=name)


def test_any_number_of_devices_gives_the_same_sums():
    arrays = padded(split(), 64)
    mesh = sharding.make_mesh(jax.devices()[:4])
    placed = jax.device_put(arrays, sharding.split_batch(mesh))
    assert_same(sums_of_batch(*placed), sums_of(*arrays))


def test_a_constant_model_is_right_as_often_as_its_first_class():
    label = np.arange(K, dtype=np.int32)
    sums = sums_of(np.zeros((K, K), np.float32), label, np.zeros(K, np.float32), np.ones(K, bool))
    assert sums['top1'] == 1
    assert sums['top5'] == 5
    np.testing.assert_array_equal(sums['confusion'][:, 0], np.ones(K))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_wrong(bad):
    logits, label, loss, mask = split(n=K)
    label[0] = 0  # what equal logits would be
    logits = np.eye(K, dtype=np.float32)[label] * 9
    logits[0, label[0]] = bad
    sums = sums_of(logits, label, loss, mask)
    assert sums['top1'] == sums['top5'] == K - 1
    assert np.trace(sums['confusion']) == K - 1
    assert sums['confusion'].sum() == K
    logits[0] = 200 * np.eye(K)[1] - np.eye(K)[0]
    assert_same(sums, sums_of(logits, label, loss, mask))


@pytest.mark.parametrize('gap', [36, 37, 1e4, 3e38])
def test_the_log_loss_is_clipped_as_in_scikit_learn(gap):
    logits, label = np.array([[0, gap]], np.float32), np.array([0], np.int32)
    found = sums_of(logits, label, np.zeros(1, np.float32), np.ones(1, bool))['log_loss']
    probabilities = scipy.special.softmax(logits.astype(np.float64), -1)
    expected = sklearn.metrics.log_loss(label, probabilities, labels=[0, 1])
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('classes', [1, 2])
def test_top5_of_fewer_classes_is_always_right(classes):
    sums = sums_of(*split(classes=classes))
    assert sums['top5'] == sums['examples'] == 60


def test_top1_is_the_trace_of_the_confusion_matrix():
    sums = sums_of(*split(seed=3))
    assert sums['top1'] == np.trace(sums['confusion'])


def test_no_examples_have_no_metrics():
    logits, label, loss, mask = split()
    summary = metrics.summarize(sums_of(logits, label, loss, ~mask))
    assert summary['examples'] == 0
    del summary['examples']
    assert 'f1_macro' in summary and all(map(math.isnan, summary.values()))


def test_the_float32_sum_of_a_long_pass_stays_close():
    losses = np.random.default_rng(0).gamma(2.0, 128.0, 5000).astype(np.float32)
    total, _ = jax.jit(lambda x: jax.lax.scan(lambda s, v: (s + v, None), jnp.float32(0), x))(
        losses
    )
    assert float(total) == pytest.approx(losses.sum(dtype=np.float64), rel=1e-5)
