import collections
import inspect
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics

from jaxcls import metrics, predictions
from jaxcls.errors import UserError
from jaxcls.predictions import Predictions

CLASSES = (2, 3, 7)  # few: a program is compiled for each
KINDS = (
    'random', 'skilled', 'ties', 'constant', 'perfect', 'all wrong', 'large', 'long tail',
    'absent from truth', 'absent from predictions', 'one class', 'one class, never found', 'one example',
)  # fmt: skip


def case(seed: int) -> Predictions:
    """A split of every kind in turn, with random sizes and numbers."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    classes = CLASSES[seed // len(KINDS) % len(CLASSES)]
    n = 1 if kind == 'one example' else int(rng.choice([2, 5, 40, 150]))
    label = rng.integers(0, classes, n)
    if kind == 'long tail':
        label = np.minimum(rng.geometric(0.6, n) - 1, classes - 1)
    if kind == 'absent from truth':
        label = np.minimum(label, classes - 2)
    if kind.startswith('one class'):
        label[:] = rng.integers(classes)
    own = np.eye(classes)[label]
    logits = rng.normal(size=(n, classes)) * rng.choice([0.3, 1, 4])
    if kind in ('skilled', 'long tail'):
        logits += 2 * own
    elif kind == 'ties':
        logits = np.round(logits)
    elif kind == 'constant':
        logits[:] = rng.integers(3)
    elif kind == 'perfect':
        logits += 60 * own
    elif kind in ('all wrong', 'one class, never found'):
        logits -= 60 * own
    elif kind == 'large':
        logits *= 1e3
    elif kind == 'absent from predictions':
        logits[:, rng.integers(classes)] -= 60
    return Predictions(logits.astype(np.float32), label.astype(np.int32))


def counted(p: Predictions) -> dict:
    """What scikit-learn makes of the classes that are predicted."""
    label, guess, classes = p.label, p.logits.argmax(-1), p.logits.shape[1]
    options = {'zero_division': 0}
    expected = {
        'top1': sklearn.metrics.accuracy_score(label, guess),
        'top5': 1.0,
        'balanced_accuracy': sklearn.metrics.balanced_accuracy_score(label, guess),
        'kappa': sklearn.metrics.cohen_kappa_score(label, guess),
        'matthews': sklearn.metrics.matthews_corrcoef(label, guess),
        'iou_mean': sklearn.metrics.jaccard_score(label, guess, average='macro', **options),
        'confusion': sklearn.metrics.confusion_matrix(label, guess, labels=range(classes)),
    }
    if classes > 5:  # of equals scikit-learn takes the last: the classes in reverse
        expected['top5'] = sklearn.metrics.top_k_accuracy_score(
            classes - 1 - label, p.logits[:, ::-1], k=5, labels=range(classes)
        )
    names = ('precision', 'recall', 'f1', 'support')
    for average in ('macro', 'micro', 'weighted'):
        values = sklearn.metrics.precision_recall_fscore_support(
            label, guess, average=average, **options
        )
        expected |= {f'{n}_{average}': v for n, v in zip(names[:3], values, strict=False)}
    options |= {'labels': range(classes), 'average': None}
    values = sklearn.metrics.precision_recall_fscore_support(label, guess, **options)
    expected |= {f'per_class {n}': v for n, v in zip(names, values, strict=True)}
    return expected | {'per_class iou': sklearn.metrics.jaccard_score(label, guess, **options)}


def calibration(p: Predictions) -> dict:
    probabilities = scipy.special.softmax(p.logits.astype(np.float64), -1)
    labels = range(p.logits.shape[1])
    return {
        'log_loss': sklearn.metrics.log_loss(p.label, probabilities, labels=labels),
        'brier': brier(p.label, probabilities),
        'ece': calibration_error(probabilities, p.label),
    }


def brier(label, probabilities) -> float:
    classes = range(probabilities.shape[1])
    score = sklearn.metrics.brier_score_loss
    if 'scale_by_half' in inspect.signature(score).parameters:
        return score(label, probabilities, labels=classes, scale_by_half=False)
    return np.square(probabilities - np.eye(len(classes))[label]).sum(-1).mean()  # before 1.7


def calibration_error(probabilities, label) -> float:
    """Guo et al. 2017, section 2, word by word."""
    confidence, right = probabilities.max(-1).astype(np.float32), probabilities.argmax(-1) == label
    edges = np.linspace(0, 1, 16).astype(np.float32)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = right[inside].mean() - confidence[inside].mean(dtype=np.float64)
            error += inside.mean() * abs(gap)
    return error


def ranked(p: Predictions) -> dict:
    """Of the probabilities; of log odds where float64 cannot hold or tie them as they are."""
    logits = p.logits.astype(np.float64)
    scores, classes = scipy.special.softmax(logits, -1), logits.shape[1]
    true = np.arange(classes) == p.label[:, None]
    whole = (logits == np.round(logits)).all()
    if whole or scores.max() > 1 - 1e-9 or scores.min() < 1e-300:
        others = [scipy.special.logsumexp(np.delete(logits, k, 1), -1) for k in range(classes)]
        scores = np.round(np.clip(logits - np.stack(others, -1), -700, 700), 10)
    precision = sklearn.metrics.average_precision_score(true, scores, average=None)
    precision = np.where(true.any(0), precision, np.nan)
    expected = {
        'per_class average_precision': precision,
        'average_precision_macro': np.nanmean(precision),
        'per_class roc_auc': [mann_whitney(t, s) for t, s in zip(true.T, scores.T, strict=True)],
    }
    if true.any(0).all():
        labels, options = true, {}
        if classes > 2 and 0 <= scores.min() <= scores.max() <= 1:
            labels, options = p.label, {'multi_class': 'ovr'}
        for average in ('macro', 'weighted'):
            expected[f'roc_auc_{average}'] = sklearn.metrics.roc_auc_score(
                labels, scores, average=average, **options
            )
    return expected


def mann_whitney(true, score) -> float:
    """The share of pairs in which the example of the class has the higher score; ties are halves."""
    positive, negative = score[true], score[~true]
    if not positive.size or not negative.size:
        return math.nan
    pairs = positive[:, None] - negative
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


def by_torchmetrics(p: Predictions) -> dict:
    """Its bins are [low, high), with 1 in one of its own: {} with a confidence on an edge."""
    torch = pytest.importorskip('torch')
    torchmetrics = pytest.importorskip('torchmetrics.functional.classification')
    probabilities = scipy.special.softmax(p.logits.astype(np.float64), -1).astype(np.float32)
    edges = np.linspace(0, 1, 16).astype(np.float32)
    if np.isclose(probabilities.max(-1)[:, None], edges, rtol=0, atol=1e-6).any():
        return {}
    error = torchmetrics.multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(p.label), p.logits.shape[1], n_bins=15
    )
    return {'ece': float(error)}


def difference(found, expected) -> float:
    """Largest, of their size where that is above 1; None and NaN are the same."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    return float(np.nan_to_num(abs(found - expected) / np.maximum(1, abs(expected))).max())


def differences(seeds, references) -> dict[str, list[float]]:
    """By group of metrics, over all cases."""
    found = collections.defaultdict(list)
    for seed in seeds:
        p = case(seed)
        summary = predictions.summarize(p)
        summary |= {f'per_class {name}': x for name, x in summary['per_class'].items()}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # scikit-learn's of absent classes
            expected = {reference.__name__: reference(p) for reference in references}
        for group, values in expected.items():
            for name, value in values.items():
                error = difference(summary[name], value)
                assert error < 1e-6, f'case {seed} ({KINDS[seed % len(KINDS)]}): {name}'
                found[f'{group}: {name}'].append(error)
    return found


def test_every_metric_equals_scikit_learn_on_random_and_degenerate_splits():
    found = differences(range(39), (counted, calibration, ranked))  # each kind and K
    assert len(found) == 29
    assert min(map(len, found.values())) > 8


@pytest.mark.slow
def test_every_metric_of_2000_splits_equals_scikit_learn_and_torchmetrics():
    references = counted, calibration, ranked, by_torchmetrics
    found = differences(range(2000), references)
    largest = max(map(max, found.values()))
    print(f'\nmetrics: 2000 cases x {len(found)} metrics, largest difference {largest:.2g}')
    for group in references:
        errors = [e for name, e in found.items() if name.startswith(group.__name__)]
        most = max(map(max, errors))
        print(
            f'{group.__name__}: {len(errors)} metrics, {sum(map(len, errors))} values, {most:.2g}'
        )


def split(n=400, classes=7, scale=1.0, seed=0) -> Predictions:
    """Labels drawn from the softmax of the logits before they are scaled: calibrated at `scale`."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    label = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    return Predictions((scale * logits).astype(np.float32), label.astype(np.int32))


def test_a_summary_is_json_without_nan():
    for p in (case(0), case(10), Predictions(np.zeros((0, 3), np.float32), np.zeros(0, np.int32))):
        summary = predictions.summarize(p)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary['top1'] is summary['log_loss'] is summary['ece'] is summary['kappa'] is None
    assert summary['roc_auc_macro'] is None
    assert summary['temperature'] == 1


def test_a_long_split_is_summed_in_parts(monkeypatch):
    p = split(5000, 3)
    whole = predictions.sums_of(p)
    monkeypatch.setattr(predictions, '_ROWS', 999)
    parts = predictions.sums_of(p)
    for name, value in parts.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-6, err_msg=name)
    assert whole['confusion'].sum() == whole['bin_count'].sum() == 5000
    assert whole['confusion'].dtype == np.int64
    assert predictions.temperature(p) == pytest.approx(predictions.temperature(split(5000, 3)))


@pytest.mark.parametrize('scale', [0.25, 1.0, 5.0])
def test_the_temperature_undoes_a_scale(scale):
    found = predictions.temperature(split(5000, scale=scale))
    assert found == pytest.approx(scale, rel=0.05)
    assert found == pytest.approx(scale * predictions.temperature(split(5000)), rel=1e-5)


def test_the_temperature_has_the_least_log_loss():
    p = split(scale=3)

    def log_loss(t):
        probabilities = scipy.special.softmax(p.logits.astype(np.float64) / t, -1)
        return sklearn.metrics.log_loss(p.label, probabilities)

    expected = scipy.optimize.minimize_scalar(log_loss, bounds=(0.1, 10), method='bounded')
    assert predictions.temperature(p) == pytest.approx(expected.x, rel=1e-4)


@pytest.mark.parametrize(
    ('kind', 'expected'), [('perfect', 0.05), ('all wrong', 20), ('constant', 1), ('none', 1)]
)
def test_the_temperature_stays_in_its_range(kind, expected):
    label = np.arange(6, dtype=np.int32) % 3
    own = np.eye(3, dtype=np.float32)[label]
    logits = {'perfect': 9 * own, 'all wrong': -9 * own, 'constant': 0 * own, 'none': own[:0]}[kind]
    p = Predictions(logits, label[: len(logits)])
    assert predictions.temperature(p) == pytest.approx(expected)
    wide = Predictions(np.float32(1e6) * p.logits, p.label)  # its loss is 0 in float64, or huge
    assert predictions.temperature(wide) == pytest.approx(expected)


def test_a_temperature_is_fitted_on_the_other_examples():
    p = split(401, scale=3)
    scaled = predictions.calibrated(p)
    for i in range(5):
        ours = np.arange(401) % 5 == i
        fitted = predictions.temperature(Predictions(p.logits[~ours], p.label[~ours]))
        np.testing.assert_allclose(scaled.logits[ours], p.logits[ours] / fitted, rtol=1e-6)
    np.testing.assert_array_equal(scaled.logits.argmax(-1), p.logits.argmax(-1))
    before, after = predictions.summarize(p), predictions.summarize(scaled)
    for name in ('log_loss', 'brier', 'ece', 'reliability'):
        assert before[f'{name}_calibrated'] == after[name]


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_certain_and_wrong(bad):
    p = split(50, 3)
    p.label[7] = 0  # what equal logits would be
    broken = Predictions(p.logits.copy(), p.label)
    broken.logits[7, p.label[7]] = bad
    certain = Predictions(p.logits.copy(), p.label)
    certain.logits[7] = 200 * np.eye(3)[(p.label[7] + 1) % 3]
    found, expected = predictions.summarize(broken), predictions.summarize(certain)
    for name in ('log_loss', 'brier', 'ece', 'top1', 'roc_auc_macro', 'average_precision_macro'):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    assert found['confusion'] == expected['confusion']
    rest = Predictions(*(np.delete(x, 7, axis=0) for x in p))
    assert predictions.temperature(broken) == predictions.temperature(rest)
    assert predictions.mistakes(broken, 1).tolist() == [7]
    assert not predictions.right(broken)[7]
    assert predictions.predicted(broken)[7] == (p.label[7] + 1) % 3


def test_right_and_predicted_are_those_of_the_metrics():
    for seed in range(26):
        p = case(seed)
        sums = predictions.sums_of(p)
        assert predictions.right(p).sum() == sums['top1'] == np.trace(sums['confusion'])
        np.testing.assert_array_equal(
            np.bincount(predictions.predicted(p), minlength=p.logits.shape[1]),
            sums['confusion'].sum(0),
        )


def test_mistakes_come_by_confidence():
    logits = np.array([[0, 9], [1, 0], [0, 2], [3, 0], [0, 1]], np.float32)
    p = Predictions(logits, np.array([1, 1, 0, 1, 0], np.int32))
    assert predictions.mistakes(p, 10).tolist() == [3, 2, 1, 4]
    assert predictions.mistakes(p, 2).tolist() == [3, 2]
    assert predictions.mistakes(case(4), 5).tolist() == []  # perfect


def test_label_issues_by_hand():
    probabilities = np.array(
        [[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.2, 0.8], [0.45, 0.55]]
    )
    label = np.array([0, 0, 0, 1, 1, 0], np.int32)
    # Class 0 from (0.9 + 0.8 + 0.1 + 0.45) / 4 = 0.5625 on, class 1 from 0.75 on: the third alone.
    p = Predictions(np.log(probabilities).astype(np.float32), label)
    assert predictions.label_issues(p, 10).tolist() == [2]
    assert predictions.label_issues(Predictions(p.logits[:0], label[:0]), 10).tolist() == []
    lost = Predictions(
        np.append(np.full((4, 2), np.nan, np.float32), p.logits, 0), np.append([1] * 4, label)
    )
    # If they lowered class 1's mean, the last one would be confidently of it, too.
    assert predictions.label_issues(lost, 10).tolist() == [6]
    p.logits[2] = np.nan
    assert predictions.label_issues(p, 10).tolist() == []


def test_label_issues_are_the_flipped_labels():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 2000)
    logits = rng.normal(size=(2000, 5)) + 6 * np.eye(5)[true]
    flipped = rng.permutation(2000)[:100]
    label = true.copy()
    label[flipped] = (true[flipped] + rng.integers(1, 5, 100)) % 5
    p = Predictions(logits.astype(np.float32), label.astype(np.int32))
    found = predictions.label_issues(p, 100)
    assert len(np.intersect1d(found, flipped)) >= 95
    assert np.isin(found[:50], flipped).all()
    right = Predictions(p.logits, true.astype(np.int32))
    assert len(predictions.label_issues(right, 100)) <= 5


def test_an_ensemble_has_the_mean_probability():
    members = [Predictions(split(60, 4, seed=seed).logits, split(60, 4).label) for seed in range(3)]
    mean = np.mean([scipy.special.softmax(m.logits, -1) for m in members], axis=0)
    found = predictions.ensemble(members)
    np.testing.assert_allclose(np.exp(found.logits), mean, rtol=1e-5)
    np.testing.assert_allclose(predictions.probabilities(found), mean, rtol=1e-5)
    assert found.logits.dtype == np.float32
    alone = predictions.ensemble(members[:1])
    np.testing.assert_allclose(
        predictions.probabilities(alone), predictions.probabilities(members[0]), rtol=1e-5
    )


def test_an_ensemble_is_finite_where_its_members_are():
    label = np.zeros(2, np.int32)
    certain = Predictions(np.array([[0, 2000], [0, 2000]], np.float32), label)
    broken = Predictions(np.array([[0, 1], [np.inf, 0]], np.float32), label)
    assert np.isfinite(predictions.ensemble([certain, certain]).logits).all()
    found = predictions.ensemble([certain, broken]).logits
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    'members',
    [
        lambda p: [],
        lambda p: [p, Predictions(p.logits, (p.label + 1) % 7)],
        lambda p: [p, Predictions(p.logits[:, :4], p.label)],
        lambda p: [p, Predictions(p.logits[:9], p.label[:9])],
    ],
)
def test_an_ensemble_of_other_splits_is_a_user_error(members):
    with pytest.raises(UserError):
        predictions.ensemble(members(split(20)))


def test_files_give_back_what_was_saved(tmp_path):
    p, path = split(20), tmp_path / 'predictions.npz'
    predictions.save(path, p)
    for found, expected in zip(predictions.load(path), p, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    assert [file.name for file in tmp_path.iterdir()] == ['predictions.npz']


OTHERS = {
    'lengths': (np.zeros((3, 2), np.float32), np.zeros(4, np.int32)),
    'one axis': (np.zeros(3, np.float32), np.zeros(3, np.int32)),
    'doubles': (np.zeros((3, 2)), np.zeros(3, np.int32)),
    'labels': (np.zeros((3, 2), np.float32), np.zeros(3, np.float32)),
}


@pytest.mark.parametrize('damage', ['missing', 'cut', 'empty', 'method', *OTHERS])
def test_damaged_files_are_user_errors(tmp_path, damage):
    path = tmp_path / 'predictions.npz'
    predictions.save(path, split(20))
    if damage == 'missing':
        path.unlink()
    elif damage in OTHERS:
        np.savez(path, **dict(zip(('logits', 'label'), OTHERS[damage], strict=True)))
    elif damage == 'method':  # of compression, which zipfile does not know
        data = bytearray(path.read_bytes())
        data[8] = data[data.index(b'PK\x01\x02') + 10] = 99
        path.write_bytes(data)
    else:
        path.write_bytes(path.read_bytes()[: 100 if damage == 'cut' else 0])
    with pytest.raises(UserError, match='predictions.npz'):
        predictions.load(path)


def test_reliability_adds_up_to_the_calibration_error():
    p = split(300, scale=4)
    summary = predictions.summarize(p)
    rows = summary['reliability']
    assert len(rows) == metrics.BINS
    assert sum(row['count'] for row in rows) == 300
    full = [row for row in rows if row['count']]
    assert all(row['low'] < row['confidence'] <= row['high'] for row in full)
    error = sum(row['count'] * abs(row['accuracy'] - row['confidence']) for row in full) / 300
    assert error == pytest.approx(summary['ece'])
    assert all(row['accuracy'] is None for row in rows if not row['count'])
