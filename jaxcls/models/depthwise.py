"""Depthwise convolutions on CPU, as sums of shifted products.

XLA's own take 15 to 50 times as long, their gradients 3 to 15 times. The products are read from padded
activations: padding each takes 5 to 7 times as long from 5x5 on. The gradient by x is such a sum too, and
that by the kernel adds up row after row: by one reduction of all it takes 1.5 to 5 times as long in large
activations, and a train step of MobileNetV2 1.17 times, of ConvNeXt-T 1.06.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from jaxcls.models.slices import output_size, pad, taps


def convolve_depthwise(place, x, kernel, apart):
    """x [B, H, W, C] * kernel [h, w, 1, C] -> [B, H', W', C].

    Args:
      place: stride, padding of height and width, groups (C).
      apart: makes a function of arrays one that XLA neither fuses nor computes twice.
    """
    stride, padding, _ = place
    counts = output_size(x.shape[1:3], kernel.shape[:2], stride, padding)
    products = functools.partial(_shifted_products, stride, (0, 0), counts)
    return apart(products)(kernel, pad(x, padding, padding))


def _shifted_products(stride, starts, counts, kernel, x):
    """The convolution of x [B, H, W, C] from `starts` on -> [B, *counts, C]."""
    top, left = starts
    height, width = ((n - 1) * stride + k for n, k in zip(counts, kernel.shape, strict=False))
    x = x[:, top : top + height, left : left + width]
    parts = taps(x, kernel.shape[:2], stride, ((0, 0), (0, 0)))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = (part.astype(wide) * kernel[i, j, 0].astype(wide) for (i, j), part in parts)
    return functools.reduce(jnp.add, products).astype(x.dtype)


def depthwise_gradients(place, x, kernel, gradient, apart):
    """Those by x and by the kernel, of the gradient [B, H', W', C] by what `convolve_depthwise` returns."""
    # Both read the gradient padded: so XLA fuses padding with the layer that it comes from.
    stride, padding, _ = place
    sizes, outputs = x.shape[1:3], gradient.shape[1:3]
    # Pixels of the padded x a stride apart are met by the same taps: `counts` of them, after the padding's.
    skipped = [p // stride for p in padding]
    counts = [-(-(n + p) // stride) - s for n, p, s in zip(sizes, padding, skipped, strict=True)]
    before = [max(0, (k - 1) // stride - s) for k, s in zip(kernel.shape, skipped, strict=False)]
    after = [max(0, s + c - n) for s, c, n in zip(skipped, counts, outputs, strict=True)]
    starts = [b + s for b, s in zip(before, skipped, strict=True)]
    padded = pad(gradient, before, after)
    of_x = functools.partial(_phases_of_dx, stride, starts, counts)
    of_kernel = functools.partial(_dk_of_depthwise, stride, before, outputs)
    phases = apart(of_x)(kernel, padded)
    dkernel = apart(of_kernel)(kernel, padded, pad(x, padding, padding))
    rows = [jnp.stack(phases[i : i + stride], 3) for i in range(0, stride * stride, stride)]
    dx = jnp.stack(rows, 2).reshape(len(x), *(c * stride for c in counts), x.shape[-1])
    (top, left), (height, width) = (p % stride for p in padding), sizes
    return dx[:, top : top + height, left : left + width], dkernel


def _phases_of_dx(stride, starts, counts, kernel, gradient):
    """What each pixel of a square as wide as the stride gets: stride**2 arrays [B, *counts, C]."""

    def phase(i, j):
        part = kernel[i::stride, j::stride][::-1, ::-1]
        if not part.size:
            return jnp.zeros((len(gradient), *counts, gradient.shape[-1]), gradient.dtype)
        corner = [s - n + 1 for s, n in zip(starts, part.shape, strict=False)]
        return _shifted_products(1, corner, counts, part, gradient)

    return [phase(i, j) for i, j in itertools.product(range(stride), repeat=2)]


def _dk_of_depthwise(stride, starts, size, kernel, gradient, x):
    # Row by row, so that what is added up stays in the cache: one reduction of all takes twice as long.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    (top, left), (height, width) = starts, size
    places = list(itertools.product(*map(range, kernel.shape[:2])))

    def row_of(array, row):
        return jax.lax.dynamic_index_in_dim(array, row, 1, keepdims=False)

    def add_row(row, sums):
        parts = [row_of(x, row * stride + i) for i in range(kernel.shape[0])]
        of_row = row_of(gradient, top + row)[:, left : left + width]
        return [
            total + (of_row * parts[i][:, j : j + (width - 1) * stride + 1 : stride]).astype(wide)
            for total, (i, j) in zip(sums, places, strict=True)
        ]

    zeros = [jnp.zeros((len(x), width, x.shape[-1]), wide)] * len(places)
    sums = jax.lax.fori_loop(0, height, add_row, zeros, unroll=2)
    sums = jnp.stack([total.sum((0, 1)) for total in sums])
    return sums.reshape(kernel.shape).astype(kernel.dtype)
