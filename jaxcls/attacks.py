"""Adversarial examples: images a little changed, so that a classifier errs (Goodfellow et al. 2014).

Images are float32 [B, H, W, C] in [0, 1], before normalisation, and so is what an attack makes of
them; `epsilon`, how far it may go from the image, is in the same units: 8/255 is eight of 256 levels.
The norm is 'linf', the largest change of a pixel, or 'l2', the Euclidean length of the change. A
network is a closure `logits(image) -> [B, K]` that treats every example alone, as one does in
evaluation mode; every example has its own key: so neither the rest of a batch nor its padding has a say.
Epsilon 0 returns the image itself.

`fgsm` and `pgd` follow the gradient of the cross-entropy, of which float32 leaves nothing where a network is
very sure of itself (Carlini & Wagner 2017): what they do not break there is not robust for that. `square`
asks for no gradient.

An attack is a pure step, to be repeated. `run` does so under `jit`; a caller that compiles the step
alone may repeat it on the host, which on CPU is faster: XLA's convolutions are slow inside a loop.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random

from jaxcls.errors import UserError, require

Logits = Callable[[Array], Array]

NORMS = ('linf', 'l2')
_TINY = 1e-12


class State(NamedTuple):
    """Where an attack on a batch is.

    Attributes:
      step: int32 [], how many were taken.
      keys: typed [B], one an example.
      image: [B, H, W, C], unchanged.
      label: int32 [B].
      epsilon: float32 [].
      current: [B, H, W, C], where the search is.
      best: [B, H, W, C], of all images that were tried, the one with the largest margin.
      margin: float32 [B], its; see `margin`. The example is misclassified where it is at least 0.
    """

    step: Array
    keys: Array
    image: Array
    label: Array
    epsilon: Array
    current: Array
    best: Array
    margin: Array


class Attack(NamedTuple):
    """An attack: `step(logits, state) -> state`, to be taken `steps` times from `start`."""

    step: Callable[[Logits, State], State]
    steps: int


def example_keys(key: Array, index: Array) -> Array:
    """One key an example, by its place in the data: int32 [B] to typed keys [B]."""
    return jax.vmap(random.fold_in, (None, 0))(key, index)


def start(keys: Array, image: Array, label: Array, epsilon: Array | float) -> State:
    """The state before the first step of any attack."""
    image = jnp.asarray(image, jnp.float32)
    worst = jnp.full(len(image), -jnp.inf, jnp.float32)
    epsilon = jnp.asarray(epsilon, jnp.float32)
    return State(jnp.int32(0), keys, image, jnp.asarray(label), epsilon, image, image, worst)


def run(
    attack: Attack, logits: Logits, keys: Array, image: Array, label: Array, epsilon: Array | float
) -> State:
    """All steps of an attack: its last state, whose `best` is the adversarial image."""
    first = start(keys, image, label, epsilon)
    return _repeat(attack.steps, lambda state: attack.step(logits, state), first)


def _repeat(count: int, body: Callable[[Any], Any], value: Any) -> Any:
    # On CPU, XLA's convolutions are slow inside a loop.
    unroll = max(count, 1) if jax.default_backend() == 'cpu' else 1
    return lax.scan(lambda x, _: (body(x), None), value, length=count, unroll=unroll)[0]


def margin(logits: Array, label: Array) -> Array:
    """The largest logit of another class less that of the label: [B, K], int32 [B] to float32 [B].

    Negative where the label wins; a tie counts against it. Infinite where a logit is not finite, which
    counts as an error everywhere.
    """
    logits = logits.astype(jnp.float32)
    own = jnp.arange(logits.shape[-1]) == label[:, None]
    right = jnp.sum(jnp.where(own, logits, 0), axis=-1)
    other = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.where(finite, other - right, jnp.inf)


def project(moved: Array, image: Array, epsilon: Array | float, norm: str) -> Array:
    """What is within epsilon of the image and in [0, 1]: the nearest such for 'linf'.

    For 'l2' the change is first shortened to epsilon, and then clipped, which shortens it further.
    """
    change = moved - image
    if norm == 'linf':
        change = jnp.clip(change, -epsilon, epsilon)
    else:
        change = change * jnp.minimum(1.0, epsilon / jnp.maximum(_length(change), _TINY))
    return jnp.clip(image + change, 0.0, 1.0)


def random_point(keys: Array, image: Array, epsilon: Array | float, norm: str) -> Array:
    """A point drawn evenly from the ball of epsilon around each image, and clipped to [0, 1]."""
    if norm == 'linf':
        change = _draw(keys, lambda key: random.uniform(key, image.shape[1:], minval=-1, maxval=1))
    else:
        dimensions = math.prod(image.shape[1:])
        parts = jax.vmap(random.split)(keys)
        change = _draw(parts[:, 0], lambda key: random.normal(key, image.shape[1:]))
        radius = _draw(parts[:, 1], lambda key: random.uniform(key, (1, 1, 1))) ** (1 / dimensions)
        change = change / jnp.maximum(_length(change), _TINY) * radius
    return project(image + epsilon * change, image, epsilon, norm)


def direction(gradient: Array, norm: str) -> Array:
    """The steepest ascent of length 1: the sign of the gradient for 'linf', the unit vector for 'l2'."""
    if norm == 'linf':
        return jnp.sign(gradient)
    return gradient / jnp.maximum(_length(gradient), _TINY)


def climb(
    loss: Callable[[Array], Array],
    first: Array,
    image: Array,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: str,
) -> Array:
    """The last point of projected gradient ascent on `loss(image) -> [B]` from `first`.

    What adversarial training wants: unlike in `pgd`, nothing is compared, and there are no restarts.
    """

    def move(current):
        gradient = jax.grad(lambda x: jnp.sum(loss(x)))(current)
        return project(current + step_size * direction(gradient, norm), image, epsilon, norm)

    return _repeat(steps, move, first)


def _length(change: Array) -> Array:
    """Euclidean, of each example: [B, 1, 1, 1]."""
    return jnp.sqrt(jnp.sum(change**2, axis=(1, 2, 3), keepdims=True))


def _draw(keys: Array, draw: Callable[[Array], Array]) -> Array:
    return jax.vmap(draw)(keys)


def _where(chosen: Array, new: Array, old: Array) -> Array:
    return jnp.where(chosen.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)


def _keep_worst(state: State, tried: Array, found: Array) -> State:
    better = found > state.margin
    return state._replace(
        best=_where(better, tried, state.best), margin=jnp.maximum(found, state.margin)
    )


def fgsm(*, norm: str = 'linf') -> Attack:
    """One step as long as epsilon along the gradient of the cross-entropy, or its sign.

    Goodfellow et al. 2014, https://arxiv.org/abs/1412.6572.

    Args:
      norm: 'linf', the fast gradient sign method; or 'l2', the fast gradient method.

    Raises:
      UserError: another norm.
    """
    return pgd(norm=norm, steps=1, relative_step=1.0, random_start=False)


def pgd(
    *,
    norm: str = 'linf',
    steps: int = 40,
    restarts: int = 1,
    relative_step: float = 0.0,
    random_start: bool = True,
) -> Attack:
    """Projected gradient ascent on the cross-entropy from random starts.

    Madry et al. 2018, https://arxiv.org/abs/1706.06083. Of all images on all paths the one with the
    largest margin counts, so that more restarts are never weaker.

    Args:
      norm: 'linf' or 'l2'.
      steps: of a restart, at least 1.
      restarts: at least 1.
      relative_step: the length of a step over epsilon; 0 is 2.5 / steps, as Madry has it.
      random_start: False starts at the image, and then restarts are all alike.

    Raises:
      UserError: a value out of its range.
    """
    check_norm(norm)
    check_count('steps', steps)
    check_count('restarts', restarts)
    require(0 <= relative_step < math.inf, 'relative_step', relative_step, 'at least 0 and finite')
    relative = relative_step or 2.5 / steps

    def step(logits, state):
        fresh = state.image
        if random_start:
            keys = jax.vmap(random.fold_in, (0, None))(state.keys, state.step)
            fresh = random_point(keys, state.image, state.epsilon, norm)
        # A path is `steps` moves and a last look at where they led.
        current = jnp.where(state.step % (steps + 1) == 0, fresh, state.current)

        def loss(image):
            found = logits(image)
            values = optax.softmax_cross_entropy_with_integer_labels(found, state.label)
            return jnp.sum(values), found

        gradient, found = jax.grad(loss, has_aux=True)(current)
        state = _keep_worst(state, current, margin(found, state.label))
        moved = current + relative * state.epsilon * direction(gradient, norm)
        moved = project(moved, state.image, state.epsilon, norm)
        return state._replace(step=state.step + 1, current=moved)

    return Attack(step, restarts * (steps + 1))


def square(*, norm: str = 'linf', steps: int = 1000, share: float = 0.8) -> Attack:
    """Random search without gradients: squares of random place and sign are kept if they help.

    Square Attack, Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049, on the margin. The
    first try are vertical stripes. Squares shrink on the paper's schedule, scaled to `steps`. Unlike
    the paper's code, it does not draw again where a square happens to change nothing.

    Args:
      norm: 'linf' alone.
      steps: queries of the network, at least 1.
      share: of the pixels that the first squares cover, in (0, 1].

    Raises:
      UserError: a value out of its range.
    """
    if norm != 'linf':
        raise UserError(
            f'norm is {norm!r}, and the attack square is of linf: leave out one of them.'
        )
    check_count('steps', steps)
    require(0 < share <= 1, 'share', share, 'more than 0 and at most 1')

    def step(logits, state):
        _, height, width, channels = state.image.shape
        keys = jax.vmap(random.fold_in, (0, None))(state.keys, state.step)
        place_keys, sign_keys, stripe_keys = jnp.moveaxis(
            jax.vmap(lambda key: random.split(key, 3))(keys), 1, 0
        )
        covered = share * _shrunk(state.step, steps) * height * width
        largest = max(min(height, width) - 1, 1)
        side = jnp.clip(jnp.round(jnp.sqrt(covered)).astype(jnp.int32), 1, largest)
        room = jnp.array([height, width]) - side + 1
        corner = _draw(place_keys, lambda key: random.randint(key, (2,), 0, room))
        inside = _inside(corner[:, 0], side, height)[:, :, None, None]
        inside &= _inside(corner[:, 1], side, width)[:, None, :, None]
        sign = _draw(sign_keys, lambda key: random.rademacher(key, (1, 1, channels)))
        stripes = _draw(stripe_keys, lambda key: random.rademacher(key, (1, width, channels)))
        first = state.step == 0
        change = state.epsilon * jnp.where(first, stripes, sign).astype(jnp.float32)
        changed = jnp.clip(state.image + change, 0.0, 1.0)
        tried = jnp.where(inside | first, changed, state.best)
        state = _keep_worst(state, tried, margin(logits(tried), state.label))
        return state._replace(step=state.step + 1, current=state.best)

    return Attack(step, steps)


def _inside(first: Array, count: Array, size: int) -> Array:
    """[B] and [] to bool [B, size]."""
    place = jnp.arange(size)
    return (place >= first[:, None]) & (place < first[:, None] + count)


# Of 10,000 steps: after so many, the share of the pixels in a square is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def _shrunk(step: Array, steps: int) -> Array:
    passed = step * (10_000 / steps) > jnp.array(_HALVINGS, jnp.float32)
    return 0.5 ** jnp.sum(passed)


def check_norm(norm: str):
    require(norm in NORMS, 'norm', norm, ' or '.join(NORMS))


def check_count(name: str, value: int):
    require(value >= 1, name, value, 'at least 1')


# What each reads of the options of `jaxcls attack`.
ATTACKS: dict[str, Callable[..., Attack]] = {'fgsm': fgsm, 'pgd': pgd, 'square': square}
