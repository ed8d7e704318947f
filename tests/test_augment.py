import colorsys
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from jaxcls import image_ops, registry
from jaxcls.augment import (
    AUGMENTATIONS,
    check_normalization,
    make_augment,
    normalize,
    to_float,
)
from jaxcls.errors import UserError

BATCH, HEIGHT, WIDTH = 8, 10, 12
# For the laws of the registry, where the defaults do nothing or treat channels apart.
ACTIVE = {
    'random_erasing': {'content': 'constant', 'fill': 0.5},
    'color_jitter': {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.2},
    'affine': {'degrees': 30, 'translate': 0.2, 'scale': (0.8, 1.2), 'shear': 10},
}
NEUTRAL = [
    {'name': 'pad_crop', 'padding': 0},
    {'name': 'pad_crop', 'padding': 0, 'mode': 'reflect'},
    {'name': 'flip', 'probability': 0},
    {'name': 'cutout', 'size': 0},
    {'name': 'random_erasing', 'probability': 0.0},
    {'name': 'random_resized_crop', 'area': (1, 1), 'aspect': (WIDTH / HEIGHT, WIDTH / HEIGHT)},
    {'name': 'color_jitter'},
    {'name': 'affine'},
    {'name': 'rand_augment', 'num_ops': 0},
    {'name': 'mixup', 'alpha': 0},
    {'name': 'cutmix', 'alpha': 0},
]


@functools.cache
def compiled(specs):
    return jax.jit(make_augment(json.loads(specs)))


def apply(key, batch, *specs):
    """Applies augmentations with an integer as key; each list of specs is compiled once."""
    with jax.numpy_dtype_promotion('strict'):
        return jax.device_get(compiled(json.dumps(specs))(jax.random.key(key), batch))


def make_batch(image, real=None):
    index = np.arange(len(image), dtype=np.int32)
    return {
        'image': np.asarray(image, np.float32),
        'label': index % 10,
        'target': np.eye(10, dtype=np.float32)[index % 10],
        'index': index,
        'epoch': np.zeros_like(index),
        'mask': index < (len(image) if real is None else real),
        'extra': index,
    }


def levels(channels=3, height=32, width=24, seed=0):
    """An uneven 8-bit image whose levels do not span the whole range."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(height, width, channels)).cumsum(0).cumsum(1)
    waves = (waves - waves.min()) / np.ptp(waves)
    return np.round(20 + 200 * waves**1.5).astype(np.uint8)


def random_batch(channels=3, count=BATCH, real=None):
    shape = (count, HEIGHT, WIDTH, channels)
    return make_batch(np.random.default_rng(0).random(shape, np.float32), real)


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def unpillow(image):
    array = np.asarray(image, np.float32) / 255
    return array[..., None] if array.ndim == 2 else array


def assert_same(got, expected, atol=1e-6):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


# Laws of the whole registry.


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_every_augmentation_is_keyed_compiles_once_and_keeps_all_but_values(name):
    spec, batch = {'name': name, **ACTIVE.get(name, {})}, random_batch(real=6)
    first, again, other = (apply(key, batch, spec) for key in (1, 1, 2))
    programs = compiled(json.dumps([spec]))._cache_size()
    apply(3, {**batch, 'epoch': batch['epoch'] + 1, 'mask': ~batch['mask']}, spec)
    assert compiled(json.dumps([spec]))._cache_size() == programs
    assert first.keys() == batch.keys()
    for field, value in batch.items():
        assert (first[field].shape, first[field].dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(first[field], again[field])
        if field not in ('image', 'target'):
            np.testing.assert_array_equal(first[field], value)
    for got in (first, other):
        assert got['image'].min() >= 0 and got['image'].max() <= 1
        assert_same(got['target'].sum(1), np.ones(BATCH))
    assert np.any(first['image'] != batch['image'])
    assert np.any(first['image'] != other['image']) == (name != 'alternating_flip')


# Mixing is tested with grey images below.
@pytest.mark.parametrize('name', [name for name in AUGMENTATIONS if 'mix' not in name])
def test_grey_images_are_treated_as_colour_images_of_three_equal_channels(name):
    spec, grey = {'name': name, **ACTIVE.get(name, {})}, random_batch(channels=1, real=6)
    colour = {**grey, 'image': np.repeat(grey['image'], 3, axis=-1)}
    got, expected = apply(1, grey, spec), apply(1, colour, spec)
    assert got['image'].shape == grey['image'].shape
    assert_same(np.repeat(got['image'], 3, axis=-1), expected['image'], atol=1e-5)


@pytest.mark.parametrize('spec', NEUTRAL, ids=lambda spec: ' '.join(map(str, spec.values())))
def test_neutral_settings_change_nothing(spec):
    batch = random_batch()
    got = apply(0, batch, spec)
    for field, value in batch.items():
        assert_same(got[field], value)


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_every_argument_has_a_plain_default_that_passes_the_checks(name):
    defaults = registry.defaults(AUGMENTATIONS[name])
    assert {type(value) for value in defaults.values()} <= {int, float, str, tuple}
    make_augment([{'name': name, **defaults}])


# Composition and errors.


def test_one_more_augmentation_at_the_end_changes_none_before_it():
    batch, crop, flip = random_batch(), {'name': 'pad_crop'}, {'name': 'flip'}
    cropped = apply(3, batch, crop)
    flip_key = jax.random.fold_in(jax.random.key(3), 1)
    expected = AUGMENTATIONS['flip'](flip_key, cropped)
    np.testing.assert_array_equal(apply(3, batch, crop, flip)['image'], expected['image'])


def test_the_same_augmentation_draws_afresh_at_another_position():
    flip = {'name': 'flip'}
    batch = random_batch()
    assert np.any(apply(3, batch, flip, flip)['image'] != batch['image'])


@pytest.mark.parametrize(
    ('spec', 'words'),
    [
        ({'name': 'pad_corp'}, "'pad_crop'"),
        ({'name': 'pad_crop', 'paddin': 2}, "'padding'"),
        ({'padding': 2}, "'name'"),
        ('flip', "'name'"),
        ({'name': 'pad_crop', 'padding': -1}, "'pad_crop': padding = -1"),
        ({'name': 'pad_crop', 'padding': 2**31 - 1}, 'from 0 to 1024'),
        ({'name': 'pad_crop', 'padding': 1.5}, 'a whole number'),
        ({'name': 'pad_crop', 'padding': True}, 'a whole number'),
        ({'name': 'pad_crop', 'mode': 'mirror'}, "'constant', 'reflect'"),
        ({'name': 'flip', 'probability': 1.5}, 'from 0 to 1'),
        ({'name': 'flip', 'probability': float('nan')}, 'from 0 to 1'),
        ({'name': 'flip', 'probability': '0.5'}, 'from 0 to 1'),
        ({'name': 'flip', 'probability': None}, 'from 0 to 1'),
        ({'name': 'flip', 'probability': (0.5, 0.6)}, 'from 0 to 1'),
        ({'name': 'mixup', 'alpha': -0.2}, 'at least 0'),
        ({'name': 'cutmix', 'alpha': float('inf')}, 'at least 0'),
        ({'name': 'color_jitter', 'brightness': -0.1}, 'at least 0'),
        ({'name': 'color_jitter', 'hue': 0.6}, 'from 0 to 0.5'),
        ({'name': 'rand_augment', 'magnitude': 31}, 'from 0 to 30'),
        ({'name': 'affine', 'scale': (0, 1)}, 'two numbers'),
        ({'name': 'affine', 'scale': 1.1}, 'two numbers'),
        ({'name': 'random_resized_crop', 'area': (0.5, 0.2)}, 'the smaller one first'),
        ({'name': 'random_resized_crop', 'area': (0.5, 1.2)}, 'from 0 to 1'),
        ({'name': 'random_erasing', 'area': (0.1, 0.2, 0.3)}, 'two numbers'),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(spec, words):
    with pytest.raises(UserError, match='augmentation') as error:
        make_augment([spec])
    assert words in str(error.value)


def test_to_float_and_normalize_match_numpy():
    image = levels()[None]
    assert_same(to_float(jnp.asarray(image)), image / 255)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    got = normalize(to_float(jnp.asarray(image)), mean, std)
    assert_same(got, (image / 255 - np.array(mean)) / np.array(std), atol=1e-5)
    assert_same(normalize(jnp.ones((1, 2, 2, 3)), (0.5,), (0.25,)), np.full((1, 2, 2, 3), 2.0))


def test_normalization_numbers_are_checked():
    check_normalization((0.5,), (0.2,), 3)
    check_normalization((0.5, 0.0, 1.0), (0.2, 0.2, 1.0), 3)
    with pytest.raises(UserError, match='mean has 3 values, but the images have 1'):
        check_normalization((0.5, 0.5, 0.5), (0.2,), 1)
    for mean, std, name in [
        ((125.0,), (0.2,), 'mean'),
        ((float('nan'),), (0.2,), 'mean'),
        ((0.5,), (0.0,), 'std'),
        ((0.5,), (-0.1,), 'std'),
    ]:
        with pytest.raises(UserError, match=name):
            check_normalization(mean, std, 1)


# Moving and mirroring.


def test_certain_flip_mirrors_and_twice_is_the_identity():
    batch, spec = random_batch(), {'name': 'flip', 'probability': 1}
    once = apply(0, batch, spec)
    np.testing.assert_array_equal(once['image'], batch['image'][:, :, ::-1])
    np.testing.assert_array_equal(apply(1, once, spec)['image'], batch['image'])


def test_alternating_flip_mirrors_half_at_first_and_then_each_every_other_epoch():
    ramp = np.broadcast_to(np.arange(4) / 4, (512, 4, 4))[..., None]
    batch = make_batch(ramp)

    def mirrored(epoch, seed=0, order=slice(None)):
        drawn = {**batch, 'epoch': np.full(512, epoch, np.int32), 'index': batch['index'][order]}
        spec = {'name': 'alternating_flip', 'seed': seed}
        image = apply(epoch, drawn, spec)['image']
        plain = np.all(image == ramp, axis=(1, 2, 3))
        assert np.all(plain | np.all(image == ramp[:, :, ::-1], axis=(1, 2, 3)))
        return ~plain

    first = mirrored(0)
    assert 0.4 < first.mean() < 0.6
    for epoch in range(1, 5):
        np.testing.assert_array_equal(mirrored(epoch), first ^ (epoch % 2 == 1))
    # It goes with the index, not with the place in the batch.
    np.testing.assert_array_equal(mirrored(0, order=slice(None, None, -1)), first[::-1])
    assert 0.4 < (mirrored(0, seed=1) == first).mean() < 0.6


@pytest.mark.parametrize('mode', ['constant', 'reflect'])
def test_pad_crop_takes_every_window_of_the_padded_image(mode):
    image = np.random.default_rng(0).random((5, 6, 3), np.float32)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape)[:, :, 0]
    batch = make_batch(np.broadcast_to(image, (400, *image.shape)))
    got = apply(0, batch, {'name': 'pad_crop', 'padding': 2, 'mode': mode})['image']
    matches = (got[:, None, None] == windows).all((3, 4, 5))
    assert matches.any((1, 2)).all()
    assert matches.any(0).all()


@pytest.mark.parametrize('interpolation', ['bilinear', 'nearest'])
def test_warp_matches_scipy(interpolation):
    image = levels() / np.float32(255)
    centre = (np.array(image.shape[:2]) - 1) / 2
    shift = np.array([2.3, -3.1])
    matrix = image_ops.inverse_matrix(37.0, 1.3, 0.2, -0.1)
    warp = jax.jit(image_ops.warp, static_argnames='interpolation')
    got = warp(image, matrix, shift, interpolation, fill=0.25)
    inverse = np.asarray(matrix, np.float64)
    settings = {'order': int(interpolation == 'bilinear'), 'mode': 'grid-constant', 'cval': 0.25}
    expected = np.stack(
        [
            ndimage.affine_transform(c, inverse, centre - inverse @ (centre + shift), **settings)
            for c in np.moveaxis(image, -1, 0)
        ],
        axis=-1,
    )
    assert_same(got, expected, atol=1e-4)


def test_rotation_by_right_angles_matches_rot90():
    image = levels(height=9, width=9) / np.float32(255)
    warp = jax.jit(lambda degrees: image_ops.warp(image, image_ops.inverse_matrix(degrees)))
    for turns in range(-1, 5):
        assert_same(warp(90.0 * turns), np.rot90(image, turns), atol=1e-5)


def ramps(count, size=24):
    """Images whose first two channels are y and x; the middle tells how an image was warped."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing='ij')
    return make_batch(np.broadcast_to(np.stack([y, x, 0 * x], -1) / size, (count, size, size, 3)))


def middle_of(image):
    """Jacobians [B, 2, 2] and origins [B, 2] (the source of the centre), in pixels, of `ramps`."""
    image = np.asarray(image, np.float64)[..., :2] * image.shape[1]
    middle = image.shape[1] // 2
    down = image[:, middle, middle] - image[:, middle - 1, middle]
    right = image[:, middle, middle] - image[:, middle, middle - 1]
    origin = image[:, middle - 1 : middle + 1, middle - 1 : middle + 1].mean((1, 2))
    return np.stack([down, right], -1), origin


@pytest.mark.parametrize('argument', ['degrees', 'translate', 'scale', 'shear'])
def test_affine_draws_from_the_ranges_asked_for(argument):
    value = {'degrees': 30, 'translate': 0.125, 'scale': (0.8, 1.25), 'shear': 20}[argument]
    batch = ramps(300)
    image = apply(0, batch, {'name': 'affine', argument: value})['image']
    jacobian, origin = middle_of(image)
    scale = np.linalg.det(jacobian) ** -0.5
    angle = np.rad2deg(np.arctan2(-jacobian[:, 1, 0], jacobian[:, 0, 0]))
    shear = np.rad2deg(np.arctan(jacobian[:, 1, 0]))
    moved = (11.5 - origin) / 24
    drawn = {'degrees': angle, 'translate': moved, 'scale': scale, 'shear': shear}[argument]
    low, high = value if argument == 'scale' else (-value, value)
    assert low - 1e-3 <= drawn.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < drawn.max() <= high + 1e-3
    if argument != 'translate':
        assert_same(origin, np.full((300, 2), 11.5), atol=1e-3)
    if argument in ('degrees', 'translate'):
        assert_same(scale, np.ones(300), atol=1e-4)


def test_random_resized_crop_draws_area_and_aspect_and_stays_inside():
    spec = {'name': 'random_resized_crop', 'area': (0.2, 0.6), 'aspect': (0.5, 2.0)}
    image = apply(0, ramps(300), spec)['image']
    jacobian, origin = middle_of(image)
    assert_same(jacobian * (1 - np.eye(2)), np.zeros((300, 2, 2)), atol=1e-4)
    sides = np.stack([jacobian[:, 0, 0], jacobian[:, 1, 1]], -1)
    area, aspect = sides.prod(1), sides[:, 1] / sides[:, 0]
    assert 0.199 < area.min() < 0.22 and 0.58 < area.max() < 0.601
    assert 0.499 < aspect.min() < 0.6 and 1.7 < aspect.max() < 2.001
    edges = np.stack([origin + 0.5 - 12 * sides, origin + 0.5 + 12 * sides])
    assert edges.min() > -1e-2 and edges.max() < 24.01
    # The corner is uniform in what room there is.
    assert stats.kstest(((edges[0] / (24 - 24 * sides)).ravel()), 'uniform').pvalue > 1e-3


# Erasing.


def box_of(erased):
    """Heights and widths of the rectangles that bool [B, H, W] masks must be."""
    rows, columns = erased.any(2), erased.any(1)
    np.testing.assert_array_equal(erased, rows[:, :, None] & columns[:, None, :])
    for line in (*rows, *columns):
        assert np.count_nonzero(np.diff(np.flatnonzero(line)) != 1) == 0
    return rows.sum(1), columns.sum(1)


@pytest.mark.parametrize('size', [4, 5])
def test_cutout_erases_a_square_around_any_pixel(size):
    batch = make_batch(np.ones((600, HEIGHT, WIDTH, 3)))
    image = apply(0, batch, {'name': 'cutout', 'size': size, 'fill': 0.5})['image']
    assert set(np.unique(image)) == {0.5, 1.0}
    heights, widths = box_of((image == 0.5).all(-1))
    for drawn, side in ((heights, HEIGHT), (widths, WIDTH)):
        starts = np.arange(side) - size // 2
        overlaps = np.minimum(starts + size, side) - np.maximum(starts, 0)
        assert set(drawn) == set(overlaps)
        assert abs(drawn.mean() - overlaps.mean()) < 0.15
    assert (heights * widths).max() == size**2


@pytest.mark.parametrize('content', ['noise', 'constant'])
def test_random_erasing_overwrites_boxes_of_the_right_size(content):
    batch = make_batch(np.full((400, 40, 32, 1), 2.0))
    spec = {'name': 'random_erasing', 'probability': 0.7, 'area': (0.1, 0.3), 'aspect': (0.5, 2.0)}
    image = apply(0, batch, {**spec, 'content': content, 'fill': 0.25})['image']
    erased = image[..., 0] != 2.0
    hit = erased.any((1, 2))
    assert 0.6 < hit.mean() < 0.8
    heights, widths = box_of(erased[hit])
    area, aspect = heights * widths / (40 * 32), widths / heights
    assert 0.08 < area.min() < 0.12 and 0.28 < area.max() < 0.32
    assert 0.45 < aspect.min() < 0.6 and 1.7 < aspect.max() < 2.2
    values = image[image != 2.0]
    if content == 'noise':
        assert stats.kstest(values, 'uniform').pvalue > 1e-3
    else:
        assert set(values) == {0.25}


# Colour.


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('factor', [0.0, 0.4, 1.0, 1.7])
def test_enhancements_match_pillow(channels, factor):
    image = levels(channels)
    enhancers = {
        'brightness': ImageEnhance.Brightness,
        'contrast': ImageEnhance.Contrast,
        'saturation': ImageEnhance.Color,
        'sharpness': ImageEnhance.Sharpness,
    }
    for name, enhancer in enhancers.items():
        got = _op(name)(image / np.float32(255), factor)
        expected = unpillow(enhancer(pillow(image)).enhance(factor))
        # Pillow rounds what it blends with, and then cuts off the fraction.
        assert_same(got - (0.5 / 255) * (factor % 1 > 0), expected, atol=1.2 / 255)


@pytest.mark.parametrize('channels', [1, 3])
def test_level_operations_match_pillow(channels):
    image = levels(channels)
    scaled = image / np.float32(255)
    for bits in (1, 4, 8):
        assert_same(
            _op('posterize')(scaled, bits), unpillow(ImageOps.posterize(pillow(image), bits))
        )
    for threshold in (0, 100, 128, 256):
        expected = unpillow(ImageOps.solarize(pillow(image), threshold))
        assert_same(_op('solarize')(scaled, threshold), expected)
    assert_same(_op('equalize')(scaled), unpillow(ImageOps.equalize(pillow(image))))
    expected = unpillow(ImageOps.autocontrast(pillow(image)))
    assert_same(_op('autocontrast')(scaled), expected, atol=1 / 255)


@functools.cache
def _op(name):
    return jax.jit(getattr(image_ops, name))


@pytest.mark.parametrize('name', ['equalize', 'autocontrast'])
def test_histogram_operations_leave_constant_images(name):
    constant = jnp.full((20, 20, 3), 0.3)
    assert_same(_op(name)(constant), constant)


def test_hue_matches_colorsys():
    greys = [[[0.0] * 3, [0.5] * 3, [1.0] * 3, [1.0, 0.5, 0.5], [0.2, 0.2, 0.9], [0.4, 0.9, 0.9]]]
    for image in (levels() / np.float32(255), np.array(greys, np.float32)):
        for turns in (-0.5, -0.2, 0.0, 0.3):
            expected = np.empty_like(image)
            for place in np.ndindex(image.shape[:2]):
                h, s, v = colorsys.rgb_to_hsv(*image[place].tolist())
                expected[place] = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
            assert_same(_op('hue')(image, turns), expected, atol=1e-5)


def test_color_jitter_draws_factors_around_one_and_turns_around_zero():
    batch = make_batch(np.broadcast_to([0.4, 0.4, 0.2], (300, 2, 2, 3)))
    image = apply(0, batch, {'name': 'color_jitter', 'brightness': 0.5})['image']
    factors = image[:, 0, 0, 0] / 0.4
    assert 0.5 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.5
    assert_same(image[..., 2] * 2, image[..., 0])
    image = apply(0, batch, {'name': 'color_jitter', 'hue': 0.1})['image']
    turns = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in image[:, 0, 0].tolist()]) - 1 / 6
    assert -0.101 < turns.min() < -0.09 and 0.09 < turns.max() < 0.101
    # A strength above 1 does not give negative factors.
    image = apply(0, batch, {'name': 'color_jitter', 'brightness': 2.0})['image']
    assert np.mean(image == 1.0) > 0.02
    assert image.min() < 0.02 and np.mean(image == 0.0) < 0.02


def test_saturation_and_hue_leave_grey_images_exactly():
    batch = random_batch(channels=1)
    got = apply(0, batch, {'name': 'color_jitter', 'saturation': 0.5, 'hue': 0.5})
    np.testing.assert_array_equal(got['image'], batch['image'])


# Policies.

SIZE = (18, 16)
RANGES = image_ops.PolicyRanges(40.0, 0.5, (6.0, 10.0), enhance=0.8, posterize=6.0)


@jax.jit
def _every_op(image, ranges):
    one = functools.partial(image_ops.policy_op, image, ranges=ranges)
    over = jax.vmap(one, (0, None, None))
    over = jax.vmap(jax.vmap(over, (None, None, 0)), (None, 0, None))
    return over(jnp.arange(14), jnp.arange(31) / 30, jnp.asarray([-1.0, 1.0]))


@functools.cache
def every_op(channels, ranges):
    """All operations on one image, as [magnitude, sign, op, H, W, C], at 31 magnitudes."""
    return np.asarray(_every_op(levels(channels, *SIZE) / np.float32(255), ranges))


def reference_op(name, image, magnitude, sign):
    amount = magnitude * sign
    geometric = {
        'rotate': lambda: (-amount * 40.0, (0, 0), (0, 0)),
        'shear_y': lambda: (0, (0.5 * amount, 0), (0, 0)),
        'shear_x': lambda: (0, (0, 0.5 * amount), (0, 0)),
        'translate_y': lambda: (0, (0, 0), (6 * amount, 0)),
        'translate_x': lambda: (0, (0, 0), (0, 10 * amount)),
    }
    if name in geometric:
        degrees, (shear_y, shear_x), shift = geometric[name]()
        angle = np.deg2rad(degrees)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = matrix @ np.array([[1, shear_y], [shear_x, 1]])
        centre = (np.array(image.shape[:2]) - 1) / 2
        offset = centre - matrix @ (centre + shift)
        channels = np.moveaxis(image / 255, -1, 0)
        settings = {'order': 0, 'mode': 'grid-constant'}
        warped = [ndimage.affine_transform(c, matrix, offset, **settings) for c in channels]
        return np.stack(warped, -1)
    photo, factor = pillow(image), 1 + 0.8 * amount
    return unpillow(
        {
            'identity': lambda: photo,
            'autocontrast': lambda: ImageOps.autocontrast(photo),
            'equalize': lambda: ImageOps.equalize(photo),
            'solarize': lambda: ImageOps.solarize(photo, 256 * (1 - magnitude)),
            'posterize': lambda: ImageOps.posterize(photo, 8 - round(6 * magnitude)),
            'saturation': lambda: ImageEnhance.Color(photo).enhance(factor),
            'contrast': lambda: ImageEnhance.Contrast(photo).enhance(factor),
            'brightness': lambda: ImageEnhance.Brightness(photo).enhance(factor),
            'sharpness': lambda: ImageEnhance.Sharpness(photo).enhance(factor),
        }[name]()
    )


@pytest.mark.parametrize('name', image_ops.POLICY_OPS)
def test_policy_operations_match_pillow_and_scipy(name):
    for channels in (1, 3):
        image = levels(channels, *SIZE)
        for level, s in itertools.product((9, 30), (0, 1)):
            got = every_op(channels, RANGES)[level, s, image_ops.POLICY_OPS.index(name)]
            expected = reference_op(name, image, level / 30, (-1, 1)[s])
            blended = name in ('saturation', 'contrast', 'brightness', 'sharpness')
            assert_same(got - blended * 0.5 / 255, expected, atol=1.2 / 255)


def policy_batch(count):
    image = levels(3, *SIZE) / np.float32(255)
    return make_batch(np.broadcast_to(image, (count, *image.shape)))


def found(images, ranges):
    """Which of [magnitude, sign, op] can have made each image: bool [B, ...]."""
    candidates = every_op(3, ranges)
    return np.stack([np.abs(candidates - x).max((-3, -2, -1)) < 1e-5 for x in images])


def test_rand_augment_draws_every_operation_in_both_directions_at_the_set_magnitude():
    spec = {'name': 'rand_augment', 'num_ops': 1, 'magnitude': 15}
    images = apply(0, policy_batch(200), spec)['image']
    moves = tuple(side * 150 / 331 for side in SIZE)
    ranges = image_ops.PolicyRanges(30.0, 0.3, moves, enhance=0.9, posterize=4.0)
    matches = found(images, ranges)[:, 15]
    assert matches.any((1, 2)).all()
    assert matches.any(0).all()


def test_rand_augment_composes_operations():
    batch = policy_batch(200)
    one, two = (
        apply(0, batch, {'name': 'rand_augment', 'num_ops': n, 'magnitude': 15}) for n in (1, 2)
    )
    moves = tuple(side * 150 / 331 for side in SIZE)
    ranges = image_ops.PolicyRanges(30.0, 0.3, moves, enhance=0.9, posterize=4.0)
    single = [found(got['image'], ranges)[:, 15].any((1, 2)).mean() for got in (one, two)]
    # One of the two is the identity with probability 1 - (13 / 14)^2 = 0.14.
    assert single[0] == 1
    assert single[1] < 0.5


def test_trivial_augment_draws_every_operation_at_every_magnitude():
    images = apply(0, policy_batch(300), {'name': 'trivial_augment'})['image']
    ranges = image_ops.PolicyRanges(135.0, 0.99, (32.0, 32.0), enhance=0.99, posterize=6.0)
    matches = found(images, ranges)
    assert matches.any((1, 2, 3)).all()
    sure = matches[matches.any((1, 2)).sum(1) == 1]
    assert set(np.flatnonzero(sure.any((0, 1, 2)))) >= set(range(14)) - {
        image_ops.POLICY_OPS.index('identity')
    }
    sure = matches[matches.any((2, 3)).sum(1) == 1]
    assert sure.any((0, 2, 3))[1:].all()


# Mixing.

MIXING = {'alpha': 0.5, 'probability': 0.7}


def mix(name, mask):
    batch = {**random_batch(channels=1, count=400), 'mask': mask}
    got = apply(0, batch, {'name': name, **MIXING})
    # Targets were one-hot, and unlike the partner's.
    return batch, got, got['target'][np.arange(400), np.arange(400) % 10]


def test_mixup_blends_image_and_target_by_the_same_share_of_a_beta():
    batch, got, share = mix('mixup', np.ones(400, bool))
    for field in ('image', 'target'):
        value = batch[field]
        weight = share.reshape(-1, *[1] * (value.ndim - 1))
        assert_same(got[field], weight * value + (1 - weight) * np.roll(value, 1, 0))
    assert 0.6 < np.mean(share < 1) < 0.8
    assert stats.kstest(share[share < 1], stats.beta(0.5, 0.5).cdf).pvalue > 1e-3


def test_cutmix_pastes_a_box_and_mixes_targets_by_its_area():
    batch, got, share = mix('cutmix', np.ones(400, bool))
    image, target = batch['image'], batch['target']
    pasted = np.any(got['image'] != image, axis=-1)
    np.testing.assert_array_equal(
        got['image'], np.where(pasted[..., None], np.roll(image, 1, 0), image)
    )
    box_of(pasted)
    assert_same(share, 1 - pasted.mean((1, 2)))
    partner = np.roll(target, 1, 0)
    assert_same(got['target'], share[:, None] * (target - partner) + partner)
    assert 0.4 < np.mean(share < 1) < 0.75
    assert share.min() < 0.3
    # Boxes are centred, and clipped, on all sides alike.
    often = pasted.mean(0)
    assert np.abs(often - often[::-1, ::-1]).mean() < 0.03


@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_padding_is_neither_mixed_nor_mixed_in(name):
    mask = np.arange(400) % 5 != 2
    batch, got, share = mix(name, mask)
    alone = ~(mask & np.roll(mask, 1))
    for field in ('image', 'target'):
        np.testing.assert_array_equal(got[field][alone], batch[field][alone])
    assert np.mean(share[~alone] < 1) > 0.4
