"""The maximum over windows, of all networks, with a gradient that knows where each maximum is.

XLA's looks for the maximum of each window anew: on CPU in one thread, on a GPU by a scatter into zeros.
Milliseconds, forwards and backwards, 2 CPU cores:

| window, stride | activations | XLA's | here |
|---|---|---|---|
| 3x3, 2 | 8 x 112 x 112 x 64 | 137 | 25 |
| 3x3, 2 | 32 x 55 x 55 x 64 | 122 | 8.5 |
| 3x3, 1 | 16 x 28 x 28 x 256 | 197 | 28 |
| 2x2, 2 | 128 x 28 x 28 x 6 | 7.4 | 2.0 |

On one H200, XLA's took 1 ms of the 19.5 of a train step of ResNet-50 (bfloat16, 128 images), which takes
18.4 with this. A TPU keeps XLA's: none was measured. At stride 1, columns of the window and then rows take
1.4 to 2.2 times as long.
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
    return _maxima((window, stride, pads), x)


def _values(place, x):
    window, stride, pads = place
    if not _is_disjoint(place):
        return nn.max_pool(x, (window, window), (stride, stride), pads)
    # The same, but of a gradient that takes a third to a sixteenth on CPU.
    batch, height, width, channels = x.shape
    height, width = height // window, width // window
    x = jax.lax.slice_in_dim(x, 0, height * window, axis=1)
    x = jax.lax.slice_in_dim(x, 0, width * window, axis=2)
    x = x.reshape(batch, height, window, width * window, channels)
    x = functools.reduce(jnp.maximum, unstack(x, 2))
    x = x.reshape(batch, height, width, window, channels)
    return functools.reduce(jnp.maximum, unstack(x, 3))


_maxima = jax.custom_vjp(traced_once(_values), nondiff_argnums=(0,))


def _is_disjoint(place) -> bool:
    window, stride, pads = place
    return window == stride and not any(map(any, pads))


@traced_once
def _forward(place, x):
    def without_places(x):
        y = _values(place, x)
        return y, jnp.zeros(y.shape, _type_of_places(place))

    with_places = functools.partial(_with_places, place)
    y, first = jax.lax.platform_dependent(x, tpu=without_places, default=with_places)
    return y, (x, first)


def _type_of_places(place):
    return jnp.uint8 if place[0] ** 2 <= 256 else jnp.uint16


def _with_places(place, x):
    """The maxima, and where in its window each first is, row by row."""
    (window, stride, pads), dtype = place, _type_of_places(place)
    parts = [part for _, part in taps(x, (window, window), stride, pads, fill=-jnp.inf)]
    best, first = parts[0], jnp.zeros(parts[0].shape, dtype)
    for number, part in enumerate(parts[1:], 1):
        first = jnp.where(part > best, jnp.asarray(number, dtype), first)
        best = jnp.maximum(best, part)  # keeps NaN
    return best, first


@traced_once
def _backward(place, saved, gradient):
    def without_places(x, first, gradient):
        del first
        return jax.vjp(functools.partial(_values, place), x)[1](gradient)[0]

    disjoint = _is_disjoint(place)
    with_places = functools.partial(_of_disjoint if disjoint else _of_overlapping, place)
    # On CPU, to write the places of few features takes longer than to look again.
    forms = dict.fromkeys(('cpu', 'tpu') if disjoint else ('tpu',), without_places)
    return (jax.lax.platform_dependent(*saved, gradient, **forms, default=with_places),)


def _of_disjoint(place, x, first, gradient):
    (window, _, _), (batch, height, width, channels) = place, gradient.shape
    numbers = jnp.arange(window * window, dtype=first.dtype).reshape(window, 1, window, 1)
    there = first[:, :, None, :, None] == numbers
    dx = jnp.where(there, gradient[:, :, None, :, None], 0)
    dx = dx.reshape(batch, height * window, width * window, channels)
    ends = (n - have for n, have in zip(x.shape, dx.shape, strict=True))  # no window reaches it
    return jnp.pad(dx, [(0, end) for end in ends])


def _of_overlapping(place, x, first, gradient):
    # Pixels a stride apart are met by the same places of a window: an array of each, interleaved.
    window, stride, pads = place
    lead = (window - 1) // stride
    counts = [-(-n // stride) for n in x.shape[1:3]]
    sizes = zip(counts, pads, gradient.shape[1:3], strict=True)
    ends = [max(0, count + (stride - 1 + p) // stride - size) for count, (p, _), size in sizes]
    edges = [(0, 0, 0), *((lead, end, 0) for end in ends), (0, 0, 0)]
    first, gradient = (
        jax.lax.pad(array, jnp.zeros((), array.dtype), edges) for array in (first, gradient)
    )

    def meets(axis, offset):
        """The places in a window where pixels are, and a slice of the windows."""
        reach = offset + pads[axis][0]
        for place in range(reach % stride, window, stride):
            start = lead + (reach - place) // stride
            yield place, slice(start, start + counts[axis])

    def pixels(*offsets):
        total = jnp.zeros((len(x), *counts, x.shape[-1]), gradient.dtype)
        for (i, rows), (j, columns) in itertools.product(*map(meets, (0, 1), offsets)):
            there = first[:, rows, columns] == i * window + j
            total += jnp.where(there, gradient[:, rows, columns], 0)
        return total

    rows = [jnp.stack([pixels(i, j) for j in range(stride)], 3) for i in range(stride)]
    dx = jnp.stack(rows, 2).reshape(len(x), *(n * stride for n in counts), x.shape[-1])
    return dx[:, : x.shape[1], : x.shape[2]]


_maxima.defvjp(_forward, _backward)
