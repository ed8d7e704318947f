"""Batched, keyed augmentation on the device.

An augmentation is a pure function `f(key, batch, **settings) -> batch`, to be run under `jit`. The
batch is a dict with `image` float32 [B, H, W, C] in [0, 1] (before normalisation), `target` float32
[B, K], `index` and `epoch` int32 [B], `mask` bool [B]; other keys pass through. Shapes, dtypes and
the range stay. Every example draws its own randomness; `fill` is the grey level of empty places.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from jaxcls import image_ops, registry
from jaxcls.errors import UserError

Batch = Mapping[str, Array]


def to_float(image: Array) -> Array:
    """uint8 levels to float32 in [0, 1]."""
    return image.astype(jnp.float32) / 255.0


def normalize(image: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """`(image - mean) / std` for a float image [B, H, W, C]; 1 or C numbers each, for [0, 1]."""
    return (image - jnp.asarray(mean, image.dtype)) / jnp.asarray(std, image.dtype)


def check_normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises UserError unless `normalize` makes sense with these numbers and `channels`."""
    for name, values in (('mean', mean), ('std', std)):
        if len(values) not in (1, channels):
            raise UserError(
                f'{name} has {len(values)} values, but the images have {channels} channels. '
                f'Give 1 or {channels} values.'
            )
        if not all(0 <= value <= 1 for value in values) or (name == 'std' and 0 in values):
            raise UserError(
                f'{name} = {tuple(values)}, expected values from 0 to 1 (std above 0): images are '
                'scaled to [0, 1] first. Divide numbers meant for 0..255 by 255.'
            )


def _where(chosen: Array, new: Array, old: Array) -> Array:
    """Per example: `new` where `chosen` [B]."""
    return jnp.where(chosen.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)


def _inside(top: Array, left: Array, height: Array, width: Array, image: Array) -> Array:
    """Whether a pixel lies in the example's box, of [B] corners and sizes: bool [B, H, W, 1]."""
    y, x = jnp.arange(image.shape[1])[None, :], jnp.arange(image.shape[2])[None, :]
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])
    columns = (x >= left[:, None]) & (x < (left + width)[:, None])
    return rows[:, :, None, None] & columns[:, None, :, None]


def pad_crop(
    key: Array, batch: Batch, padding: int = 4, mode: str = 'constant', fill: float = 0.0
) -> Batch:
    """Pads all sides by `padding` pixels and crops the old size at random.

    `mode` is 'constant' (with `fill`) or 'reflect'.
    """
    image = batch['image']
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    settings = {'constant_values': fill} if mode == 'constant' else {}
    padded = jnp.pad(image, sides, mode=mode, **settings)
    corners = random.randint(key, (len(image), 2), 0, 2 * padding + 1)
    crop = jax.vmap(lambda x, yx: lax.dynamic_slice(x, (yx[0], yx[1], 0), image.shape[1:]))
    return {**batch, 'image': crop(padded, corners)}


def flip(key: Array, batch: Batch, probability: float = 0.5) -> Batch:
    """Mirrors left and right with this probability."""
    image = batch['image']
    chosen = random.bernoulli(key, probability, image.shape[:1])
    return {**batch, 'image': _where(chosen, image[:, :, ::-1], image)}


def alternating_flip(key: Array, batch: Batch, seed: int = 0) -> Batch:
    """Mirrors about half of the examples in epoch 0, and then each one every other epoch.

    Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU". Which half it is depends on
    `index` and `seed` alone, not on the key.
    """
    del key
    image = batch['image']
    # An explicit generator: the others may give other bits under vmap.
    root = random.key(seed, impl='threefry2x32')
    first = jax.vmap(lambda index: random.bernoulli(random.fold_in(root, index)))(batch['index'])
    chosen = first ^ (batch['epoch'] % 2 == 1)
    return {**batch, 'image': _where(chosen, image[:, :, ::-1], image)}


def cutout(key: Array, batch: Batch, size: int = 8, fill: float = 0.0) -> Batch:
    """Fills a square of `size` pixels, centred on any pixel and clipped by the border.

    DeVries & Taylor 2017, arXiv:1708.04552, who fill with the mean of the data set.
    """
    image = batch['image']
    count, height, width, _ = image.shape
    corner = random.randint(key, (2, count), 0, jnp.asarray([[height], [width]])) - size // 2
    erased = _inside(corner[0], corner[1], size, size, image)
    return {**batch, 'image': jnp.where(erased, jnp.asarray(fill, image.dtype), image)}


def _random_box(
    key: Array, image: Array, area: Sequence[float], aspect: Sequence[float]
) -> tuple[Array, Array, Array, Array]:
    """Boxes that lie in the image: top, left, height, width, each float32 [B], in pixels.

    The area is uniform in a range of fractions of the image's. The aspect (width over height) is
    log-uniform in the part of its range that fits, else as near to the range as fits.
    """
    count, height, width, _ = image.shape
    area_key, aspect_key, corner_key = random.split(key, 3)
    pixels = random.uniform(area_key, (count,), minval=area[0], maxval=area[1]) * (height * width)
    narrowest, widest = pixels / height**2, width**2 / pixels
    low, high = (jnp.log(jnp.clip(ratio, narrowest, widest)) for ratio in aspect)
    ratio = jnp.exp(low + (high - low) * random.uniform(aspect_key, (count,)))
    box_height = jnp.minimum(jnp.sqrt(pixels / ratio), height)
    box_width = jnp.minimum(jnp.sqrt(pixels * ratio), width)
    corner = random.uniform(corner_key, (2, count))
    return corner[0] * (height - box_height), corner[1] * (width - box_width), box_height, box_width


def random_erasing(
    key: Array,
    batch: Batch,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 10 / 3),
    content: str = 'noise',
    fill: float = 0.0,
) -> Batch:
    """With this probability, overwrites a random box.

    Zhong et al. 2017, arXiv:1708.04896. `area` is a range of fractions of the image, `aspect` of
    width over height, `content` 'noise' (uniform, every pixel its own) or 'constant' (`fill`).
    """
    image = batch['image']
    chosen_key, box_key, noise_key = random.split(key, 3)
    box = _random_box(box_key, image, area, aspect)
    erased = _inside(*(jnp.round(side).astype(jnp.int32) for side in box), image)
    erased &= random.bernoulli(chosen_key, probability, (len(image), 1, 1, 1))
    if content == 'noise':
        values = random.uniform(noise_key, image.shape, image.dtype)
    else:
        values = jnp.asarray(fill, image.dtype)
    return {**batch, 'image': jnp.where(erased, values, image)}


def random_resized_crop(
    key: Array,
    batch: Batch,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Batch:
    """Crops a random box and enlarges it, linearly, to the size of the image.

    Szegedy et al. 2014, arXiv:1409.4842. `area` is a range of fractions of the image, `aspect` of
    width over height. A crop is never shrunk, so that antialiasing has no say.
    """
    image = batch['image']
    top, left, height, width = _random_box(key, image, area, aspect)
    scale = jnp.stack([image.shape[1] / height, image.shape[2] / width], axis=1)
    corner = jnp.stack([top, left], axis=1)

    def resize(x, scale, corner):
        return jax.image.scale_and_translate(
            x, x.shape, (0, 1), scale, -corner * scale, 'linear', antialias=False
        )

    return {**batch, 'image': jnp.clip(jax.vmap(resize)(image, scale, corner), 0.0, 1.0)}


def color_jitter(
    key: Array,
    batch: Batch,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Batch:
    """Changes brightness, contrast, saturation and hue by random amounts, in this order.

    The first three factors are uniform in [max(0, 1 - strength), 1 + strength], the turn of the hue
    in [-strength, strength], as in torchvision (but there in random order). At strength 0 nothing
    is computed. Saturation and hue leave grey images as they are.
    """
    image = batch['image']
    strengths = (brightness, contrast, saturation, hue)
    names = ('brightness', 'contrast', 'saturation', 'hue')
    for subkey, name, strength in zip(random.split(key, 4), names, strengths, strict=True):
        if strength > 0:
            low = -strength if name == 'hue' else max(0.0, 1.0 - strength)
            high = strength if name == 'hue' else 1.0 + strength
            factor = random.uniform(subkey, (len(image),), minval=low, maxval=high)
            image = jax.vmap(getattr(image_ops, name))(image, factor)
    return {**batch, 'image': image}


def affine(
    key: Array,
    batch: Batch,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float = 0.0,
    interpolation: str = 'bilinear',
    fill: float = 0.0,
) -> Batch:
    """Rotates, enlarges, shears and moves about the centre, in one resampling.

    Args:
      degrees, shear: angles, uniform in [-x, x]; the shear is along the horizontal axis.
      translate: largest move, as a fraction of the height and of the width.
      scale: range of the enlargement, uniform.
      interpolation: 'bilinear' or 'nearest'.
    """
    image = batch['image']
    count, height, width, _ = image.shape
    draws = random.uniform(key, (5, count))
    spread = jnp.asarray([degrees, shear, translate * height, translate * width])[:, None]
    angle, skew, *shift = spread * (2.0 * draws[:4] - 1.0)
    zoom = scale[0] + (scale[1] - scale[0]) * draws[4]

    def one(x, angle, zoom, skew, shift):
        matrix = image_ops.inverse_matrix(angle, zoom, shear_x=jnp.tan(jnp.deg2rad(skew)))
        return image_ops.warp(x, matrix, shift, interpolation, fill)

    return {**batch, 'image': jax.vmap(one)(image, angle, zoom, skew, jnp.stack(shift, axis=1))}


def _policy_ops(
    key: Array, image: Array, magnitude: Array, ranges: image_ops.PolicyRanges, **settings
) -> Array:
    """Applies as many random operations in turn as `magnitude` [N, B] has rows, each to its own."""
    op_key, sign_key = random.split(key)
    ops = random.randint(op_key, magnitude.shape, 0, len(image_ops.POLICY_OPS))
    signs = random.rademacher(sign_key, magnitude.shape, jnp.float32)

    def apply(image, draw):
        step = jax.vmap(lambda x, *d: image_ops.policy_op(x, *d, ranges=ranges, **settings))
        return step(image, *draw), None

    return lax.scan(apply, image, (ops, magnitude, signs))[0]


def rand_augment(
    key: Array,
    batch: Batch,
    num_ops: int = 2,
    magnitude: float = 9.0,
    interpolation: str = 'nearest',
    fill: float = 0.0,
) -> Batch:
    """Applies `num_ops` of 14 operations, drawn for every example, at one magnitude of 0 to 30.

    Cubuk et al. 2020, arXiv:1909.13719. At 30, the operations reach the largest strengths of
    AutoAugment, as in torchvision (the paper's own code gets there at 10). Autocontrast and
    equalize have no strength.
    """
    image = batch['image']
    count, height, width, _ = image.shape
    moves = (height * 150 / 331, width * 150 / 331)
    ranges = image_ops.PolicyRanges(30.0, 0.3, moves, enhance=0.9, posterize=4.0)
    magnitudes = jnp.full((num_ops, count), magnitude / 30.0, jnp.float32)
    settings = {'interpolation': interpolation, 'fill': fill}
    return {**batch, 'image': _policy_ops(key, image, magnitudes, ranges, **settings)}


def trivial_augment(
    key: Array, batch: Batch, interpolation: str = 'nearest', fill: float = 0.0
) -> Batch:
    """Applies one of 14 operations at one of 31 magnitudes, both drawn for every example.

    The wide space of Müller & Hutter 2021, arXiv:2103.10158. It moves by up to 32 pixels whatever
    the size of the image.
    """
    image = batch['image']
    level_key, op_key = random.split(key)
    ranges = image_ops.PolicyRanges(135.0, 0.99, (32.0, 32.0), enhance=0.99, posterize=6.0)
    levels = random.randint(level_key, (1, len(image)), 0, 31).astype(jnp.float32)
    settings = {'interpolation': interpolation, 'fill': fill}
    return {**batch, 'image': _policy_ops(op_key, image, levels / 30.0, ranges, **settings)}


def _mixing(key: Array, batch: Batch, alpha: float, probability: float) -> Array:
    """The share [B] of itself, drawn from Beta(alpha, alpha), that an example keeps.

    It is 1 with probability `1 - probability`, and where an example or its partner is padding.
    """
    beta_key, chosen_key = random.split(key)
    mask = batch['mask']
    mixed = random.bernoulli(chosen_key, probability, mask.shape) & mask & jnp.roll(mask, 1)
    # Two gammas in one call: compiles in half the time of `random.beta`.
    gammas = random.loggamma(beta_key, alpha, (2, *mask.shape))
    return jnp.where(mixed, jax.nn.sigmoid(gammas[0] - gammas[1]), 1.0)


def _mix_targets(target: Array, keep: Array) -> Array:
    return keep[:, None] * target + (1.0 - keep[:, None]) * jnp.roll(target, 1, axis=0)


def mixup(key: Array, batch: Batch, alpha: float = 0.2, probability: float = 1.0) -> Batch:
    """Blends every example with the one before it in the batch, image and target alike.

    Zhang et al. 2018, arXiv:1710.09412; the share is drawn per example (per batch in the authors'
    code). Batches must be shuffled. Padding is neither changed nor mixed into anything.
    """
    if alpha == 0:
        return batch
    keep = _mixing(key, batch, alpha, probability)
    image, share = batch['image'], keep[:, None, None, None]
    mixed = share * image + (1.0 - share) * jnp.roll(image, 1, axis=0)
    return {**batch, 'image': mixed, 'target': _mix_targets(batch['target'], keep)}


def cutmix(key: Array, batch: Batch, alpha: float = 1.0, probability: float = 1.0) -> Batch:
    """Pastes a box of the example before it in the batch, and mixes the targets by its area.

    Yun et al. 2019, arXiv:1905.04899; drawn per example. The box is centred on any pixel and
    clipped, and the target follows what remains of it. Otherwise as `mixup`.
    """
    if alpha == 0:
        return batch
    mix_key, centre_key = random.split(key)
    image = batch['image']
    count, height, width, _ = image.shape
    side = jnp.sqrt(1.0 - _mixing(mix_key, batch, alpha, probability))
    sides = jnp.floor(side * jnp.asarray([[height], [width]], jnp.float32)).astype(jnp.int32)
    corner = (
        random.randint(centre_key, (2, count), 0, jnp.asarray([[height], [width]])) - sides // 2
    )
    pasted = _inside(*corner, *sides, image)
    keep = 1.0 - pasted.mean(axis=(1, 2, 3), dtype=jnp.float32)
    mixed = jnp.where(pasted, jnp.roll(image, 1, axis=0), image)
    return {**batch, 'image': mixed, 'target': _mix_targets(batch['target'], keep)}


# Those that mix examples with each other, targets and all.
MIXING = ('mixup', 'cutmix')
AUGMENTATIONS: dict[str, Callable[..., Batch]] = {
    'pad_crop': pad_crop,
    'flip': flip,
    'alternating_flip': alternating_flip,
    'cutout': cutout,
    'random_erasing': random_erasing,
    'random_resized_crop': random_resized_crop,
    'color_jitter': color_jitter,
    'affine': affine,
    'rand_augment': rand_augment,
    'trivial_augment': trivial_augment,
    'mixup': mixup,
    'cutmix': cutmix,
}


# All numbers are finite and at least 0; those of these arguments are at most this.
_LARGEST = {
    'seed': 2**31 - 1,
    'padding': 1024,
    'probability': 1,
    'fill': 1,
    'translate': 1,
    'area': 1,
    'hue': 0.5,
    'degrees': 360,
    'shear': 89,
    'magnitude': 30,
}
_CHOICES = {
    'mode': ('constant', 'reflect'),
    'content': ('noise', 'constant'),
    'interpolation': ('bilinear', 'nearest'),
}


def _expectation(argument: str, value: Any, default: Any) -> str:
    """What an argument must be, or nothing if the value is just that."""
    if isinstance(default, str):
        choices = _CHOICES[argument]
        return '' if value in choices else f'one of {", ".join(map(repr, choices))}'
    high, pair = _LARGEST.get(argument, math.inf), isinstance(default, tuple)
    limit = f'from 0 to {high}' if argument in _LARGEST else 'of at least 0'
    numbers = value if pair and isinstance(value, tuple | list) else (value,)
    types = int if isinstance(default, int) else int | float
    fits = all(
        isinstance(n, types) and not isinstance(n, bool) and 0 <= n <= high and n < math.inf
        for n in numbers
    )
    if pair:
        fits = fits and len(numbers) == 2 and 0 < numbers[0] <= numbers[1]
        return '' if fits else f'two numbers {limit}, above 0, the smaller one first'
    return '' if fits else f'a {"whole " if types is int else ""}number {limit}'


def make_augment(specs: Sequence[Mapping[str, Any]]) -> Callable[[Array, Batch], Batch]:
    """Composes augmentations, such as `[{'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}]`.

    They run in this order, each with a key folded from its position: one more at the end changes
    none before it. The result is `(key, batch) -> batch`, to be run under `jit`.

    Raises:
      UserError: an unknown name or argument, or a value out of range.
    """
    steps = []
    for position, spec in enumerate(specs):
        if not isinstance(spec, Mapping) or 'name' not in spec:
            raise UserError(
                f"augmentation {position} is {spec!r}, expected a dict with a 'name' and settings. "
                f'Known names: {", ".join(AUGMENTATIONS)}.'
            )
        step = registry.bind(AUGMENTATIONS, 'augmentation', **spec)
        known, settings = registry.defaults(step.func), {}
        for argument, value in step.keywords.items():
            default = known[argument]
            if expected := _expectation(argument, value, default):
                raise UserError(
                    f'augmentation {spec["name"]!r}: {argument} = {value!r}, expected {expected}. '
                    f'The default is {default!r}.'
                )
            settings[argument] = type(default)(value)
        steps.append(functools.partial(step.func, **settings))

    def augment(key: Array, batch: Batch) -> Batch:
        for position, step in enumerate(steps):
            batch = step(random.fold_in(key, position), batch)
        return batch

    return augment
