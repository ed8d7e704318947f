"""Test-time augmentation: its neutral setting, its symmetries, and what must not matter."""

import jax
import numpy as np
import pytest
from scipy.special import softmax

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import tta
from jaxcls.errors import UserError

SHAPE, CLASSES = (8, 8, 1), 4


def build(**fields):
    config = config_lib.get_config()
    config.update({'model': {'name': 'linear'}, **fields})
    experiment = experiment_lib.build(experiment_lib.resolve(config), SHAPE, CLASSES, 100)
    weights = np.random.default_rng(5).normal(size=(64, CLASSES)).astype(np.float32) / 4
    return experiment, {'params': {'head': {'kernel': weights, 'bias': weights[0]}}}


@pytest.fixture(scope='module')
def plain():
    return build()


def pictures(seed=0, count=6, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def averaged(experiment, variables, views):
    """The logarithm of the mean softmax of the network on some images, by SciPy."""
    predict = jax.jit(experiment.predict)
    logits = [np.float64(predict(variables, view)) for view in views]
    return np.log(np.mean(softmax(logits, axis=-1), axis=0))


@pytest.mark.parametrize('spec', ['none', '1'])
def test_one_view_is_the_plain_prediction(plain, spec):
    assert tta.make_predict(plain[0], spec) is plain[0].predict


def test_probabilities_are_averaged_over_an_image_and_its_mirror_image(plain):
    image = pictures()
    logits = jax.jit(tta.make_predict(plain[0], 'flip'))(plain[1], image)
    expected = averaged(*plain, (image, image[:, :, ::-1]))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.shape == (6, CLASSES) and logits.dtype == np.float32
    assert not np.allclose(expected, averaged(*plain, (image,)), atol=1e-3)


@pytest.mark.parametrize('spec', ['flip', 'flip_shift'])
def test_a_mirrored_image_has_the_same_prediction(plain, spec):
    predict = jax.jit(tta.make_predict(plain[0], spec))
    logits, mirrored = (predict(plain[1], image) for image in (pictures(), pictures()[:, :, ::-1]))
    np.testing.assert_allclose(logits, mirrored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('size', 'far'), [(8, 1), (64, 2)])
def test_shifts_move_by_a_pixel_or_two_and_repeat_the_edge(plain, size, far):
    image = pictures(count=1, shape=(size, size, 3))
    centre, up, down, left, right = (np.asarray(v(image)) for v in tta.VIEWS['shift'])
    np.testing.assert_array_equal(centre, image)
    np.testing.assert_array_equal(up[:, :-far], image[:, far:])
    np.testing.assert_array_equal(down[:, far:], image[:, :-far])
    np.testing.assert_array_equal(left[:, :, :-far], image[:, :, far:])
    np.testing.assert_array_equal(right[:, :, far:], image[:, :, :-far])
    np.testing.assert_array_equal(down[:, 0], image[:, 0])
    np.testing.assert_array_equal(right[:, :, 0], image[:, :, 0])
    assert len(tta.VIEWS['flip_shift']) == 10


def test_draws_of_the_augmentation_depend_on_the_seed_alone():
    experiment, variables = build(augment=[{'name': 'pad_crop', 'padding': 3}, {'name': 'mixup'}])
    image = pictures(count=7)
    others = np.concatenate([pictures(1, 4), image[::-1][:3]])

    @jax.jit
    def draw():
        four = tta.make_views(experiment, '4', seed=3)
        two = [tta.make_views(experiment, '2', seed=seed)(image)[1] for seed in (3, 4)]
        return four(image), four(others), *two

    views, of_others, again, other_seed = map(np.asarray, draw())
    # Neither the place in the batch nor what else is in it matters: padding, for one.
    np.testing.assert_array_equal(of_others[:, 4:], views[:, ::-1][:, :3])
    # The first is the image; the draws differ from each other and from those of another seed.
    np.testing.assert_array_equal(views[0], image)
    assert len({view.tobytes() for view in views}) == 4
    np.testing.assert_array_equal(again, views[1])
    assert not np.array_equal(other_seed, views[1])
    logits = jax.jit(tta.make_predict(experiment, '4', seed=3))(variables, image)
    np.testing.assert_allclose(logits, averaged(experiment, variables, views), rtol=1e-4, atol=1e-5)


def test_alternating_flip_alternates_over_the_draws():
    experiment, _ = build(augment=[{'name': 'alternating_flip'}])
    image = pictures()
    views = np.round(jax.jit(tta.make_views(experiment, '4'))(image))[1:]
    np.testing.assert_array_equal(views[0], views[2])
    np.testing.assert_array_equal(views[1], views[0][:, :, ::-1])


def test_views_are_as_many_in_parts_as_at_once(plain, monkeypatch):
    at_once = jax.jit(tta.make_predict(plain[0], 'flip'))(plain[1], pictures())
    monkeypatch.setattr(tta.jax, 'default_backend', lambda: 'gpu')
    one_by_one = jax.jit(tta.make_predict(plain[0], 'flip'))(plain[1], pictures())
    np.testing.assert_allclose(one_by_one, at_once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('spec', ['', 'flop', '0', '-2', '2.5', '²', '65', '9' * 5000])
def test_unknown_views_list_the_known_ones(plain, spec):
    known = 'must be none, flip, shift, flip_shift, flip_diagonal or the number of'
    with pytest.raises(UserError, match=known):
        tta.make_predict(plain[0], spec)


def test_a_number_needs_an_augmentation_of_one_image():
    for augment in ([], [{'name': 'mixup'}, {'name': 'cutmix'}]):
        experiment, _ = build(augment=augment)
        with pytest.raises(UserError, match='--tta=4 draws from the augmentation of the run'):
            tta.make_predict(experiment, '4')
