"""What a number leaves open: intervals of one run and of several, and comparisons of two."""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from jaxcls.errors import UserError, require


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, such as one run's accuracy on `n` examples.

    It holds what the finite test split leaves open, not what another seed would change. (0, 1) for
    n = 0. Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.

    Raises:
      UserError: successes outside [0, n], or confidence outside (0, 1).
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise UserError(f'{successes} successes of {n} are not a proportion; give 0 to {n}.')
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p, z2 = successes / n, z * z / n
    center = (p + z2 / 2) / (1 + z2)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean of a few runs and the half-width of Student's t interval about it.

    The half-width is infinite for one value, which says nothing about the next.

    Raises:
      UserError: no values, or confidence outside (0, 1).
    """
    _check_confidence(confidence)
    values = np.asarray(values, np.float64)
    n = values.size
    if n == 0:
        raise UserError('mean_interval got no values; give those of one run at least.')
    if n == 1:
        return float(values[0]), math.inf
    # Of equal values rounding would leave 1e-15.
    deviation = values.std(ddof=1) if np.ptp(values) else 0.0
    return float(values.mean()), _half_width(deviation, n, confidence)


def _half_width(deviation: float, n: int, confidence: float) -> float:
    from scipy.special import stdtrit  # slow to import

    return float(stdtrit(n - 1, (1 + confidence) / 2) * deviation / math.sqrt(n))


def bootstrap_interval(
    columns: np.ndarray | tuple[np.ndarray, ...],
    statistic: Callable[..., float],
    confidence: float = 0.95,
    resamples: int = 1000,
    method: str = 'percentile',
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of any statistic of one run's examples, such as macro F1, by drawing them again.

    Efron and Tibshirani, 1993, An Introduction to the Bootstrap. (-inf, inf) for one example; the
    value twice where every draw gives the same; NaN where the statistic of a draw is NaN. Where BCa
    is undefined it is the percentile interval.

    Args:
      columns: arrays `[N, ...]` of the same examples: one, or a tuple such as (label, predicted) or
        `predictions.Predictions`.
      statistic: of such columns, of any draw of N examples with replacement.
      confidence: in (0, 1).
      resamples: how many draws, at least 2.
      method: 'percentile', or 'BCa' (Efron 1987), which corrects bias and skew and computes the
        statistic N times more.
      seed: of the draws, at least 0.

    Raises:
      UserError: no examples, columns of different lengths or in a list, an unknown method, too few
        resamples, a negative seed, or confidence outside (0, 1).
    """
    _check_confidence(confidence)
    require(method in ('percentile', 'BCa'), 'method', method, "'percentile' or 'BCa'")
    require(resamples >= 2, 'resamples', resamples, 'at least 2')
    require(seed >= 0, 'seed', seed, 'at least 0')
    if isinstance(columns, list):
        raise UserError(
            'bootstrap_interval got a list, which may be one column or several; give an array, or a '
            'tuple of arrays.'
        )
    columns = [np.asarray(x) for x in (columns if isinstance(columns, tuple) else (columns,))]
    n = len(columns[0])
    if not n or any(len(column) != n for column in columns):
        lengths = ', '.join(str(len(column)) for column in columns)
        raise UserError(
            f'bootstrap_interval got columns of {lengths} examples; give as many of each.'
        )
    if n == 1:
        return -math.inf, math.inf
    import scipy.stats  # slow to import

    def draw(method):
        return scipy.stats.bootstrap(
            (np.arange(n),),
            lambda index: statistic(*(column[index] for column in columns)),
            vectorized=False,
            n_resamples=resamples,
            batch=64,  # or all draws are in memory at once
            confidence_level=confidence,
            method=method,
            random_state=np.random.default_rng(seed),
        )

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # BCa of draws that are all alike is NaN
        interval = draw(method).confidence_interval
        if method == 'BCa' and not np.isfinite(interval).all():
            interval = draw('percentile').confidence_interval
    return float(interval.low), float(interval.high)


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> dict[str, float]:
    """Whether two runs differ on the same examples: McNemar's exact test (McNemar 1947).

    Only the examples that one of the two gets right tell: if the runs are as good as each other, each
    of these is as likely to be either's. It holds what the finite test split leaves open.

    Args:
      right_a: bool `[N]`, which examples the first run gets right.
      right_b: bool `[N]`, the second.

    Returns:
      `only_a` and `only_b`, how many only that run gets right, and the two-sided `p_value` (1 where
      there are none).

    Raises:
      UserError: arrays that are not bool `[N]`, or of different lengths.
    """
    a, b = np.asarray(right_a), np.asarray(right_b)
    if a.shape != b.shape or a.ndim != 1 or {a.dtype, b.dtype} != {np.dtype(bool)}:
        raise UserError(
            f'mcnemar got {a.dtype} {a.shape} and {b.dtype} {b.shape}; give bool [N] twice, whether '
            'each run is right on the same examples.'
        )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    from scipy.special import bdtr  # slow to import

    tail = bdtr(min(only_a, only_b), only_a + only_b, 0.5)
    return {'only_a': only_a, 'only_b': only_b, 'p_value': min(1.0, 2 * float(tail))}


def paired_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resolution: float = 0.0
) -> tuple[float, float, float]:
    """How much better the runs `a` are than `b`, seed by seed: Student's paired t.

    Args:
      resolution: the smallest difference that a value can show, 1 / N for accuracies on N images. The
        standard deviation of the differences is taken as at least it: a few may be equal by chance.

    Returns:
      The mean of a - b, the half-width of its interval and the two-sided p-value of no difference.
      One pair says nothing: an infinite half-width, p-value 1. Differences that are all the same,
      without a resolution: half-width 0, p-value 0 (1 where they are 0).

    Raises:
      UserError: no values, different numbers of them, confidence outside (0, 1), or a resolution
        below 0.
    """
    require(resolution >= 0, 'resolution', resolution, 'at least 0')
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UserError(
            f'paired_interval got {a.size} and {b.size} values; give one of each run for every seed.'
        )
    mean, half = mean_interval(a - b, confidence)
    n = a.size
    if n == 1:
        return mean, half, 1.0
    deviation = np.maximum((a - b).std(ddof=1), resolution)
    if deviation == 0:
        return mean, 0.0, float(mean == 0)
    from scipy.special import stdtr  # slow to import

    p = 2 * float(stdtr(n - 1, -abs(mean) * math.sqrt(n) / deviation))
    return mean, _half_width(deviation, n, confidence), p


def _check_confidence(confidence: float):
    if not 0 < confidence < 1:
        raise UserError(f'confidence is {confidence!r}; it must be between 0 and 1, such as 0.95.')
