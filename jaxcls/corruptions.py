"""The 15 common corruptions with 5 severities, batched and keyed, on the device.

Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261. Images are float32 [B, H, W, C] in
[0, 1], and stay so; every example has its own key. All run under `jit`, and faster without it where
each is used a few times: it is random numbers that take long to compile, and then they are compiled
once for all severities.

Severities have the parameters of CIFAR-10-C where the shorter side has at most 64 pixels, else those of
ImageNet-C, of which some are lengths in pixels: on images of another size than 32 or 224 they mean
something else. What differs from the authors' code: frost is drawn, not blended from photographs; motion
blur is a half Gaussian along a line of whole pixels, as ImageMagick draws it, and repeats the edges;
glass blur exchanges pixels, where the authors' code copies those with colours; images need be neither
square nor coloured; and nothing in between is rounded to 8 bits except in `jpeg_compression`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from jaxcls import filters, image_ops, jpeg
from jaxcls.errors import require

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 64  # pixels: up to here images are CIFAR's, above ImageNet's
_PRECISE = lax.Precision.HIGHEST


def corrupt(keys: Array, image: Array, kind: str, severity: int) -> Array:
    """One corruption of a batch.

    Args:
      keys: typed [B], such as of `attacks.example_keys`.
      image: float32 [B, H, W, C] in [0, 1], or uint8: the result is alike, rounded to 8 bits for uint8.
      kind: a name of CORRUPTIONS.
      severity: 1 to 5.

    Raises:
      UserError: another severity or name.
    """
    known = ', '.join(CORRUPTIONS)
    require(kind in CORRUPTIONS, 'corruption', kind, f'one of {known}')
    require(severity in SEVERITIES, 'severity', severity, '1, 2, 3, 4 or 5')
    levels = image.dtype == jnp.uint8
    pixels = image.astype(jnp.float32) / 255.0 if levels else image
    function, small, large = CORRUPTIONS[kind]
    setting = (small if min(image.shape[1:3]) <= _SMALL else large)[severity - 1]
    pixels = jnp.clip(function(keys, pixels, *np.atleast_1d(setting).tolist()), 0.0, 1.0)
    return jnp.round(pixels * 255.0).astype(jnp.uint8) if levels else pixels


def gaussian_noise(keys, image, scale):
    """Normal noise of this standard deviation."""
    return image + scale * filters.draw(keys, random.normal, image.shape[1:])


def shot_noise(keys, image, photons):
    """Poisson counts of so many photons a white pixel."""
    counts = jax.vmap(lambda key, x: random.poisson(key, x * photons))(keys, image)
    return counts.astype(jnp.float32) / photons


def impulse_noise(keys, image, amount):
    """This share of all values becomes 0 or 1, half each."""
    drawn = filters.draw(keys, random.uniform, image.shape[1:])
    return jnp.where(drawn < amount / 2, 0.0, jnp.where(drawn < amount, 1.0, image))


def defocus_blur(keys, image, radius, sigma):
    """A disk of this radius, itself smoothed."""
    del keys
    kernel = filters.disk(radius, sigma)
    before, after = len(kernel) // 2, (len(kernel) - 1) // 2
    padded = jnp.pad(image, ((0, 0), (before, after), (before, after), (0, 0)), mode='reflect')
    channels = image.shape[3]
    weights = jnp.asarray(np.repeat(kernel[:, :, None, None], channels, axis=3), jnp.float32)
    return lax.conv_general_dilated(
        padded, weights, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=channels, precision=_PRECISE,
    )  # fmt: skip


def glass_blur(keys, image, sigma, distance, rounds):
    """Neighbours are exchanged at random, one after the other, between two Gaussian blurs."""
    height, width = image.shape[1:3]
    distance, rounds = int(distance), int(rounds)
    image = filters.gaussian(image, sigma)
    rows = np.arange(height - distance, distance, -1)
    columns = np.arange(width - distance, distance, -1)
    order = np.stack(np.meshgrid(rows, columns, indexing='ij'), -1).reshape(-1, 2)
    order = jnp.asarray(np.tile(order, (rounds, 1)), jnp.int32)
    moves = filters.draw(keys, random.randint, (len(order), 2), -distance, distance)

    def exchange(places, where):
        place, move = where
        here = place[0] * width + place[1]
        there = (place[0] + move[:, 0]) * width + place[1] + move[:, 1]
        example = jnp.arange(len(places))
        old, new = places[:, here], places[example, there]
        return places.at[:, here].set(new).at[example, there].set(old), None

    places = jnp.tile(jnp.arange(height * width, dtype=jnp.int32), (len(image), 1))
    if len(order):
        places, _ = lax.scan(exchange, places, (order, jnp.moveaxis(moves, 1, 0)))
    flat = image.reshape(len(image), height * width, -1)
    moved = jnp.take_along_axis(flat, places[..., None], axis=1).reshape(image.shape)
    return filters.gaussian(moved, sigma)


def motion_blur(keys, image, radius, sigma):
    """Smeared along a line at -45 to 45 degrees from the horizontal."""
    angle = filters.draw(keys, random.uniform, (), minval=-45, maxval=45)
    return filters.smear(image, angle, radius, sigma)


def zoom_blur(keys, image, stop, step):
    """The mean of the image and of it enlarged by 1, 1 + step, ... up to below `stop`."""
    del keys
    factors = np.arange(1, stop, step)
    total = image
    for factor in factors:
        total = total + filters.zoom(image, factor)
    return total / (len(factors) + 1)


def snow(keys, image, mean, scale, zoom, threshold, radius, sigma, keep):
    """Flakes: bright, enlarged, smeared spots of noise, over a whitened image."""
    noise_keys, angle_keys = _split(keys)
    height, width = image.shape[1:3]
    flakes = mean + scale * filters.draw(noise_keys, random.normal, (height, width, 1))
    flakes = filters.zoom(flakes, zoom)
    flakes = jnp.clip(jnp.where(flakes < threshold, 0.0, flakes), 0.0, 1.0)
    angle = filters.draw(angle_keys, random.uniform, (), minval=-135, maxval=-45)
    flakes = filters.smear(flakes, angle, radius, sigma)
    bright = jnp.maximum(image, image_ops.grey(image) * 1.5 + 0.5)
    return keep * image + (1 - keep) * bright + flakes + flakes[:, ::-1, ::-1]


def frost(keys, image, keep, amount):
    """Ice crystals, drawn: bright ridges of a fractal, which grow from the borders inwards."""
    height, width = image.shape[1:3]
    ridge_keys, cover_keys = _split(keys)
    ridges = 1 - jnp.abs(2 * filters.fractal(ridge_keys, height, width, 1.6) - 1)
    cover = filters.fractal(cover_keys, height, width, 2.5)
    y, x = (np.abs(np.linspace(-1, 1, n)) for n in (height, width))
    border = jnp.asarray(np.maximum(y[:, None], x[None, :])[..., None] ** 2, jnp.float32)
    ice = jnp.clip(0.35 + 0.65 * ridges**3 * (0.4 + cover) + 0.3 * border, 0.0, 1.0)
    tint = jnp.array([0.88, 0.96, 1.0]) if image.shape[3] == 3 else 1.0
    return keep * image + amount * ice * tint


def fog(keys, image, amount, decay):
    """A plasma fractal of this amount, and less contrast."""
    highest = image.max(axis=(1, 2, 3), keepdims=True)
    fogged = image + amount * filters.fractal(keys, *image.shape[1:3], decay)
    return fogged * highest / (highest + amount)


def brightness(keys, image, amount):
    """More value, in HSV, at the same hue and saturation."""
    del keys
    value = image.max(axis=3, keepdims=True)
    brighter = jnp.minimum(value + amount, 1.0)
    return jnp.where(value > 0, image * brighter / jnp.where(value > 0, value, 1.0), brighter)


def contrast(keys, image, factor):
    """Nearer to the mean of each channel."""
    del keys
    mean = image.mean(axis=(1, 2), keepdims=True)
    return (image - mean) * factor + mean


def elastic_transform(keys, image, amplitude, sigma, jitter):
    """A small random affine map, then smooth random displacements; edges are mirrored.

    The parameters are in units of the side of CIFAR-10's or ImageNet's images.
    """
    height, width = image.shape[1:3]
    side = min(height, width)
    affine_keys, elastic_keys = _split(keys)
    third = side // 3
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * third + np.array([height, width]) // 2
    moves = filters.draw(
        affine_keys, random.uniform, (3, 2), minval=-jitter * side, maxval=jitter * side
    )
    moved = jnp.concatenate([corners + moves, jnp.ones((len(image), 3, 1))], axis=2)
    # From where the corners went back to where they were.
    back = jnp.linalg.solve(moved, jnp.tile(jnp.asarray(corners, jnp.float32), (len(image), 1, 1)))
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing='ij'), -1)
    grid = jnp.asarray(grid, jnp.float32)
    homogeneous = jnp.concatenate([grid, jnp.ones((height, width, 1))], axis=2)
    source = jnp.einsum('hwi,bij->bhwj', homogeneous, back, precision=_PRECISE)
    image = filters.sample(image, source, 'mirror')
    if not amplitude:
        return image
    field = filters.draw(elastic_keys, random.uniform, (height, width, 2), minval=-1, maxval=1)
    field = amplitude * side * filters.gaussian(field, sigma * side, mode='reflect', truncate=3.0)
    return filters.sample(image, grid + field, 'reflect')


def pixelate(keys, image, factor):
    """Made smaller by means over boxes, and as large as it was with hard edges."""
    del keys
    parts = [filters.boxes(n, max(int(n * factor), 1)) for n in image.shape[1:3]]
    return filters.along_axes(image, *parts)


def jpeg_compression(keys, image, quality):
    """What JPEG of this quality keeps."""
    del keys
    return jpeg.compress(image, int(quality))


def _split(keys):
    parts = jax.vmap(random.split)(keys)
    return parts[:, 0], parts[:, 1]


Setting = float | tuple[float, ...]
# What it does, and its settings at severities 1 to 5 for small (CIFAR-10-C) and large images (ImageNet-C).
CORRUPTIONS: dict[str, tuple[Callable, Sequence[Setting], Sequence[Setting]]] = {
    'gaussian_noise': (
        gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    'shot_noise': (shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    'impulse_noise': (
        impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    'defocus_blur': (
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    'glass_blur': (
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    'motion_blur': (
        motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    'zoom_blur': (
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    'snow': (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    'frost': (
        frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    'fog': (
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    'brightness': (brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    'contrast': (contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    'elastic_transform': (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        # The authors write 244, for images of 224.
        tuple(
            (a * 244 / 224, s * 244 / 224, j * 244 / 224)
            for a, s, j in (
                (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
    ),
    'pixelate': (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    'jpeg_compression': (jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}  # fmt: skip
