"""Losses: float32 logits `[B, K]` and soft targets `[B, K]` to one value an example `[B]`.

Targets are probabilities (non-negative, each row sums to 1), so that mixup, label smoothing and
one-hot labels are one thing.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from jaxcls import registry
from jaxcls.errors import UserError


def cross_entropy(
    logits: jax.Array, target: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropy, in nats: `[B, K]`, `[B, K]` -> float32 `[B]`.

    Args:
      label_smoothing: the share of the target spread evenly over the K classes, in [0, 1)
        (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567).
    """
    return optax.safe_softmax_cross_entropy(logits, optax.smooth_labels(target, label_smoothing))


def focal(
    logits: jax.Array, target: jax.Array, *, gamma: float = 2.0, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax focal loss, in nats: `sum_k target_k (1 - p_k)^gamma (-log p_k)`, float32 `[B]`.

    Lin et al., 2017, https://arxiv.org/abs/1708.02002, for one of K classes and soft targets.

    Args:
      gamma: at least 0; how much less an example counts that is already right. 0 is cross-entropy.
      label_smoothing: as in `cross_entropy`.
    """
    target = optax.smooth_labels(target, label_smoothing)
    # The floor keeps the gradient of the power finite where p rounds to 1 and gamma is below 1.
    wrong = jnp.maximum(-jnp.expm1(jax.nn.log_softmax(logits)), jnp.finfo(logits.dtype).tiny)
    return optax.safe_softmax_cross_entropy(logits, target * wrong**gamma)


def sigmoid_cross_entropy(
    logits: jax.Array, target: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Binary cross-entropy of every class against the rest, in nats, summed over classes: `[B]`.

    Summed, not averaged, as in Beyer et al., 2020, https://arxiv.org/abs/2006.07159: it is K times
    the loss of recipes that average (Wightman et al., 2021): their rates do not carry over.

    Args:
      label_smoothing: as in `cross_entropy`.
    """
    target = optax.smooth_labels(target, label_smoothing)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, target), axis=-1)


LOSSES = {
    'cross_entropy': cross_entropy,
    'focal': focal,
    'sigmoid_cross_entropy': sigmoid_cross_entropy,
}

# Every argument that a config may set: its lowest value, the value it stays below.
_RANGES = {'label_smoothing': (0.0, 1.0), 'gamma': (0.0, math.inf)}


def make_loss(*, name: str, **kwargs) -> functools.partial:
    """`loss(logits, target) -> [B]` by name, its arguments checked.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    loss = registry.bind(LOSSES, 'loss', name=name, **kwargs)
    for field, value in kwargs.items():
        low, high = _RANGES[field]
        if not low <= value < high:
            below = 'finite' if high == math.inf else f'below {high}'
            raise UserError(f'loss.{field} is {value!r}; it must be at least {low} and {below}.')
    return loss


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of `values` `[B]` where `mask` `[B]` is True: float32 `[]`, 0 where none is."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1)
