"""Parts of activations as slices, which all backends and exporters have."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp


def unstack(x, axis: int) -> list:
    """The parts of an array along one axis. As slices, which TFLite has for any batch, unlike x[:, 0]."""
    return [jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def every(x, stride: int) -> jax.Array:
    """x [B, H, W, C]: every stride-th row and column, from the first on."""
    return jax.lax.slice(x, (0,) * 4, x.shape, (1, stride, stride, 1))


def output_size(size, window, stride: int, padding) -> tuple[int, int]:
    """How many places a window has along the height and the width, with zeros on both sides."""
    sizes = zip(size, window, padding, strict=True)
    height, width = ((n + 2 * p - w) // stride + 1 for n, w, p in sizes)
    return height, width


def pad(x, before, after):
    """x [B, H, W, C] with zeros before and after the height and the width; negative ones cut off."""
    edges = ((b, a, 0) for b, a in zip(before, after, strict=True))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def taps(x, window, stride: int, pads, fill=0) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """What each place (i, j) of a window meets, row by row: of x [B, H, W, C] parts [B, H', W', C].

    Args:
      window: height and width.
      pads: values `fill` before and after the height, and the width.
    """
    edges = ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0))
    x = jax.lax.pad(x, jnp.asarray(fill, x.dtype), edges)
    height, width = (n - w + 1 for n, w in zip(x.shape[1:3], window, strict=True))
    for i in range(window[0]):
        for j in range(window[1]):
            yield (i, j), x[:, i : i + height : stride, j : j + width : stride]
