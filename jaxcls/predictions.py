"""The logits of every example of a split, kept as a file, and what only they can answer.

Metrics that are sums over examples are in `metrics`; those here need the examples together: ranks,
temperatures, mistakes, ensembles.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcls import metrics
from jaxcls.errors import UserError

TEMPERATURES = 0.05, 20.0  # the range that `temperature` looks in
_ROWS = 4096  # examples at a time: 1,000 classes are 16 MB


class Predictions(NamedTuple):
    """Logits float32 [N, K] and true labels int32 [N], in the order of the split."""

    logits: np.ndarray
    label: np.ndarray


def save(path: Path, predictions: Predictions):
    """Writes an .npz file, whole or not at all."""
    part = path.with_name(f'.{path.name}.part')
    with part.open('wb') as file:
        np.savez(file, logits=predictions.logits, label=predictions.label)
    part.replace(path)


def load(path: Path) -> Predictions:
    """Reads what `save` wrote.

    Raises:
      UserError: missing, damaged or not float32 [N, K] and integers [N].
    """
    if not path.is_file():
        raise UserError(f'{path} is missing: the run has not ended. Repeat its `jaxcls train`.')
    try:
        with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
            predictions = Predictions(arrays['logits'], arrays['label'])
        logits, label = predictions
        shapes = logits.ndim == 2 and label.shape == logits.shape[:1]
        if not shapes or logits.dtype != np.float32 or label.dtype.kind not in 'iu':
            found = ', '.join(f'{x.dtype} {list(x.shape)}' for x in predictions)
            raise ValueError(f'it has {found} in place of float32 [N, K] and integers [N]')
    except Exception as error:  # NumPy and zipfile raise all kinds on files that are cut or changed
        raise UserError(f'{path} is damaged: {error}. Restore it from a copy.') from None
    return predictions


def probabilities(predictions: Predictions) -> np.ndarray:
    """The softmax of the logits, float64 [N, K].

    An example with a logit that is not finite is certain of the class after its true one: wrong, as
    in `metrics.confusion`.
    """
    logits = _sound_logits(predictions)
    highest, rest = _parts(logits)
    return np.exp(logits - highest[:, None]) / (1 + rest)[:, None]


def predicted(predictions: Predictions) -> np.ndarray:
    """The predicted class, the first of equals: int [N], as in `metrics.confusion`."""
    return _sound_logits(predictions).argmax(-1)


def right(predictions: Predictions) -> np.ndarray:
    """Whether each example is classified right: bool [N], for `intervals.mcnemar`."""
    return _finite(predictions) & (predicted(predictions) == predictions.label)


def summarize(predictions: Predictions) -> dict[str, Any]:
    """All metrics of a split, as plain data; None where one is undefined.

    Returns:
      `metrics.summarize`'s without `loss`; `ranking`'s; `temperature`; `log_loss_calibrated`,
      `brier_calibrated` and `ece_calibrated`, of `calibrated`; `reliability` and
      `reliability_calibrated`, of `metrics.reliability`; `confusion` [K][K], rows true, columns
      predicted; `per_class`, a list [K] a metric: `metrics.per_class`'s, `roc_auc` and
      `average_precision`.
    """
    sums, after = sums_of(predictions), sums_of(calibrated(predictions))
    scaled = metrics.summarize(after)
    ranks = ranking(predictions)
    classes = {name: x.tolist() for name, x in metrics.per_class(sums['confusion']).items()}
    classes |= {name: ranks.pop(name) for name in ('roc_auc', 'average_precision')}
    summary = {
        **metrics.summarize(sums),
        **ranks,
        'temperature': temperature(predictions),
        **{f'{name}_calibrated': scaled[name] for name in ('log_loss', 'brier', 'ece')},
        'reliability': metrics.reliability(sums),
        'reliability_calibrated': metrics.reliability(after),
        'confusion': sums['confusion'].tolist(),
        'per_class': classes,
    }
    return {name: None if value != value else value for name, value in summary.items()}  # NaN


def sums_of(predictions: Predictions) -> dict[str, np.ndarray]:
    """The sums of `metrics` over all examples, on the host: float64 and int64.

    `metrics.batch_sums` without `loss`, `metrics.calibration_sums` and `confusion`.
    """
    parts = [jax.device_get(_batch_sums(*batch)) for batch in _batches(predictions)]
    wide = {'i': np.int64, 'f': np.float64}
    return jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=wide[x[0].dtype.kind]), *parts)


def _batches(predictions: Predictions) -> Iterator[tuple[np.ndarray, ...]]:
    """Logits, labels and mask, padded to one shape, so that they compile once."""
    for start in range(0, max(len(predictions.label), 1), _ROWS):
        logits, label = (x[start : start + _ROWS] for x in predictions)
        rows = _ROWS - len(label)
        padded = np.pad(logits, ((0, rows), (0, 0))), np.pad(label, (0, rows))
        yield *padded, np.arange(_ROWS) < len(label)


@jax.jit
def _batch_sums(logits, label, mask):
    sums = metrics.batch_sums(logits, label, jax.numpy.zeros(label.shape), mask)
    del sums['loss']
    matrix = metrics.confusion(logits, label, mask)
    return {**sums, **metrics.calibration_sums(logits, label, mask), 'confusion': matrix}


def ranking(predictions: Predictions) -> dict[str, Any]:
    """How well the probability of a class ranks its examples before all others, one against the rest.

    Compared are the log odds: they order as probabilities do, but those near 1 stay apart, and those
    that differ by rounding (kNN and forests have many) are ties.

    Returns:
      `roc_auc` and `average_precision`, lists [K], of scikit-learn; None for a class without examples,
      and `roc_auc` also for the class of all of them. `roc_auc_macro` and `average_precision_macro`
      are the means over the classes that have one, `roc_auc_weighted` that by true examples (as
      `roc_auc_score(multi_class='ovr')`, which asks for all classes); None where no class has one.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    label, logits = predictions.label, _sound_logits(predictions)
    support = np.bincount(label, minlength=logits.shape[1])
    areas, precisions = [], []
    for k, (examples, score) in enumerate(zip(support, _log_odds(logits), strict=True)):
        true = label == k
        areas.append(float(roc_auc_score(true, score)) if 0 < examples < len(label) else None)
        precisions.append(float(average_precision_score(true, score)) if examples else None)
    return {
        'roc_auc_macro': _mean(areas, np.ones(len(areas))),
        'roc_auc_weighted': _mean(areas, support),
        'average_precision_macro': _mean(precisions, np.ones(len(areas))),
        'roc_auc': areas,
        'average_precision': precisions,
    }


def _log_odds(logits: np.ndarray) -> Iterator[np.ndarray]:
    """log p / (1 - p) of each class, float64 [N], to the ten digits that rounding leaves."""
    highest, rest = _parts(logits)
    top = logits.argmax(-1)
    for k in range(logits.shape[1]):
        below = logits[:, k] - highest
        with np.errstate(divide='ignore'):
            odds = np.where(top == k, -np.log(rest), below - np.log1p(rest - np.exp(below)))
        yield np.round(np.clip(odds, -700, 700), 10)  # where float64's exp ends


def _mean(values: list[float | None], weights: np.ndarray) -> float | None:
    values = np.array(values, np.float64)  # None is NaN
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=weights[known])) if known.any() else None


def temperature(predictions: Predictions) -> float:
    """The number that logits must be divided by for the least log loss on these examples.

    The log loss is convex in the inverse of the temperature, whose slope is solved for 0. The result
    is in [0.05, 20]: at the lower end where all examples are right with room to spare, at the upper
    where the classes are worse than guessed; 1 where each example's logits are all equal, or there
    is no example. Examples with a logit that is not finite are left out. Guo et al. 2017,
    https://arxiv.org/abs/1706.04599.
    """
    logits, label = (x[_finite(predictions)] for x in predictions)
    if (logits == logits[:, :1]).all():
        return 1.0
    slope = functools.cache(functools.partial(_slope, logits, label))
    low, high = (1 / t for t in reversed(TEMPERATURES))
    if slope(high) <= 0:  # first: gaps so wide that the loss is 0 throughout have slope 0 at both
        return 1 / high
    if slope(low) >= 0:
        return 1 / low
    from scipy.optimize import brentq  # slow to import

    return 1 / brentq(slope, low, high, xtol=1e-9, rtol=1e-9)


def _slope(logits: np.ndarray, label: np.ndarray, inverse: float) -> float:
    """Of the mean log loss by the inverse temperature: the mean logit less that of the true class."""
    total = 0.0
    for start in range(0, len(label), _ROWS):
        z, y = (x[start : start + _ROWS] for x in (logits, label))
        z = z - z[np.arange(len(y)), y].astype(np.float64)[:, None]
        p = np.exp(inverse * (z - z.max(-1, keepdims=True)))
        total += float(((p * z).sum(-1) / p.sum(-1)).sum())
    return total / len(label)


def calibrated(predictions: Predictions) -> Predictions:
    """Logits divided by a temperature fitted on the other four fifths; every fifth example is one.

    So the calibration that they have is one to expect of new examples.
    """
    part = np.arange(len(predictions.label)) % 5
    fitted = [temperature(Predictions(*(x[part != i] for x in predictions))) for i in range(5)]
    each = np.array(fitted, np.float32)[part]
    return Predictions(predictions.logits / each[:, None], predictions.label)


def mistakes(predictions: Predictions, count: int) -> np.ndarray:
    """The examples that are wrong with the highest confidence: int [count] or fewer, worst first."""
    rest = _parts(_sound_logits(predictions))[1]  # the less, the more confident
    wrong = np.flatnonzero(~right(predictions))
    return wrong[np.argsort(rest[wrong], kind='stable')][:count]


def label_issues(predictions: Predictions, count: int) -> np.ndarray:
    """The examples whose label is likeliest to be an error: int [count] or fewer, likeliest first.

    Confident learning (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068): an example is
    confidently of a class if its probability there is at least the mean over the examples with that
    label. Suspects are confidently of another class than their label, ordered by the probability of
    the label less the greatest of the others. The network must not have seen these examples. Those with a
    logit that is not finite are left out.
    """
    kept = np.flatnonzero(_finite(predictions))
    finite = Predictions(*(x[kept] for x in predictions))
    p, label = probabilities(finite), finite.label
    rows, classes = np.arange(len(label)), p.shape[1]
    own, support = p[rows, label], np.bincount(label, minlength=classes)
    means = np.bincount(label, own, classes) / np.maximum(support, 1)
    confident = np.where((support > 0) & (p >= means), p, -1)
    suspect = np.flatnonzero((confident.max(-1) >= 0) & (confident.argmax(-1) != label))
    p[rows, label] = -1
    margin = own - p.max(-1)
    return kept[suspect[np.argsort(margin[suspect], kind='stable')]][:count]


def ensemble(members: Sequence[Predictions]) -> Predictions:
    """The mean of the members' probabilities, as log probabilities, at least -87.3.

    Where one member has a logit that is not finite the ensemble has NaN.

    Raises:
      UserError: no members, or members of other examples or classes.
    """
    if not members:
        raise UserError('An ensemble of no predictions; give those of one run at least.')
    first = members[0]
    for i, member in enumerate(members):
        same = member.logits.shape == first.logits.shape
        if not same or not np.array_equal(member.label, first.label):
            raise UserError(
                f'Member {i} of the ensemble has logits {member.logits.shape}, and the first '
                f'{first.logits.shape}, or other labels; give runs of the same validation split.'
            )
    mean = sum(map(probabilities, members)) / len(members)
    mean[~np.all([_finite(member) for member in members], axis=0)] = np.nan
    logits = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
    return Predictions(logits.astype(np.float32), first.label)


def _finite(predictions: Predictions) -> np.ndarray:
    """Whether all logits of an example are: bool [N]."""
    return np.isfinite(predictions.logits).all(-1)


def _parts(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greatest logit, and the sum of exp(logit - greatest) of the others: float64 [N]."""
    highest, rest = logits.max(-1).astype(np.float64), np.zeros(len(logits))
    for rows in (slice(i, i + _ROWS) for i in range(0, len(logits), _ROWS)):
        others = np.exp(logits[rows] - highest[rows, None])
        np.put_along_axis(others, logits[rows].argmax(-1)[:, None], 0, axis=-1)
        rest[rows] = others.sum(-1)
    return highest, rest


def _sound_logits(predictions: Predictions) -> np.ndarray:
    """The logits; where one is not finite, the class after the true one is certain instead."""
    logits, label = predictions
    bad = np.flatnonzero(~_finite(predictions))
    if bad.size:
        logits = logits.copy()
        logits[bad] = np.finfo(logits.dtype).min
        logits[bad, (label[bad] + 1) % logits.shape[1]] = 0
    return logits
