"""Losses: float32 logits `[B, K]` and soft targets `[B, K]` to one value an example `[B]`.

Targets are probabilities (non-negative, each row sums to 1), so that mixup, label smoothing and
one-hot labels are one thing. Every loss takes `label_smoothing`, the share of the target spread evenly
over the K classes, in [0, 1) (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcls import registry
from jaxcls.errors import UserError, require


def cross_entropy(
    logits: jax.Array,
    target: jax.Array,
    *,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
    balance: str = 'none',
    beta: float = 0.999,
    class_counts: Sequence[int] | None = None,
) -> jax.Array:
    """Softmax cross-entropy, in nats: `sum_k w_k target_k (-log p_k)`, float32 `[B]`.

    Its mean over a batch divides by the number of examples, as PyTorch's does for soft labels. For
    integer labels PyTorch's divides by the sum of the labels' weights instead.

    Args:
      class_weights: one a class, each at least 0 and finite, not all 0; () is 1 for all.
      balance: weights from the classes' frequencies, as in `balanced_weights`: 'inverse' or
        'effective'; 'none' is 1 for all. They multiply `class_weights`.
      beta: of 'effective', in [0, 1).
      class_counts: training examples of each class; `balance` needs them.

    Raises:
      UserError: other than K weights or counts, or `balance` without counts.
    """
    target = optax.smooth_labels(target, label_smoothing)
    target = _weighted(target, class_weights, balance, beta, class_counts)
    return optax.safe_softmax_cross_entropy(logits, target)


def focal(
    logits: jax.Array,
    target: jax.Array,
    *,
    gamma: float = 2.0,
    alpha: tuple[float, ...] = (),
    label_smoothing: float = 0.0,
    balance: str = 'none',
    beta: float = 0.999,
    class_counts: Sequence[int] | None = None,
) -> jax.Array:
    """Softmax focal loss: `sum_k alpha_k target_k (1 - p_k)^gamma (-log p_k)`, float32 `[B]`.

    Lin et al., 2017, https://arxiv.org/abs/1708.02002, for one of K classes and soft targets.

    Args:
      gamma: at least 0; how much less an example counts that is already right. 0 is cross-entropy.
      alpha: the `class_weights` of `cross_entropy`, which has the other arguments, and errors, too.
    """
    target = optax.smooth_labels(target, label_smoothing)
    target = _weighted(target, alpha, balance, beta, class_counts)
    # The floor keeps the gradient of the power finite where p rounds to 1 and gamma is below 1.
    wrong = jnp.maximum(-jnp.expm1(jax.nn.log_softmax(logits)), jnp.finfo(logits.dtype).tiny)
    return optax.safe_softmax_cross_entropy(logits, target * wrong**gamma)


def poly(
    logits: jax.Array, target: jax.Array, *, epsilon: float = 2.0, label_smoothing: float = 0.0
) -> jax.Array:
    """Poly-1 loss: cross-entropy plus `epsilon (1 - sum_k target_k p_k)`, float32 `[B]`.

    Leng et al., 2022, https://arxiv.org/abs/2204.12511.

    Args:
      epsilon: at least -1; what the first term of the expansion of -log p in powers of 1 - p counts
        more. 0 is cross-entropy, 2 the paper's choice for ImageNet.
    """
    target = optax.smooth_labels(target, label_smoothing)
    wrong = 1 - jnp.sum(target * jax.nn.softmax(logits), axis=-1)
    return optax.safe_softmax_cross_entropy(logits, target) + epsilon * wrong


def complement_cross_entropy(
    logits: jax.Array,
    target: jax.Array,
    *,
    complement_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Cross-entropy less the entropy of the wrong classes' probabilities, divided by K - 1: `[B]`.

    Kim et al., 2021, https://arxiv.org/abs/2009.02189: it evens out what the classes other than the
    right one (of a soft target: the likeliest one) get, and may fall below 0.

    Args:
      complement_weight: at least 0, of the entropy; the paper's is -gamma = 1. 0 is cross-entropy.
    """
    classes = target.shape[-1]
    right = jax.nn.one_hot(jnp.argmax(target, axis=-1), classes, dtype=bool)
    # Not -inf: the gradient would have 0 * inf.
    others = jnp.where(right, jnp.finfo(logits.dtype).min, logits)
    entropy = optax.safe_softmax_cross_entropy(others, jax.nn.softmax(others))
    plain = cross_entropy(logits, target, label_smoothing=label_smoothing)
    return plain - complement_weight / max(classes - 1, 1) * entropy


def sigmoid_cross_entropy(
    logits: jax.Array, target: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Binary cross-entropy of every class against the rest, in nats, summed over classes: `[B]`.

    Summed, not averaged, as in Beyer et al., 2020, https://arxiv.org/abs/2006.07159: it is K times
    the loss of recipes that average (Wightman et al., 2021): their rates do not carry over.
    """
    target = optax.smooth_labels(target, label_smoothing)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, target), axis=-1)


def mse(
    logits: jax.Array,
    target: jax.Array,
    *,
    target_weight: float = 1.0,
    target_value: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Squared error between the logits themselves and the target, mean over classes: `[B]`.

    Hui and Belkin, 2020, https://arxiv.org/abs/2006.07322: `mean_k (1 + (target_weight - 1)
    target_k) (logit_k - target_value target_k)^2`. Logits are not log probabilities then: their
    largest says the class, and metrics that read probabilities off them mean little.

    Args:
      target_weight: at least 1; the paper's k, how much the right class counts against each other
        one. The paper raises both arguments where there are many classes.
      target_value: at least 1; the paper's M, the logit of the right class.
    """
    target = optax.smooth_labels(target, label_smoothing)
    weight = 1 + (target_weight - 1) * target
    return jnp.mean(weight * (logits - target_value * target) ** 2, axis=-1)


def brier(logits: jax.Array, target: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Squared error between softmax probabilities and the target, summed over classes: `[B]`.

    In [0, 2] (Brier, 1950).
    """
    target = optax.smooth_labels(target, label_smoothing)
    return jnp.sum((jax.nn.softmax(logits) - target) ** 2, axis=-1)


def distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    values: jax.Array,
    *,
    temperature: float,
    alpha: float,
) -> jax.Array:
    """`alpha T^2 KL(teacher || student)` at temperature T, plus `1 - alpha` of the plain loss: `[B]`.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531. Both logits are `[B, K]`; the teacher gets no
    gradient. T^2 keeps the gradient's size the same at every temperature.

    Args:
      values: the plain loss of each example, `[B]`; the paper's is cross-entropy.
      temperature: T, more than 0 and finite; both logits are divided by it.
      alpha: the teacher's share, in [0, 1]. 0 is the plain loss.

    Raises:
      UserError: a value out of its range.
    """
    check_distillation(temperature, alpha)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    soft = divergence(teacher_logits / temperature, logits / temperature)
    return alpha * temperature**2 * soft + (1 - alpha) * values


def check_distillation(temperature: float, alpha: float, section: str = ''):
    """Raises UserError where they are out of their ranges; `section` names them, such as 'config.x.'."""
    fine = 0 < temperature < math.inf
    require(fine, f'{section}temperature', temperature, 'more than 0 and finite')
    require(0 <= alpha <= 1, f'{section}alpha', alpha, 'at least 0 and at most 1')


def divergence(logits: jax.Array, others: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(others)) in nats: `[B, K]` twice to float32 `[B]`."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, others))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


LOSSES = {
    'cross_entropy': cross_entropy,
    'focal': focal,
    'poly': poly,
    'complement_cross_entropy': complement_cross_entropy,
    'sigmoid_cross_entropy': sigmoid_cross_entropy,
    'mse': mse,
    'brier': brier,
}

# The number of examples that n count for; a class weighs one over that.
BALANCES = {
    'none': lambda n, _: np.ones_like(n),
    'inverse': lambda n, _: n,
    'effective': lambda n, beta: 1 - beta**n,
}

# Every number that a config may set, alone or in a tuple: its lowest value, the value it stays below.
_RANGES = {
    'label_smoothing': (0.0, 1.0),
    'class_weights': (0.0, math.inf),
    'alpha': (0.0, math.inf),
    'beta': (0.0, 1.0),
    'gamma': (0.0, math.inf),
    'epsilon': (-1.0, math.inf),
    'complement_weight': (0.0, math.inf),
    'target_weight': (1.0, math.inf),
    'target_value': (1.0, math.inf),
}


def balanced_weights(
    class_counts: Sequence[int] | None, balance: str, beta: float = 0.999
) -> tuple[float, ...]:
    """One weight a class, so that the rare count more; their mean over the training examples is 1.

    Args:
      class_counts: training examples of each class. A class without any has weight 0.
      balance: 'inverse', `n / (K n_k)` as scikit-learn's 'balanced', K the classes with examples; or
        'effective', in proportion to `1 / (1 - beta^n_k)` (Cui et al., 2019,
        https://arxiv.org/abs/1901.05555, who scale the sum over classes to K instead); or 'none'.
      beta: in [0, 1): 0 weighs all classes alike, near 1 is 'inverse'.

    Raises:
      UserError: unknown balance, no counts, or counts that are negative or all 0.
    """
    number = registry.lookup(BALANCES, balance, 'loss.balance')
    if class_counts is None:
        raise UserError(
            f'loss.balance={balance!r} needs the number of training examples of each class, and there '
            "is no training split to count; set loss.balance='none', or give weights."
        )
    counts = np.asarray(class_counts, np.float64)
    fit = counts.ndim == 1 and (np.isfinite(counts) & (counts >= 0)).all() and counts.any()
    require(fit, 'class_counts', class_counts, 'one a class, each at least 0, not all of them 0')
    weights = np.divide(1, number(counts, beta), out=np.zeros_like(counts), where=counts > 0)
    return tuple((weights * (counts.sum() / (weights @ counts))).tolist())


def _weighted(target, class_weights, balance, beta, class_counts) -> jax.Array:
    """The target, each class times its weights, where there are any."""
    balanced = () if balance == 'none' else balanced_weights(class_counts, balance, beta)
    for weights in filter(len, (class_weights, balanced)):
        if len(weights) != target.shape[-1]:
            raise UserError(
                f'The loss has {len(weights)} class weights or counts and the data have '
                f'{target.shape[-1]} classes; give one a class.'
            )
        target = target * jnp.asarray(weights, target.dtype)
    return target


def needs_counts(**config) -> bool:
    """Whether the loss of these arguments of `make_loss` needs `class_counts` to be called."""
    return config.get('balance', 'none') != 'none'


def make_loss(*, name: str, class_counts: Sequence[int] | None = None, **kwargs) -> Callable:
    """`loss(logits, target) -> [B]` by name, its arguments checked.

    Args:
      class_counts: training examples of each class. A loss that `needs_counts` and is made without
        them raises a UserError when it is called or traced; others ignore them.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    loss = registry.bind(LOSSES, 'loss', name=name, **kwargs)
    registry.lookup(BALANCES, kwargs.get('balance', 'none'), 'loss.balance')
    for field, value in kwargs.items():
        if field in _RANGES:
            _check_range(field, value)
    return functools.partial(loss, class_counts=class_counts) if needs_counts(**kwargs) else loss


def _check_range(field: str, value: float | tuple[float, ...]):
    low, high = _RANGES[field]
    values = value if isinstance(value, (tuple, list)) else (value,)
    fits = all(isinstance(v, (int, float)) and low <= v < high for v in values)
    below = 'finite' if high == math.inf else f'below {high:g}'
    require(fits, f'loss.{field}', value, f'at least {low:g} and {below}')
    if isinstance(value, (tuple, list)):
        require(not values or any(values), f'loss.{field}', value, 'above 0 for some class')


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of `values` `[B]` where `mask` `[B]` is True: float32 `[]`, 0 where none is."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1)
