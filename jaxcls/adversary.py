"""Adversarial training: what becomes of a batch before a step, and of its loss.

An adversary attacks the augmented images, float in [0, 1] before normalisation, with the current
parameters. The network is in evaluation mode meanwhile: running statistics in its norms and no
dropout, so that what an example becomes depends on nothing else in the batch, and the attack leaves no
trace in the statistics. It costs about as many passes as the attack has steps.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcls import attacks, losses, registry
from jaxcls.errors import require

Batch = dict[str, Array]


class Adversary(NamedTuple):
    """What a form of adversarial training does.

    Attributes:
      attack: `(key, logits, loss, batch) -> batch`, where `logits(image) -> [B, K]` is the network
        of float images in [0, 1], and `loss(logits, target) -> [B]`. It replaces `image`, or adds
        `adversarial`.
      penalty: of `steps.make_objective`; None for none.
    """

    attack: Callable[[Array, attacks.Logits, Callable, Batch], Batch]
    penalty: Callable | None = None


def make_adversary(*, name: str, **kwargs) -> Adversary | None:
    """The adversary that `config.adversary` names; None for 'none', and where epsilon is 0.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    return registry.bind(ADVERSARIES, 'adversary', name=name, **kwargs)()


def make_parts(
    section: Mapping[str, Any], forward: Callable[[Any, Array], Any], loss: Callable
) -> tuple[Callable[[Array, Batch, Any], Batch] | None, Callable | None]:
    """What `steps.make_prepare` and `steps.make_objective` take: None twice for plain training.

    Args:
      section: `config.adversary`.
      forward: `(variables, image) -> (logits, features)` of float images in [0, 1].
      loss: `(logits, target) -> [B]`.

    Returns:
      `attack(key, batch, state) -> batch` and `penalty`.

    Raises:
      UserError: as `make_adversary`.
    """
    adversary = make_adversary(**section)
    if adversary is None:
        return None, None

    def attack(key, batch, state):
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return adversary.attack(key, lambda x: forward(variables, x)[0], loss, batch)

    return attack, adversary.penalty


def _nothing() -> None:
    """Plain training."""


def fgsm(
    *, epsilon: float = 8 / 255, step_size: float = 0.0, norm: str = 'linf'
) -> Adversary | None:
    """Training on one step of the gradient's sign from a random start, which is cheap.

    Wong et al. 2020, https://arxiv.org/abs/2001.03994. Watch the accuracy against PGD, which the
    training loss does not show: after 3 epochs of 20,000 images of MNIST at epsilon 0.3, 71% resist
    FGSM and 8% PGD.

    Args:
      epsilon: how far an image is moved at most, in units of [0, 1]; 0 is plain training.
      step_size: 0 is 1.25 epsilon, the paper's.
      norm: 'linf' or 'l2'.

    Raises:
      UserError: a value out of its range.
    """
    return pgd(epsilon=epsilon, step_size=step_size or 1.25 * epsilon, steps=1, norm=norm)


def pgd(
    *, epsilon: float = 8 / 255, step_size: float = 0.0, steps: int = 10, norm: str = 'linf'
) -> Adversary | None:
    """Training on adversarial images in place of the clean ones, which it never sees.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083: projected gradient ascent on the run's own
    loss from a random start. Training metrics are of the adversarial images.

    Args:
      epsilon: how far an image is moved at most, in units of [0, 1]; 0 is plain training.
      step_size: 0 is 2.5 epsilon / steps.
      steps: of the attack, at least 1.
      norm: 'linf' or 'l2'.

    Raises:
      UserError: a value out of its range.
    """
    step_size = _checked(epsilon, step_size, steps, norm)

    def attack(key, logits, loss, batch):
        image = batch['image']
        first = attacks.random_point(_keys(key, image), image, epsilon, norm)
        found = attacks.climb(
            lambda x: loss(logits(x), batch['target']),
            first, image, epsilon, step_size, steps, norm,
        )  # fmt: skip
        return {**batch, 'image': found}

    return Adversary(attack) if epsilon else None


def trades(
    *,
    epsilon: float = 8 / 255,
    step_size: float = 0.0,
    steps: int = 10,
    norm: str = 'linf',
    beta: float = 6.0,
) -> Adversary | None:
    """The loss of the clean images, plus beta times how far adversarial ones change the prediction.

    TRADES, Zhang et al. 2019, https://arxiv.org/abs/1901.08573: the attack maximises, and the loss
    holds, KL(p(clean) || p(adversarial)). It starts near the image, where that is flat. Training
    metrics are of the clean images. Norms see both batches, one after the other, as in the authors'
    code. Several passes: it costs two more than 'pgd'.

    Args:
      epsilon: how far an image is moved at most, in units of [0, 1]; 0 is plain training.
      step_size: 0 is 2.5 epsilon / steps.
      steps: of the attack, at least 1.
      norm: 'linf' or 'l2'.
      beta: at least 0, what robustness counts against accuracy; 0 is plain training.

    Raises:
      UserError: a value out of its range.
    """
    step_size = _checked(epsilon, step_size, steps, norm)
    require(0 <= beta < math.inf, 'config.adversary.beta', beta, 'at least 0 and finite')

    def attack(key, logits, loss, batch):
        image = batch['image']
        clean = jax.lax.stop_gradient(logits(image))
        noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(_keys(key, image))
        first = attacks.project(image + 1e-3 * noise, image, epsilon, norm)
        found = attacks.climb(
            lambda x: losses.divergence(clean, logits(x)),
            first,
            image,
            epsilon,
            step_size,
            steps,
            norm,
        )
        return {**batch, 'adversarial': found}

    def penalty(apply, logits, batch_stats, batch):
        (found, _), updates = apply(batch['adversarial'], batch_stats)
        return beta * losses.divergence(logits, found), updates.get('batch_stats', {})

    return Adversary(attack, penalty) if epsilon and beta else None


def _keys(key: Array, image: Array) -> Array:
    return attacks.example_keys(key, jnp.arange(len(image)))


def _checked(epsilon: float, step_size: float, steps: int, norm: str) -> float:
    """The step size, once all are found to be in their ranges."""
    for field, value in (('epsilon', epsilon), ('step_size', step_size)):
        require(0 <= value < math.inf, f'config.adversary.{field}', value, 'at least 0 and finite')
    require(steps >= 1, 'config.adversary.steps', steps, 'at least 1')
    require(norm in attacks.NORMS, 'config.adversary.norm', norm, ' or '.join(attacks.NORMS))
    if norm == 'linf':
        require(
            epsilon <= 1, 'config.adversary.epsilon', epsilon, 'at most 1: images are in [0, 1]'
        )
    return step_size or 2.5 * epsilon / steps


ADVERSARIES: dict[str, Callable[..., Adversary | None]] = {
    'none': _nothing,
    'fgsm': fgsm,
    'pgd': pgd,
    'trades': trades,
}
