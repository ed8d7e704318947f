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
18.4 with this. At stride 1, columns of the window and then rows takes 1.4 to 2.2 times as long.
"""

import functools
import itertools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@traced_once
def _maxima(place, x):
    return functools.reduce(jnp.maximum, _parts(place, x))


def _parts(place, x) -> list:
    """What each place of a window meets, row by row: [B, H', W', C] each."""
    window, stride, pads = place
    return [part for _, part in taps(x, (window, window), stride, pads, fill=-jnp.inf)]


@traced_once
def _forward(place, x):
    parts = _parts(place, x)
    dtype = jnp.uint8 if len(parts) <= 256 else jnp.uint16
    best, first = parts[0], jnp.zeros(parts[0].shape, dtype)
    for number, part in enumerate(parts[1:], 1):
        first = jnp.where(part > best, jnp.asarray(number, dtype), first)
        best = jnp.maximum(best, part)  # keeps NaN
    return best, (x, first)  # `first`: where in its window each maximum is


@traced_once
def _backward(place, saved, gradient):
    window, stride, pads = place
    if window != stride or any(map(any, pads)):
        return (_overlapping(place, *saved, gradient),)
    forms = {'cpu': _disjoint_on_cpu, 'default': _disjoint}
    forms = {name: functools.partial(form, window) for name, form in forms.items()}
    return (jax.lax.platform_dependent(*saved, gradient, **forms),)


def _disjoint_on_cpu(window, x, first, gradient):
    del first  # with few features, to write it takes longer than to look again

    def maxima(x):
        batch, height, width, channels = x.shape
        height, width = height // window, width // window
        x = jax.lax.slice_in_dim(x, 0, height * window, axis=1)
        x = jax.lax.slice_in_dim(x, 0, width * window, axis=2)
        x = x.reshape(batch, height, window, width * window, channels)
        x = functools.reduce(jnp.maximum, unstack(x, 2))
        x = x.reshape(batch, height, width, window, channels)
        return functools.reduce(jnp.maximum, unstack(x, 3))

    return jax.vjp(maxima, x)[1](gradient)[0]


def _disjoint(window, x, first, gradient):
    batch, height, width, channels = gradient.shape
    numbers = jnp.arange(window * window, dtype=first.dtype).reshape(window, 1, window, 1)
    there = first[:, :, None, :, None] == numbers
    dx = jnp.where(there, gradient[:, :, None, :, None], 0)
    dx = dx.reshape(batch, height * window, width * window, channels)
    ends = (n - have for n, have in zip(x.shape, dx.shape, strict=True))  # no window reaches it
    return jnp.pad(dx, [(0, end) for end in ends])


def _overlapping(place, x, first, gradient):
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
