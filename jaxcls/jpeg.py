"""JPEG's loss (ITU-T T.81, JFIF) on the device: all but the entropy coding, which loses nothing."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcls.filters import along_axes

_PRECISE = lax.Precision.HIGHEST

# ITU-T T.81, tables K.1 and K.2.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99), (47, 66, 99, 99, 99, 99, 99, 99),
    *([(99,) * 8] * 4),
)  # fmt: skip
# JFIF; chroma here is centred on 0.
_TO_YCBCR = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)


def compress(image: Array, quality: int) -> Array:
    """What JPEG of a quality from 1 to 100 keeps of float32 [B, H, W, C] in [0, 1], in 256 levels.

    Blocks of 8x8 pixels, cosine transforms, the standard tables; of three channels the colours at half
    the resolution, as Pillow does by default. Other than three channels are each a picture of its own.
    """
    height, width, channels = image.shape[1:]
    levels = jnp.round(image * 255.0)
    luma, chroma = _quantisers(int(quality))
    if channels != 3:
        return jnp.round(jnp.clip(_transformed(levels - 128, luma) + 128, 0, 255)) / 255.0
    colors = jnp.round(jnp.einsum('bhwc,dc->bhwd', levels, _TO_YCBCR, precision=_PRECISE))
    half_y, half_x = (_halves(n) for n in (height, width))
    small = jnp.round(along_axes(colors[..., 1:], half_y[0], half_x[0]))
    small = jnp.round(jnp.clip(_transformed(small, chroma), -128, 127))
    wide = jnp.round(along_axes(small, half_y[1], half_x[1]))
    bright = jnp.round(jnp.clip(_transformed(colors[..., :1] - 128, luma) + 128, 0, 255))
    colors = jnp.concatenate([bright, wide], axis=3)
    back = jnp.einsum('bhwc,dc->bhwd', colors, _TO_RGB, precision=_PRECISE)
    return jnp.round(jnp.clip(back, 0, 255)) / 255.0


@functools.cache
def _quantisers(quality: int) -> tuple[np.ndarray, np.ndarray]:
    """The tables of luma and chroma [8, 8], scaled as the JPEG library of the IJG does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(
        np.clip((np.array(table) * scale + 50) // 100, 1, 255).astype(np.float32)
        for table in (_LUMA, _CHROMA)
    )


def _transformed(image: Array, table: np.ndarray) -> Array:
    """8x8 cosine coefficients rounded to multiples of the table, and back: [B, H, W, C]."""
    from scipy.fft import dct

    height, width = image.shape[1:3]
    cosines = jnp.asarray(dct(np.eye(8), axis=0, norm='ortho'), jnp.float32)
    sides = ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0))
    padded = jnp.pad(image, sides, mode='edge')
    blocks = padded.reshape(len(image), padded.shape[1] // 8, 8, padded.shape[2] // 8, 8, -1)
    found = jnp.einsum('uy,vx,bhywxc->bhuwvc', cosines, cosines, blocks, precision=_PRECISE)
    steps = jnp.asarray(table)[None, None, :, None, :, None]
    kept = jnp.round(found / steps) * steps
    back = jnp.einsum('uy,vx,bhuwvc->bhywxc', cosines, cosines, kept, precision=_PRECISE)
    return back.reshape(padded.shape)[:, :height, :width]


@functools.cache
def _halves(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of two neighbours, [ceil(N / 2), N], and the way back by a triangle filter, [N, ceil(N / 2)]."""
    small = -(-size // 2)
    down = np.zeros((small, size))
    for i in range(size + size % 2):
        down[i // 2, min(i, size - 1)] += 0.5
    up = np.zeros((size, small))
    for i in range(size):
        near, far = i // 2, i // 2 + (1 if i % 2 else -1)
        up[i, near] += 0.75
        up[i, min(max(far, 0), small - 1)] += 0.25
    return down, up
