"""Linear filters, warps and fractals on batches of float images [B, H, W, C].

What works along the two axes alone is a product with two matrices, made once, on the host, by SciPy.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

_PRECISE = lax.Precision.HIGHEST


def draw(keys: Array, distribution: Callable, *args, **kwargs) -> Array:
    """A draw of `jax.random` for each key: typed [B] to [B, ...]."""
    return jax.vmap(lambda key: distribution(key, *args, **kwargs))(keys)


def along_axes(image: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Products along both axes: [B, H, W, C] by [H', H] and [W', W] to [B, H', W', C]."""
    rows, columns = jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)
    image = jnp.einsum('ih,bhwc->biwc', rows, image, precision=_PRECISE)
    return jnp.einsum('jw,biwc->bijc', columns, image, precision=_PRECISE)


def gaussian(image: Array, sigma: float, mode: str = 'nearest', truncate: float = 4.0) -> Array:
    """Gaussian blur; the mode at the edges and where the kernel ends are SciPy's."""
    from scipy import ndimage

    matrices = [
        ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0, mode=mode, truncate=truncate)
        for n in image.shape[1:3]
    ]
    return along_axes(image, *matrices)


@functools.cache
def disk(radius: float, sigma: float) -> np.ndarray:
    """A disk smoothed by a Gaussian of 3x3 (5x5 above radius 8), as OpenCV does: a square of odd size.

    It sums to 1, or to 1% more for a radius of 10, whose smoothing meets the border.
    """
    from scipy import ndimage

    reach = max(8, int(radius))
    line = np.arange(-reach, reach + 1)
    inside = np.float64(line[:, None] ** 2 + line**2 <= radius**2)
    width = 1 if radius <= 8 else 2
    smooth = ndimage.gaussian_filter(inside / inside.sum(), sigma, mode='mirror', radius=width)
    used = min(reach, int(radius) + width)
    return smooth[reach - used : reach + used + 1, reach - used : reach + used + 1]


def zoom(image: Array, factor: float) -> Array:
    """The middle, enlarged by linear interpolation to the size of the image."""
    from scipy import ndimage

    def matrix(size):
        kept = int(np.ceil(size / factor))
        top = (size - kept) // 2
        large = ndimage.zoom(np.eye(size)[top : top + kept], (factor, 1), order=1)
        trim = max(len(large) - size, 0) // 2
        return large[trim : trim + size]

    rows, columns = (matrix(n) for n in image.shape[1:3])
    return along_axes(image, rows, columns)


def smear(image: Array, degrees: Array, radius: float, sigma: float) -> Array:
    """A mean over places along a line: [B, H, W, C], degrees [B]. The weights are half a Gaussian."""
    height, width = image.shape[1:3]
    place = np.arange(2 * int(radius) + 1)
    weights = np.exp(-(place**2) / (2 * sigma**2))
    weights = jnp.asarray(weights / weights.sum(), jnp.float32)
    angle = jnp.deg2rad(degrees)[:, None]
    down = jnp.ceil(place * jnp.sin(angle) - 0.5).astype(jnp.int32)
    right = jnp.ceil(place * jnp.cos(angle) - 0.5).astype(jnp.int32)

    def add(i, total):
        rows = jnp.clip(jnp.arange(height) + down[:, i, None], 0, height - 1)
        columns = jnp.clip(jnp.arange(width) + right[:, i, None], 0, width - 1)
        moved = jnp.take_along_axis(image, rows[:, :, None, None], axis=1)
        moved = jnp.take_along_axis(moved, columns[:, None, :, None], axis=2)
        return total + weights[i] * moved

    return lax.fori_loop(0, len(place), add, jnp.zeros_like(image))


def fractal(keys: Array, height: int, width: int, decay: float) -> Array:
    """A plasma fractal in [0, 1] (diamond-square, Fournier et al. 1982): [B, H, W, 1].

    It wraps around. Every halving of the distances divides the noise by decay squared.
    """
    size = 1 << (max(height, width, 2) - 1).bit_length()
    # All numbers at once: their generator takes XLA seconds to compile for each shape.
    drawn = draw(keys, random.uniform, (size * size,), minval=-1, maxval=1)
    values, noise, known = jnp.zeros((len(keys), 1, 1)), 100.0**2, 1
    while known < size * size:
        wobble = noise * drawn[:, known : 4 * known]
        values = _refine(values, wobble.reshape(len(keys), 3, *values.shape[1:]))
        noise, known = noise / decay**2, 4 * known
    low, high = (f(values, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    return ((values - low) / (high - low))[:, :height, :width, None]


def _refine(corner: Array, wobble: Array) -> Array:
    """From a grid [B, N, N] to [B, 2N, 2N]: new points are means of four neighbours, plus [B, 3, N, N]."""
    size = corner.shape[1]
    right = corner + jnp.roll(corner, -1, axis=2)
    below = corner + jnp.roll(corner, -1, axis=1)
    middle = (right + jnp.roll(right, -1, axis=1)) / 4 + wobble[:, 0]
    top = (right + middle + jnp.roll(middle, 1, axis=1)) / 4 + wobble[:, 1]
    left = (below + middle + jnp.roll(middle, 1, axis=2)) / 4 + wobble[:, 2]
    rows = jnp.stack([jnp.stack([corner, top], -1), jnp.stack([left, middle], -1)], axis=2)
    return rows.reshape(len(corner), 2 * size, 2 * size)


def sample(image: Array, places: Array, mode: str) -> Array:
    """Bilinear interpolation at places (y, x) [B, H, W, 2]; `mode` is SciPy's at the edges."""
    places = jnp.broadcast_to(places, (len(image), *places.shape[-3:]))

    def channel(values, place):
        where = [place[..., 0], place[..., 1]]
        return jax.scipy.ndimage.map_coordinates(values, where, order=1, mode=mode)

    over_channels = jax.vmap(channel, in_axes=(2, None), out_axes=2)
    return jax.vmap(over_channels)(image, places)


def boxes(size: int, small: int) -> np.ndarray:
    """Resizing to `small` by means over the pixels whose centres a box covers, and back: [N, N]."""
    down = _box_resize(size, small)
    return _box_resize(small, size) @ down


def _box_resize(size: int, to: int) -> np.ndarray:
    """[to, size], as Pillow's filter BOX."""
    scale = size / to
    reach = max(scale, 1.0)
    centre = (np.arange(to)[:, None] + 0.5) * scale
    offset = (np.arange(size) - centre + 0.5) / reach
    weights = np.float64((offset > -0.5) & (offset <= 0.5))
    return weights / weights.sum(axis=1, keepdims=True)
