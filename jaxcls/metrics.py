"""Classification metrics: masked sums on the device, added over batches, divided once on the host.

Padding (mask False) adds nothing, whatever its logits and labels hold.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls.errors import UserError

Sums = dict[str, jax.Array]


def batch_sums(logits: jax.Array, label: jax.Array, loss: jax.Array, mask: jax.Array) -> Sums:
    """Sums over the examples of one batch.

    A label is in the top k if fewer than k classes have a greater logit, or an equal one and a
    smaller index: a model whose logits are all equal is right once in K, not always. An example
    with a logit that is not finite is wrong.

    Args:
      logits: float `[B, K]`.
      label: int32 `[B]`.
      loss: float32 `[B]`, per example.
      mask: bool `[B]`.

    Returns:
      `examples`, `top1`, `top5` (int32 `[]`; top-K where K < 5) and `loss` (float32 `[]`). Over
      5,000 batches (ImageNet's 1.28M images by 256) the float32 sum of losses is off by about 1e-6
      of itself, measured; by 5e-5 when all batches have the same loss.
    """
    rank = _rank(logits, label)
    return {
        'examples': jnp.sum(mask, dtype=jnp.int32),
        'loss': jnp.sum(jnp.where(mask, loss, 0.0), dtype=jnp.float32),
        'top1': jnp.sum((rank < 1) & mask, dtype=jnp.int32),
        'top5': jnp.sum((rank < 5) & mask, dtype=jnp.int32),
    }


def _rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How many classes come before the true one: int32 `[B]`; huge where a logit is not finite."""
    index = jnp.arange(logits.shape[-1], dtype=label.dtype)
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    before = (logits > own) | ((logits == own) & (index < label[:, None]))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), rank, np.iinfo(np.int32).max)


def confusion(logits: jax.Array, label: jax.Array, mask: jax.Array) -> jax.Array:
    """Counts of (true, predicted) classes: `[B, K]`, int32 `[B]`, bool `[B]` -> int32 `[K, K]`.

    The prediction is the greatest logit, the first of equals, as in `batch_sums`. With a logit that
    is not finite it counts as the class after the true one: wrong, and still one of its row.
    """
    classes = logits.shape[-1]
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    predicted = jnp.where(finite, jnp.argmax(logits, axis=-1), (label + 1) % classes)
    counts = jnp.zeros((classes, classes), jnp.int32)
    return counts.at[label, predicted].add(mask.astype(jnp.int32))


def add(first: Sums, second: Sums) -> Sums:
    """The sums of two sets of examples together."""
    return jax.tree.map(jnp.add, first, second)


def summarize(sums: Mapping[str, jax.Array]) -> dict[str, float]:
    """Sums over a whole split to metrics, as Python floats, in float64.

    Returns:
      `examples`, the mean `loss`, `top1` and `top5` in [0, 1]; NaN for all three without examples.
      Where `sums` has a `confusion` matrix, also what scikit-learn gives with `zero_division=0`:
      `balanced_accuracy` (mean recall of the classes that have examples), `precision_macro`,
      `recall_macro`, `f1_macro`, `iou_mean` (Jaccard; means over the classes that are true or
      predicted at least once) and `f1_weighted` (by true examples).
    """
    sums = jax.device_get(dict(sums))
    examples = int(sums['examples'])
    means = {
        k: float(sums[k]) / examples if examples else math.nan for k in ('loss', 'top1', 'top5')
    }
    metrics = {'examples': float(examples), **means}
    if 'confusion' in sums:
        metrics |= _averages(sums['confusion'])
    return metrics


def _averages(matrix: np.ndarray) -> dict[str, float]:
    classes = per_class(matrix)
    support, predicted = classes['support'], classes['predicted']
    seen = support + predicted > 0
    if not seen.any():
        seen = ~seen
    mean = {
        name: float(classes[name][seen].mean()) for name in ('precision', 'recall', 'f1', 'iou')
    }
    return {
        'balanced_accuracy': float(_ratio(classes['recall'].sum(), (support > 0).sum())),
        'precision_macro': mean['precision'],
        'recall_macro': mean['recall'],
        'f1_macro': mean['f1'],
        'f1_weighted': float(_ratio(classes['f1'] @ support, support.sum())),
        'iou_mean': mean['iou'],
    }


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each class out of a confusion matrix `[K, K]`, rows true, columns predicted.

    Returns:
      float64 `[K]`: `precision`, `recall`, `f1` and `iou`, 0 where they divide by 0; int64 `[K]`:
      `support` and `predicted`, how often each class is true and predicted.
    """
    matrix = np.asarray(matrix, np.int64)
    hit, support, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return {
        'precision': _ratio(hit, predicted),
        'recall': _ratio(hit, support),
        'f1': _ratio(2 * hit, support + predicted),
        'iou': _ratio(hit, support + predicted - hit),
        'support': support,
        'predicted': predicted,
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


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
    return min(p, center - half), max(p, center + half)


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
    from scipy.special import stdtrit  # slow to import

    quantile = stdtrit(n - 1, (1 + confidence) / 2)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(n))


def _check_confidence(confidence: float):
    if not 0 < confidence < 1:
        raise UserError(f'confidence is {confidence!r}; it must be between 0 and 1, such as 0.95.')
