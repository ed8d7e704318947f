"""The common corruptions, against SciPy, Pillow, scikit-image and NumPy on images of several shapes."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxcls import attacks, corruptions, filters, jpeg
from jaxcls.errors import UserError

NAMES = list(corruptions.CORRUPTIONS)
RANDOM = {
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'glass_blur', 'motion_blur', 'snow', 'frost',
    'fog', 'elastic_transform',
}  # fmt: skip


def photo(height=32, width=32, channels=3, count=3, seed=0):
    """Smooth blobs with edges and a little noise, in 256 levels: uint8 [B, H, W, C]."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(
        rng.normal(size=(count, height, width, channels)), (0, 3, 3, 0)
    )
    smooth = smooth / np.abs(smooth).max((1, 2, 3), keepdims=True)
    edges = 0.25 * (smooth[..., :1] > 0.1)
    noisy = 0.4 + 0.35 * smooth + edges + 0.01 * rng.normal(size=smooth.shape)
    return np.uint8(255 * np.clip(noisy, 0, 1))


def keys(count=3, seed=0):
    return attacks.example_keys(jax.random.key(seed), jnp.arange(count))


def corrupt(kind, severity, image, keys_=None):
    return np.asarray(
        corruptions.corrupt(keys(len(image)) if keys_ is None else keys_, image, kind, severity)
    )


IMAGE = photo()
FLOAT = IMAGE.astype(np.float32) / 255


@pytest.fixture(scope='module')
def found():
    """By kind and severity."""
    return {(kind, s): corrupt(kind, s, FLOAT) for kind in NAMES for s in (1, 3, 5)}


@pytest.mark.parametrize('kind', NAMES)
def test_every_severity_changes_the_image_and_stays_in_the_range(found, kind):
    for severity in (1, 3, 5):
        image = found[kind, severity]
        assert image.shape == FLOAT.shape and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1
        assert np.abs(image - FLOAT).mean() > 1e-4


@pytest.mark.parametrize(
    'kind',
    [kind for kind in NAMES if kind not in ('elastic_transform', 'glass_blur', 'snow', 'frost')],
)
def test_a_higher_severity_changes_more(found, kind):
    change = [np.abs(found[kind, severity] - FLOAT).mean() for severity in (1, 3, 5)]
    assert change == sorted(change), change


@pytest.mark.parametrize('kind', NAMES)
def test_an_example_depends_on_its_own_key_alone(found, kind):
    order = np.array([2, 0, 1])
    again = corrupt(kind, 3, FLOAT[order], keys()[order])
    np.testing.assert_allclose(again, found[kind, 3][order], atol=1e-5)
    others = corrupt(kind, 3, FLOAT, keys(seed=1))
    assert np.allclose(others, found[kind, 3], atol=1e-5) == (kind not in RANDOM)


@pytest.mark.parametrize('kind', NAMES[3:])  # the first are noises of any shape
def test_grey_images_that_are_not_square_and_levels_work(kind):
    image = photo(24, 32, 1)
    result = corrupt(kind, 5, image)
    assert result.shape == image.shape and result.dtype == np.uint8 and (result != image).any()


def test_noises_have_the_moments_of_their_definitions():
    flat = np.full_like(FLOAT, 0.5)
    noisy = corrupt('gaussian_noise', 5, flat) - 0.5
    np.testing.assert_allclose([noisy.std(), noisy.mean()], [0.1, 0.0], atol=0.004)
    shot = corrupt('shot_noise', 5, flat)
    np.testing.assert_allclose([shot.std(), shot.mean()], [np.sqrt(0.5 / 50), 0.5], atol=0.004)
    np.testing.assert_allclose(shot * 50, np.round(shot * 50), atol=1e-3)
    impulse = corrupt('impulse_noise', 5, flat)
    np.testing.assert_allclose([np.mean(impulse == v) for v in (0, 1)], 0.035, atol=0.006)
    assert set(np.unique(impulse)) == {0, 0.5, 1}


def test_brightness_is_value_in_hsv(found):
    color = pytest.importorskip('skimage.color')
    for severity, amount in ((1, 0.05), (5, 0.3)):
        hsv = color.rgb2hsv(FLOAT)
        hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
        np.testing.assert_allclose(found['brightness', severity], color.hsv2rgb(hsv), atol=1e-5)
    grey = corrupt('brightness', 5, FLOAT[..., :1])
    np.testing.assert_allclose(grey, np.minimum(FLOAT[..., :1] + 0.3, 1), atol=1e-6)


def test_contrast_is_about_the_mean_of_each_channel(found):
    mean = FLOAT.mean((1, 2), keepdims=True)
    expected = np.clip((FLOAT - mean) * 0.15 + mean, 0, 1)
    np.testing.assert_allclose(found['contrast', 5], expected, atol=1e-6)


def test_defocus_is_a_convolution_with_a_disk(found):
    # Of radius 1.5: all nine pixels, whose smoothing by a Gaussian of sigma 0.1 is nothing.
    expected = ndimage.convolve(FLOAT, np.full((1, 3, 3, 1), 1 / 9), mode='mirror')
    np.testing.assert_allclose(found['defocus_blur', 5], expected, atol=1e-5)
    for radius, sigma in ((0.4, 0.5), (6, 0.5), (10, 0.5)):
        kernel = filters.disk(radius, sigma)
        assert kernel.sum() == pytest.approx(1, abs=0.02) and len(kernel) % 2
        np.testing.assert_allclose(kernel, kernel.T)


def test_gaussian_and_zoom_are_scipys():
    blurred = ndimage.gaussian_filter(FLOAT, (0, 1.3, 1.3, 0), mode='nearest')
    np.testing.assert_allclose(filters.gaussian(FLOAT, 1.3), blurred, atol=1e-5)
    # 26 of 32 pixels, enlarged to 32: nothing to trim.
    zoomed = ndimage.zoom(FLOAT[:, 3:29, 3:29], (1, 1.25, 1.25, 1), order=1)
    top = (zoomed.shape[1] - 32) // 2
    expected = zoomed[:, top : top + 32, top : top + 32]
    np.testing.assert_allclose(filters.zoom(FLOAT, 1.25), expected, atol=1e-5)


def test_zoom_blur_is_the_mean_over_factors(found):
    images = [FLOAT, *(np.asarray(filters.zoom(FLOAT, f)) for f in np.arange(1, 1.16, 0.01))]
    np.testing.assert_allclose(found['zoom_blur', 3], np.mean(images, 0), atol=1e-5)


@pytest.mark.parametrize(('degrees', 'axis'), [(0, 1), (-90, 0)])
def test_motion_blur_smears_a_point_along_its_direction(degrees, axis):
    image = np.zeros((1, 25, 25, 1), np.float32)
    image[0, 12, 12] = 1
    spread = np.asarray(filters.smear(image, jnp.array([float(degrees)]), 4, 2.0))[0, ..., 0]
    half = np.exp(-(np.arange(9) ** 2) / 8)
    line = spread[12] if axis else spread[:, 12]
    np.testing.assert_allclose(spread.sum(), 1, rtol=1e-5)
    tail = line[12::-1] if line[11] else line[12:]
    np.testing.assert_allclose(tail[:9], half / half.sum(), rtol=1e-5)


def test_glass_blur_only_moves_pixels(found):
    # The sigma of severity 1 is so small that it blurs nothing.
    pixels, moved = (x.reshape(3, -1, 3) for x in (FLOAT, found['glass_blur', 1]))
    np.testing.assert_allclose(np.sort(moved, axis=1), np.sort(pixels, axis=1), atol=1e-6)
    assert np.mean(moved != pixels) > 0.3


def test_large_images_have_the_parameters_of_imagenet():
    image = photo(65, 70, 1, 1).astype(np.float32) / 255
    expected = (image - image.mean()) * 0.05 + image.mean()
    np.testing.assert_allclose(corrupt('contrast', 5, image), expected, atol=1e-6)


def test_pixelate_is_pillows_box_filter(found):
    for severity, size in ((1, 30), (5, 20)):
        for image, ours in zip(IMAGE, found['pixelate', severity], strict=True):
            small = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
            theirs = np.asarray(small.resize((32, 32), Image.Resampling.BOX)) / 255
            np.testing.assert_allclose(ours, theirs, atol=1.01 / 255)


def pillow_jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
        buffer, 'JPEG', quality=quality
    )
    return np.asarray(Image.open(buffer)).reshape(image.shape)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(('size', 'quality'), [((32, 32), 80), ((32, 32), 40), ((21, 43), 15)])
def test_jpeg_is_pillows(channels, size, quality):
    image = photo(*size, channels, 2, seed=3)
    ours = np.round(255 * np.asarray(jpeg.compress(image.astype(np.float32) / 255, quality)))
    theirs = np.stack([pillow_jpeg(x, quality) for x in image]).astype(float)
    difference = np.abs(ours - theirs)
    lost = np.abs(theirs - image).mean()
    assert lost > 1 and difference.mean() < 0.15 * lost, (difference.mean(), lost)
    assert np.quantile(difference, 0.95) <= 4


def test_fractals_fill_the_range_and_are_smoother_the_faster_they_decay():
    rough, smooth = (np.asarray(filters.fractal(keys(), 32, 32, d))[..., 0] for d in (1.5, 3.0))
    for image in (rough, smooth):
        assert image.shape == (3, 32, 32)
        np.testing.assert_allclose([image.min(), image.max()], [0, 1], atol=1e-6)
    assert np.abs(np.diff(smooth, axis=1)).mean() < 0.6 * np.abs(np.diff(rough, axis=1)).mean()


def test_fog_keeps_the_brightest_value_and_takes_contrast(found):
    assert np.all(found['fog', 3].max((1, 2, 3)) <= FLOAT.max((1, 2, 3)) + 1e-5)
    # An image of one value shows the fractal.
    expected = (0.5 + np.asarray(filters.fractal(keys(), 32, 32, 1.75)) * 1.5) * 0.5 / 2.0
    fogged = corrupt('fog', 5, np.full_like(FLOAT, 0.5))
    np.testing.assert_allclose(fogged, np.broadcast_to(expected, fogged.shape), atol=1e-5)


def test_elastic_without_displacement_moves_straight_lines_to_straight_lines():
    ramp = np.linspace(0.2, 0.8, 32, dtype=np.float32)[:, None]
    image = np.broadcast_to(ramp, FLOAT.shape)
    moved = corrupt('elastic_transform', 1, image)[:, 8:24, 8:24]  # away from mirrored edges
    assert np.abs(moved - image[:, 8:24, 8:24]).max() > 0.01
    np.testing.assert_allclose(np.diff(moved, 2, axis=1), 0, atol=2e-3)
    np.testing.assert_allclose(np.diff(moved, 2, axis=2), 0, atol=2e-3)


@pytest.mark.parametrize('mode', ['mirror', 'reflect'])
def test_sampling_is_scipys(mode):
    places = np.random.default_rng(0).uniform(-6, 38, (3, 32, 32, 2)).astype(np.float32)
    ours = np.asarray(filters.sample(FLOAT, jnp.asarray(places), mode))
    for image, place, result in zip(FLOAT, places, ours, strict=True):
        for c in range(3):
            expected = ndimage.map_coordinates(
                image[..., c], np.moveaxis(place, -1, 0), order=1, mode=mode
            )
            np.testing.assert_allclose(result[..., c], expected, atol=1e-4)


def test_unknown_kinds_and_severities_say_so():
    with pytest.raises(UserError, match="corruption is 'rain'; it must be one of gaussian_noise, "):
        corrupt('rain', 1, FLOAT)
    with pytest.raises(UserError, match='severity is 6; it must be 1, 2, 3, 4 or 5'):
        corrupt('fog', 6, FLOAT)
