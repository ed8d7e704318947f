"""Pure operations on one float image [H, W, C] in [0, 1]; `jax.vmap` makes them batched.

Parameters may be traced scalars. Operations named after Pillow's agree with Pillow on 8-bit images
up to its rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


def grey(image: Array) -> Array:
    """Luma (ITU-R 601-2) of an RGB image, or the mean of other than three channels: [H, W, 1]."""
    if image.shape[-1] != 3:
        return image.mean(axis=-1, keepdims=True)
    # Not a sum over the axis: a reduction of three numbers is 20 times slower on CPU.
    return 0.299 * image[..., :1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:]


def blend(degenerate: Array, image: Array, factor: Array | float) -> Array:
    """`degenerate` at factor 0, exactly `image` at 1, extrapolated beyond, clipped to [0, 1]."""
    return jnp.clip(factor * image + (1.0 - factor) * degenerate, 0.0, 1.0)


def brightness(image: Array, factor: Array | float) -> Array:
    """Black at factor 0, the image at 1."""
    return blend(jnp.zeros_like(image), image, factor)


def contrast(image: Array, factor: Array | float) -> Array:
    """The mean luma everywhere at factor 0, the image at 1."""
    return blend(grey(image.mean(axis=(0, 1), keepdims=True)), image, factor)


def saturation(image: Array, factor: Array | float) -> Array:
    """The luma at factor 0, the image at 1. The identity for one channel."""
    return image if image.shape[-1] == 1 else blend(grey(image), image, factor)


def sharpness(image: Array, factor: Array | float) -> Array:
    """Smoothed by a 3x3 kernel (5 in the centre, 1 around) at factor 0, the image at 1.

    The outermost pixels stay as they are.
    """
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return image
    # Shifted slices, not a convolution: those are slow inside `lax.scan` on CPU.
    shifted = [image[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
    smooth = (sum(shifted) + 4.0 * shifted[4]) / 13.0
    return blend(image.at[1:-1, 1:-1].set(smooth), image, factor)


def hue(image: Array, turns: Array | float) -> Array:
    """Rotates the hue of HSV by a fraction of a turn. The identity unless there are 3 channels."""
    if image.shape[-1] != 3:
        return image
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma > 0.0, chroma, 1.0)
    sixths = jnp.select(
        [value == red, value == green],
        [(green - blue) / divisor, (blue - red) / divisor + 2.0],
        (red - green) / divisor + 4.0,
    )
    # HSV to RGB in closed form: each channel falls from `value` as its hue turns away.
    offsets = jnp.asarray([5.0, 3.0, 1.0], image.dtype)
    distance = sixths[..., None] + 6.0 * turns + offsets
    distance -= 6.0 * jnp.floor(distance / 6.0)  # on CPU 9 times faster than jnp.mod
    fall = jnp.clip(jnp.minimum(distance, 4.0 - distance), 0.0, 1.0)
    return jnp.clip(value[..., None] - chroma[..., None] * fall, 0.0, 1.0)


def _levels(image: Array) -> Array:
    """The nearest of the 256 levels of an 8-bit image, int32."""
    return jnp.round(image * 255.0).astype(jnp.int32)


def posterize(image: Array, bits: Array | int) -> Array:
    """Keeps the `bits` (0 to 8) highest bits of every 8-bit level."""
    drop = 8 - jnp.asarray(bits, jnp.int32)
    return ((_levels(image) >> drop) << drop).astype(image.dtype) / 255.0


def solarize(image: Array, threshold: Array | float) -> Array:
    """Inverts the pixels whose 8-bit level is at least `threshold`: all at 0, none at 256."""
    return jnp.where(_levels(image).astype(image.dtype) >= threshold, 1.0 - image, image)


def autocontrast(image: Array) -> Array:
    """Stretches every channel to fill [0, 1]; constant channels stay as they are."""
    low = image.min(axis=(0, 1))
    span = image.max(axis=(0, 1)) - low
    stretched = (image - low) / jnp.where(span > 0.0, span, 1.0)
    return jnp.where(span > 0.0, stretched, image)


def equalize(image: Array) -> Array:
    """Evens out the histogram of every channel, with Pillow's integer arithmetic."""
    return jax.vmap(_equalize_channel, in_axes=-1, out_axes=-1)(image)


def _equalize_channel(channel: Array) -> Array:
    levels = _levels(channel)
    histogram = jnp.zeros(256, jnp.int32).at[levels].add(1)
    step = (levels.size - histogram[levels.max()]) // 255
    below = jnp.cumsum(histogram) - histogram
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table[levels].astype(channel.dtype) / 255.0, channel)


def inverse_matrix(
    degrees: Array | float = 0.0,
    scale: Array | float = 1.0,
    shear_y: Array | float = 0.0,
    shear_x: Array | float = 0.0,
) -> Array:
    """The [2, 2] matrix that takes output to input offsets (y, x) from the centre, for `warp`.

    Args:
      degrees: rotation, counter-clockwise.
      scale: enlargement.
      shear_y, shear_x: pixels that an input pixel moves along y a pixel of x, and the reverse.
    """
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shear = jnp.asarray([[1.0, shear_y], [shear_x, 1.0]], jnp.float32)
    rotation = jnp.asarray([[cos, sin], [-sin, cos]])
    return jnp.dot(shear, rotation, precision=lax.Precision.HIGHEST) / scale


def warp(
    image: Array,
    matrix: Array,
    shift: Array | tuple[float, float] = (0.0, 0.0),
    interpolation: str = 'bilinear',
    fill: float = 0.0,
) -> Array:
    """Resamples an image: output pixel p shows the input at matrix @ (p - c - shift) + c.

    Args:
      image: [H, W, C]; the output has the same shape and c is its centre.
      matrix: [2, 2], output to input, in (y, x) order.
      shift: pixels (y, x) by which the picture moves.
      interpolation: 'bilinear' or 'nearest'.
      fill: what lies outside the input.
    """
    height, width, channels = image.shape
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    shift = jnp.asarray(shift, jnp.float32)
    y = (jnp.arange(height, dtype=jnp.float32) - centre_y - shift[0])[:, None]
    x = (jnp.arange(width, dtype=jnp.float32) - centre_x - shift[1])[None, :]
    # A border of `fill` around the image catches everything that falls outside.
    source_y = jnp.clip(matrix[0, 0] * y + matrix[0, 1] * x + centre_y, -1.0, height) + 1.0
    source_x = jnp.clip(matrix[1, 0] * y + matrix[1, 1] * x + centre_x, -1.0, width) + 1.0
    bordered = jnp.pad(image, ((1, 2), (1, 2), (0, 0)), constant_values=fill)
    pixels, row = bordered.reshape(-1, channels), width + 3
    if interpolation == 'nearest':
        nearest = jnp.round(source_y) * row + jnp.round(source_x)
        return pixels[nearest.astype(jnp.int32)]
    top, left = jnp.floor(source_y), jnp.floor(source_x)
    down, right = (source_y - top)[..., None], (source_x - left)[..., None]
    corner = (top * row + left).astype(jnp.int32)
    upper = pixels[corner] * (1.0 - right) + pixels[corner + 1] * right
    lower = pixels[corner + row] * (1.0 - right) + pixels[corner + row + 1] * right
    return jnp.clip(upper * (1.0 - down) + lower * down, 0.0, 1.0)


class PolicyRanges(NamedTuple):
    """What the operations of RandAugment and TrivialAugment do at magnitude 1."""

    degrees: float
    shear: float
    translate: tuple[float, float]  # pixels along y and x
    enhance: float  # factors of saturation, contrast, brightness, sharpness: 1 - this or 1 + this
    posterize: float  # how many of the 8 bits are dropped


POLICY_OPS = (
    'autocontrast', 'equalize', 'solarize', 'posterize', 'saturation', 'contrast', 'brightness',
    'sharpness', 'identity', 'rotate', 'shear_y', 'shear_x', 'translate_y', 'translate_x',
)  # fmt: skip


def policy_op(
    image: Array,
    op: Array,
    magnitude: Array,
    sign: Array,
    ranges: PolicyRanges,
    interpolation: str = 'nearest',
    fill: float = 0.0,
) -> Array:
    """Applies `POLICY_OPS[op]`, at a magnitude in [0, 1], in the direction of `sign` (-1 or 1).

    A switch does what is photometric, and one warp the rest: under `vmap` every branch of a switch
    is computed for every image.
    """
    amount = magnitude * sign
    moves = {name: jnp.where(op == POLICY_OPS.index(name), amount, 0.0) for name in POLICY_OPS[9:]}
    matrix = inverse_matrix(
        degrees=ranges.degrees * moves['rotate'],
        shear_y=ranges.shear * moves['shear_y'],
        shear_x=ranges.shear * moves['shear_x'],
    )
    down, right = ranges.translate
    shift = jnp.stack([down * moves['translate_y'], right * moves['translate_x']])
    factor = 1.0 + ranges.enhance * amount
    branches = [
        autocontrast,
        equalize,
        lambda x: solarize(x, 256.0 * (1.0 - magnitude)),
        lambda x: posterize(x, 8 - jnp.round(ranges.posterize * magnitude).astype(jnp.int32)),
        lambda x: saturation(x, factor),
        lambda x: contrast(x, factor),
        lambda x: brightness(x, factor),
        lambda x: sharpness(x, factor),
        lambda x: x,
    ]
    image = lax.switch(jnp.minimum(op, len(branches) - 1), branches, image)
    # Last: before the switch, XLA would fuse it into every branch.
    return warp(image, matrix, shift, interpolation, fill)
