import inspect

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC, LinearSVC

from jaxcls import estimators, registry
from jaxcls.errors import UserError
from jaxcls.estimators import BASELINES, FEATURES

SMALL = {'random_forest': {'trees': 30}}


@pytest.fixture(scope='module')
def digits():
    """Images uint8 [N, 8, 8, 3], each class in a colour of its own, and labels: 600 and 200 of them."""
    images, label = load_digits(return_X_y=True)
    colors = np.random.default_rng(0).uniform(4, 15, (10, 3))
    images = np.uint8(images.reshape(-1, 8, 8, 1) * colors[label][:, None, None])
    return images[:600], label[:600], images[600:800], label[600:800]


def random_images(shape=(5, 16, 12, 3)):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize('features', FEATURES)
def test_every_baseline_learns_from_every_feature(digits, features):
    if features.startswith('hog'):
        pytest.importorskip('skimage')
    images, label, test_images, test_label = digits
    settings = {'features': features, 'components': 20, 'bins': 4, 'cell': 2}
    extract = BASELINES['knn'](**settings).pipeline(0)[:-1].fit(images)
    rows, test_rows = extract.transform(images), extract.transform(test_images)
    for name, factory in BASELINES.items():
        baseline = factory(**settings, **SMALL.get(name, {}))
        accuracy = baseline.classifier(0).fit(rows, label).score(test_rows, test_label)
        assert accuracy > 0.7, name  # 0.1 is chance


PLAIN = {
    'knn': KNeighborsClassifier(3),
    'logistic_regression': LogisticRegression(C=0.5, max_iter=1000),
    'svm_linear': LinearSVC(C=0.5, random_state=1),
    'svm_rbf': SVC(C=2.0, gamma=0.02, break_ties=True),
    'svm_poly': SVC(kernel='poly', C=2.0, gamma=0.02, degree=3, coef0=0.5, break_ties=True),
    'random_forest': RandomForestClassifier(30, max_depth=5, random_state=1),
}
SETTINGS = {
    'knn': {'neighbors': 3},
    'logistic_regression': {'C': 0.5},
    'svm_linear': {'C': 0.5},
    'svm_rbf': {'C': 2.0, 'gamma': 0.02},
    'svm_poly': {'C': 2.0, 'gamma': 0.02, 'degree': 3, 'coef0': 0.5},
    'random_forest': {'trees': 30, 'depth': 5},
}


@pytest.mark.parametrize('name', BASELINES)
def test_on_pixels_a_baseline_is_scikit_learn_on_pixels(digits, name):
    images, label, test_images, _ = digits
    ours = BASELINES[name](**SETTINGS[name]).pipeline(1).fit(images, label).predict(test_images)
    rows = [np.float32(x.reshape(len(x), -1)) / np.float32(255) for x in (images, test_images)]
    assert (ours == PLAIN[name].fit(rows[0], label).predict(rows[1])).all()


def test_pixels_are_in_0_to_1_and_the_images_stay_as_they_are():
    images = random_images()
    expected = images.reshape(5, -1) / np.float32(255)
    np.testing.assert_array_equal(estimators.pixels(images), expected)
    given = images.astype(np.float32)
    np.testing.assert_array_equal(estimators.pixels(given), expected)
    np.testing.assert_array_equal(given, images)


def test_pca_is_scikit_learns(digits):
    images, label = digits[:2]
    pipeline = BASELINES['knn'](features='pca', components=5).pipeline(0).fit(images, label)
    expected = PCA(5).fit_transform(images.reshape(600, -1) / 255)
    np.testing.assert_allclose(pipeline[:-1].transform(images), expected, atol=1e-4)


@pytest.mark.parametrize('gray', [True, False])
def test_hog_is_scikit_images_on_each_image(monkeypatch, gray):
    feature = pytest.importorskip('skimage.feature')
    images = random_images()[..., :1] if gray else random_images()
    expected = np.stack([
        feature.hog(
            image.squeeze(-1) if gray else image, orientations=6, pixels_per_cell=(5, 5),
            cells_per_block=(2, 2), channel_axis=None if gray else -1,
        )
        for image in images
    ])  # fmt: skip
    found = estimators.hog(images, orientations=6, cell=5, block=2)
    assert found.dtype == np.float32 and found.shape == (5, 2 * 1 * 4 * 6)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_hog_without_scikit_image_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'skimage', None)
    with pytest.raises(UserError, match=r"pip install 'jaxcls\[hog\]'"):
        estimators.hog(random_images(), 9, 4, 2)


def test_a_color_histogram_counts_the_pixels_of_each_color():
    image = np.uint8([[[0, 0, 0], [127, 0, 0], [128, 0, 255], [255, 255, 255]]])  # 1 x 4
    counts = np.zeros(8)
    counts[0b000], counts[0b101], counts[0b111] = 2, 1, 1
    found = estimators.color_histogram(image[None], bins=2)
    np.testing.assert_allclose(found, np.sqrt(counts / 4)[None])


@pytest.mark.parametrize('bins', [2, 3, 7, 16, 256])
def test_gray_histograms_are_numpys(bins):
    images = random_images((4, 6, 6, 1))
    edges = np.arange(bins + 1) * 256 / bins
    expected = [np.histogram(image, bins=edges)[0] / 36 for image in images]
    np.testing.assert_allclose(estimators.color_histogram(images, bins) ** 2, expected, atol=1e-6)


def test_features_side_by_side_are_those_of_each():
    pytest.importorskip('skimage')
    images = random_images()

    def features(name):
        return BASELINES['knn'](features=name).pipeline()[:-1].fit_transform(images)

    both = np.concatenate([features('hog'), features('color_histogram')], axis=1)
    assert (features('hog_color') == both).all()


@pytest.mark.parametrize('name', BASELINES)
def test_a_config_can_set_every_argument(name):
    arguments = inspect.signature(BASELINES[name]).parameters
    assert registry.defaults(BASELINES[name]).keys() == arguments.keys()
    ranged = {k for k, v in registry.defaults(BASELINES[name]).items() if type(v) in (int, float)}
    assert ranged <= estimators._RANGES.keys()


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('knn', {'features': 'hogg'}, "Did you mean 'hog'"),
        ('knn', {'metric': 'euclid'}, "Did you mean 'euclidean'"),
        ('knn', {'neighbors': 0}, 'neighbors is 0; it must be from 1'),
        ('svm_rbf', {'C': -1.0}, 'C is -1.0'),
        ('svm_poly', {'gamma': float('nan')}, 'gamma is nan'),
        ('random_forest', {'bins': 1}, 'bins is 1'),
    ],
)
def test_a_mistake_in_an_argument_is_a_user_error(name, arguments, message):
    with pytest.raises(UserError, match=message):
        BASELINES[name](**arguments)


def test_settings_that_do_not_fit_the_images_are_user_errors():
    with pytest.raises(UserError, match=r'16x12 images needs blocks of at most 12 pixels; .* 14'):
        estimators.hog(random_images(), 9, 7, 2)
    with pytest.raises(UserError, match='too many for 3 channels; give at most 32'):
        estimators.color_histogram(random_images(), 33)
    assert estimators.color_histogram(random_images(), 32).shape == (5, 2**15)
