"""Classification metrics: masked sums on the device, added over batches, divided once on the host.

Padding (mask False) adds nothing, whatever its logits and labels hold.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Sums = dict[str, jax.Array]

BINS = 15  # of confidence, as Guo et al. take
# The log loss of a probability below float64's epsilon, which scikit-learn clips to it.
LARGEST_LOG_LOSS = -math.log(np.finfo(np.float64).eps)
_EDGES = np.linspace(0, 1, BINS + 1).astype(np.float32)


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


def top_k(logits: jax.Array, label: jax.Array, k: int) -> jax.Array:
    """Whether the label is in the top k, as in `batch_sums`: `[B, K]`, int32 `[B]` -> bool `[B]`."""
    return _rank(logits, label) < k


def calibration_sums(logits: jax.Array, label: jax.Array, mask: jax.Array) -> Sums:
    """Sums over the examples of one batch of what their probabilities, the softmax, are worth.

    The confidence of an example is its greatest probability. It falls in one of 15 equal bins
    (low, high] (Guo et al. 2017, https://arxiv.org/abs/1706.04599). An example with a logit that is
    not finite counts as certain and wrong: confidence 1, Brier score 2, the largest log loss.

    Args:
      logits: float `[B, K]`.
      label: int32 `[B]`.
      mask: bool `[B]`.

    Returns:
      `log_loss` (nats; at most 36.04 an example, scikit-learn's clip), `brier` (squared errors summed
      over the classes, in [0, 2]; Brier 1950), `bin_confidence` `[15]`: float32; `bin_count` and
      `bin_right` `[15]`: int32.
    """
    finite, right = jnp.all(jnp.isfinite(logits), axis=-1), top_k(logits, label, 1)
    logits = jnp.where(finite[:, None], logits, 0).astype(jnp.float32)
    own = jnp.arange(logits.shape[-1]) == label[:, None]
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    log_loss = jnp.minimum(-jnp.sum(jnp.where(own, log_p, 0), axis=-1), LARGEST_LOG_LOSS)
    brier = jnp.sum(jnp.square(p - own), axis=-1)
    confidence = jnp.where(finite, jnp.max(p, axis=-1), 1)[:, None]
    inside = (confidence > _EDGES[:-1]) & (confidence <= _EDGES[1:]) & mask[:, None]
    return {
        'log_loss': jnp.sum(jnp.where(finite, log_loss, LARGEST_LOG_LOSS), where=mask),
        'brier': jnp.sum(jnp.where(finite, brier, 2), where=mask),
        'bin_count': jnp.sum(inside, axis=0, dtype=jnp.int32),
        'bin_right': jnp.sum(inside & right[:, None], axis=0, dtype=jnp.int32),
        'bin_confidence': jnp.sum(jnp.where(inside, confidence, 0), axis=0),
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
      `examples` and, of those in `sums`, the means `loss`, `top1`, `top5` in [0, 1], `log_loss` and
      `brier` (scikit-learn's with `scale_by_half=False`). With the bins of
      `calibration_sums` also `ece`, the expected calibration error: the mean over the examples of
      |accuracy - mean confidence| of their bin. With a `confusion` matrix also what scikit-learn
      gives with `zero_division=0`: `balanced_accuracy` (mean recall of the classes that have
      examples); `precision_`, `recall_` and `f1_` with `macro` (mean over the classes that are true
      or predicted at least once), `weighted` (by true examples) and `micro` (all three are top1);
      `iou_mean` (Jaccard, macro); `kappa` (Cohen's; NaN where one class is all that is true and
      predicted) and `matthews` (0 where only one class is true, or only one predicted). Without
      examples all are NaN but `examples`.
    """
    sums = jax.device_get(dict(sums))
    examples = int(sums['examples'])
    metrics = {'examples': float(examples)}
    for name in ('loss', 'top1', 'top5', 'log_loss', 'brier'):
        if name in sums:
            metrics[name] = float(sums[name]) / examples if examples else math.nan
    if 'bin_count' in sums:
        gaps = np.abs(np.float64(sums['bin_right']) - np.float64(sums['bin_confidence']))
        metrics['ece'] = float(gaps.sum()) / examples if examples else math.nan
    if 'confusion' in sums:
        metrics |= _averages(sums['confusion'])
    return metrics


def reliability(sums: Mapping[str, jax.Array]) -> list[dict[str, float | int | None]]:
    """The bins of `calibration_sums` as rows of a reliability diagram.

    Returns:
      15 of `{'low', 'high', 'count', 'confidence', 'accuracy'}`: the bin (low, high], its examples,
      their mean confidence and accuracy (None where there are none).
    """
    columns = ('bin_count', 'bin_confidence', 'bin_right')
    rows = zip(*(np.asarray(jax.device_get(sums[name])) for name in columns), strict=True)
    return [
        {
            'low': i / BINS,
            'high': (i + 1) / BINS,
            'count': int(count),
            'confidence': float(confidence) / int(count) if count else None,
            'accuracy': int(right) / int(count) if count else None,
        }
        for i, (count, confidence, right) in enumerate(rows)
    ]


def _averages(matrix: np.ndarray) -> dict[str, float]:
    classes = per_class(matrix)
    support, predicted = classes['support'], classes['predicted']
    seen = (support + predicted > 0).sum()  # each of the others has 0 in all of them
    means = {'balanced_accuracy': _ratio(classes['recall'].sum(), (support > 0).sum())}
    for name in ('precision', 'recall', 'f1'):
        means |= {
            f'{name}_macro': _ratio(classes[name].sum(), seen),
            f'{name}_micro': _ratio(np.trace(matrix), support.sum()),
            f'{name}_weighted': _ratio(classes[name] @ support, support.sum()),
        }
    means |= {'iou_mean': _ratio(classes['iou'].sum(), seen), **_agreement(matrix)}
    return {name: float(mean) if support.any() else math.nan for name, mean in means.items()}


def _agreement(matrix: np.ndarray) -> dict[str, float]:
    """Cohen's kappa (Cohen 1960) and the correlation of true and predicted (Gorodkin 2004)."""
    matrix = np.asarray(matrix, np.int64)
    support, predicted, n = matrix.sum(1), matrix.sum(0), int(matrix.sum())
    above = int(np.trace(matrix)) * n - int(support @ predicted)
    room = n * n - int(support @ predicted)
    spread = math.sqrt(n * n - int(support @ support)) * math.sqrt(
        n * n - int(predicted @ predicted)
    )
    return {
        'kappa': above / room if room else math.nan,
        'matthews': above / spread if spread else 0.0,
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
