"""Learning from a trained network: its soft answers, or what it finds alike (`config.teacher`).

A `Lesson` is two pure functions: what of the teacher's outputs goes into the batch, and what becomes of
the loss. The teacher sees the augmented image, in evaluation mode; its variables are arrays of the feed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcls import losses, registry
from jaxcls.errors import UserError, require

Batch = dict[str, Any]


class Teacher(NamedTuple):
    """A trained network.

    Attributes:
      forward: `(variables, image) -> (logits, features)` of float images [B, H, W, C] in [0, 1].
      variables: arrays.
    """

    forward: Callable
    variables: Any


class Lesson(NamedTuple):
    """What a student takes from its teacher.

    Attributes:
      read: `(logits, features) -> {name: [B, ...]}` of the teacher, for the batch.
      blend: `(values, logits, features, batch) -> [B]`: the loss of the examples, from the plain one
        and the student's outputs.
    """

    read: Callable
    blend: Callable


def logits(
    *, workdir: str = '', checkpoint: str = 'latest', temperature: float = 4.0, alpha: float = 0.9
) -> Lesson | None:
    """`alpha T^2 KL(teacher || student)` at temperature T, and `1 - alpha` of the loss (Hinton 2015).

    https://arxiv.org/abs/1503.02531.

    Args:
      workdir, checkpoint: the teacher's run, and 'latest', 'best' or a step.
      temperature: more than 0.
      alpha: in [0, 1]. 0 is off.
    """
    del workdir, checkpoint
    losses.check_distillation(temperature, alpha, 'config.teacher.')
    if not alpha:
        return None

    def blend(values, logits, _features, batch):
        theirs = batch['teacher_logits']
        return losses.distillation(logits, theirs, values, temperature=temperature, alpha=alpha)

    return Lesson(lambda logits, _features: {'teacher_logits': logits}, blend)


def features(
    *,
    workdir: str = '',
    checkpoint: str = 'latest',
    feature: str = 'pooled',
    teacher_feature: str = 'pooled',
    weight: float = 1000.0,
    temperature: float = 4.0,
    alpha: float = 0.0,
) -> Lesson | None:
    """`logits`, plus: which examples of a batch are alike shall be alike (Tung & Mori 2019).

    https://arxiv.org/abs/1907.09682: `similarity_loss` of the two networks' features. It needs no map
    between them, so that their widths may differ.

    Args:
      feature, teacher_feature: names in the `features` of the student and of the teacher.
      weight: at least 0; the paper's gamma, 3000 on CIFAR-10. 0 leaves `logits` alone.
      alpha: as in `logits`, here 0: the features alone.
    """
    require(0 <= weight < math.inf, 'config.teacher.weight', weight, 'at least 0 and finite')
    soft = logits(temperature=temperature, alpha=alpha)
    if not weight:
        return soft

    def read(logits, features):
        found = _named(features, teacher_feature, 'teacher_feature')
        return {'teacher_features': found, **(soft.read(logits, features) if soft else {})}

    def blend(values, logits, features, batch):
        if soft:
            values = soft.blend(values, logits, features, batch)
        ours = _named(features, feature, 'feature')
        return values + weight * similarity_loss(ours, batch['teacher_features'], batch['mask'])

    return Lesson(read, blend)


TEACHERS = {'none': lambda: None, 'logits': logits, 'features': features}


def make_lesson(*, name: str, **kwargs) -> Lesson | None:
    """The lesson by name; None for 'none' and for one that leaves the loss as it is.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    return registry.bind(TEACHERS, 'teacher', name=name, **kwargs)()


def teach(lesson: Lesson, teacher: Teacher, before: Callable | None = None) -> Callable:
    """`(key, batch, state) -> batch` of augmented images: the teacher's outputs in place of the teacher.

    Args:
      before: one like it, which changes the images.
    """

    def taught(key, batch, state):
        batch = dict(batch)
        variables = batch.pop('teacher')
        if before:
            batch = before(key, batch, state)
        return {**batch, **lesson.read(*teacher.forward(variables, batch['image']))}

    return taught


def similarity_loss(features: jax.Array, theirs: jax.Array, mask: jax.Array) -> jax.Array:
    """`|G - G'|^2 / b`, G the products of all pairs of examples: [B, ...], [B, ...], [B] -> float32 [B].

    G has rows of length 1. Row i is example i's part: their mean over the batch is the paper's loss,
    `|G - G'|_F^2 / b^2`. Examples that the mask leaves out are nobody's pair.
    """
    difference = _similarity(features, mask) - _similarity(theirs, mask)
    return jnp.sum(difference**2, axis=1) / jnp.maximum(mask.sum(), 1)


def _similarity(features: jax.Array, mask: jax.Array) -> jax.Array:
    rows = features.reshape(features.shape[0], -1).astype(jnp.float32) * mask[:, None]
    products = rows @ rows.T
    # Not the norm, whose gradient at 0 is NaN: an example without any feature has none.
    square = jnp.sum(products**2, axis=1, keepdims=True)
    return products * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _named(features: dict[str, jax.Array], name: str, field: str) -> jax.Array:
    return registry.lookup(features, name, f'config.teacher.{field}')


def check_pupil(ours: tuple, theirs: tuple, workdir: str):
    """Raises UserError unless the (image shape, class names) of student and teacher are the same."""
    for what, a, b in zip(('images', 'classes'), ours, theirs, strict=True):
        if tuple(a) != tuple(b):
            raise UserError(
                f'The teacher {workdir} has {what} {_few(b)} and this config {_few(a)}. Train a teacher '
                'on the same data set, classes and image size.'
            )


def _few(items) -> str:
    return f'{", ".join(map(str, items[:5]))}{", ..." if len(items) > 5 else ""}'
