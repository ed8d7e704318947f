"""The maximum over windows, of all networks: XLA's own on accelerators, on CPU the fastest exact form.

XLA's gradient looks for the maximum of each window anew, on CPU in one thread. Milliseconds, forwards and
backwards, 2 cores:

| window, stride | activations | XLA's | here |
|---|---|---|---|
| 3x3, 2 | 8 x 112 x 112 x 64 | 160 | 30 |
| 3x3, 2 | 32 x 55 x 55 x 64 | 135 | 12 |
| 3x3, 1 | 16 x 28 x 28 x 256 | 220 | 50 |

A train step of GoogLeNet takes 0.78 of the time with it. At stride 1, columns of the window and then rows:
six looks in place of nine. At stride 2 that is slower (48 for the first line, 35 for the second).
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcls.models.convolutions import traced_once
from jaxcls.models.slices import taps, unstack

Pads = tuple[tuple[int, int], tuple[int, int]]


def window_maxima(x, window: int, stride: int, pads: Pads) -> jax.Array:
    """x [B, H, W, C] -> [B, H', W', C]; the gradient goes to the first maximum of each window.

    For reverse-mode derivatives.

    Args:
      pads: before and after the height, and the width.
    """
    if window == stride and not any(map(any, pads)):
        return _disjoint(x, window)
    if stride == 1:
        columns = _maxima(((window, 1), 1, (pads[0], (0, 0))), x)
        return _maxima(((1, window), 1, ((0, 0), pads[1])), columns)
    return _maxima(((window, window), stride, pads), x)


def _disjoint(x, window):
    # The values of reduce_window, whose gradient takes 3 to 16 times as long on CPU.
    batch, height, width, channels = x.shape
    height, width = height // window, width // window
    x = jax.lax.slice_in_dim(x, 0, height * window, axis=1)
    x = jax.lax.slice_in_dim(x, 0, width * window, axis=2)
    x = x.reshape(batch, height, window, width * window, channels)
    x = functools.reduce(jnp.maximum, unstack(x, 2))
    x = x.reshape(batch, height, width, window, channels)
    return functools.reduce(jnp.maximum, unstack(x, 3))


def _plain(place, x):
    window, stride, pads = place
    return nn.max_pool(x, window, (stride, stride), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _maxima(place, x):
    return _plain(place, x)


@traced_once
def _forward(place, x):
    def elsewhere(x):  # where the gradient does without the places
        y = _plain(place, x)
        return y, jnp.zeros(y.shape, jnp.uint8)

    on_cpu = functools.partial(_with_places, place)
    y, first = jax.lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)
    return y, (x, first)


@traced_once
def _backward(place, saved, gradient):
    def elsewhere(x, first, gradient):
        del first
        return jax.vjp(functools.partial(_plain, place), x)[1](gradient)[0]

    on_cpu = functools.partial(_gradient_on_cpu, place)
    return (jax.lax.platform_dependent(*saved, gradient, cpu=on_cpu, default=elsewhere),)


_maxima.defvjp(_forward, _backward)


def _with_places(place, x):
    """The maxima, and where in its window each first is, uint8, row by row."""
    parts = [part for _, part in taps(x, *place, fill=-jnp.inf)]
    best, first = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
    for number, part in enumerate(parts[1:], 1):
        first = jnp.where(part > best, jnp.uint8(number), first)
        best = jnp.maximum(best, part)  # keeps NaN
    return best, first


def _gradient_on_cpu(place, x, first, gradient):
    window, stride, pads = place
    zero = jnp.zeros((), gradient.dtype)

    def edges(axis, shift):  # negative ones are cut off: only padding is there
        before = shift - pads[axis][0]
        reach = (gradient.shape[1 + axis] - 1) * stride + 1
        return before, x.shape[1 + axis] - before - reach, stride - 1

    def term(number, i, j):
        part = jnp.where(first == number, gradient, zero)
        return jax.lax.pad(part, zero, ((0, 0, 0), edges(0, i), edges(1, j), (0, 0, 0)))

    places = itertools.product(*map(range, window))
    terms = (term(number, i, j) for number, (i, j) in enumerate(places))
    return functools.reduce(jnp.add, terms)
