"""Classical classifiers of scikit-learn by name, on pixels, PCA, HOG or colour histograms.

What the networks are to Flax, these are to scikit-learn: plain-data fields, and a pipeline from
uint8 images [N, H, W, C] to classes. scikit-learn and scikit-image are imported as they are needed.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from jaxcls import registry
from jaxcls.errors import UserError, require

# Names of features: what is extracted, side by side, and whether PCA follows.
FEATURES = {
    'pixels': (('pixels',), False),
    'pca': (('pixels',), True),
    'hog': (('hog',), False),
    'hog_pca': (('hog',), True),
    'color_histogram': (('color_histogram',), False),
    'hog_color': (('hog', 'color_histogram'), False),
}
METRICS = ('euclidean', 'manhattan', 'cosine')
# Every number that a config may set: its lowest and highest value.
_RANGES = {
    'components': (1, 100_000),
    'orientations': (2, 180),
    'cell': (2, 4096),
    'block': (1, 64),
    'bins': (2, 256),
    'neighbors': (1, 10_000),
    'C': (1e-12, 1e12),
    'gamma': (0.0, 1e12),
    'degree': (1, 20),
    'coef0': (-1e6, 1e6),
    'iterations': (1, 1_000_000),
    'trees': (1, 100_000),
    'depth': (0, 100_000),
}
_MAX_COLORS = 2**15
# Below this many images, starting processes costs more than it saves.
_MIN_PARALLEL = 5_000
_CACHE_MB = 1000  # of kernel values, while an SVM is fitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A classifier and the features that it sees; the base of those in `BASELINES`.

    Args:
      features: 'pixels', in [0, 1]; 'pca', their principal components, not whitened;
        'hog', histograms of oriented gradients; 'hog_pca'; 'color_histogram'; 'hog_color', both side
        by side.
      components: of PCA.
      orientations: of HOG, between 0 and 180 degrees.
      cell: of HOG, pixels wide; at each pixel the channel of the greatest gradient counts.
      block: of HOG, cells wide: neighbours that are normalised together.
      bins: of the colour histogram, along each channel.
    """

    features: str = 'pixels'
    components: int = 50
    orientations: int = 9
    cell: int = 4
    block: int = 2
    bins: int = 8

    def __post_init__(self):
        registry.lookup(FEATURES, self.features, 'features')
        for field in dataclasses.fields(self):
            if field.name in _RANGES:
                value, (low, high) = getattr(self, field.name), _RANGES[field.name]
                require(low <= value <= high, field.name, value, f'from {low:g} to {high:g}')

    @property
    def votes(self) -> int:
        """How many voters the class probabilities are shares of; 0 where they are none."""
        return 0

    def classifier(self, seed: int) -> Any:
        """The unfitted scikit-learn classifier."""
        raise NotImplementedError

    def pipeline(self, seed: int = 0) -> Any:
        """The unfitted pipeline: uint8 [N, H, W, C] to features float32 [N, D], then the classifier."""
        from sklearn.decomposition import PCA
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import FunctionTransformer

        parts, reduce = FEATURES[self.features]
        extractors = {
            'pixels': pixels,
            'hog': functools.partial(
                hog, orientations=self.orientations, cell=self.cell, block=self.block
            ),
            'color_histogram': functools.partial(color_histogram, bins=self.bins),
        }
        extract = functools.partial(_side_by_side, [extractors[part] for part in parts])
        steps = [('features', FunctionTransformer(extract))]
        if reduce:
            steps += [('pca', PCA(self.components, random_state=seed))]
        return Pipeline([*steps, ('classifier', self.classifier(seed))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestNeighbors(Baseline):
    """The majority of the nearest training examples; the first class of equals.

    Cover & Hart 1967, https://doi.org/10.1109/TIT.1967.1053964.

    Args:
      neighbors: how many vote.
      metric: 'euclidean', 'manhattan' or 'cosine'.
      by_distance: whether votes weigh 1 / distance.
    """

    neighbors: int = 3
    metric: str = 'euclidean'
    by_distance: bool = False

    def __post_init__(self):
        super().__post_init__()
        registry.lookup(dict.fromkeys(METRICS), self.metric, 'metric')

    @property
    def votes(self) -> int:
        return self.neighbors

    def classifier(self, seed: int) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        weights = 'distance' if self.by_distance else 'uniform'
        return KNeighborsClassifier(
            self.neighbors, weights=weights, metric=self.metric, algorithm='brute', n_jobs=-1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticRegression(Baseline):
    """Softmax regression with an L2 penalty, solved to the end by L-BFGS.

    Args:
      C: weight of the summed losses against the penalty.
      iterations: of L-BFGS, at most; scikit-learn warns where they do not suffice.
    """

    C: float = 0.1
    iterations: int = 1000

    def classifier(self, seed: int) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=self.C, max_iter=self.iterations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSVM(Baseline):
    """A linear SVM for each class against the rest, with squared hinge loss.

    Fan et al. 2008 (LIBLINEAR), https://www.jmlr.org/papers/v9/fan08a.html.

    Args:
      C: weight of the summed losses against the penalty.
      iterations: at most; scikit-learn warns where they do not suffice.
    """

    C: float = 0.1
    iterations: int = 1000

    def classifier(self, seed: int) -> Any:
        from sklearn.svm import LinearSVC

        return LinearSVC(C=self.C, dual='auto', max_iter=self.iterations, random_state=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RBFSVM(Baseline):
    """An SVM with the kernel exp(-gamma |x - y|^2), one class against one.

    Cortes & Vapnik 1995, https://doi.org/10.1007/BF00994018. Its time grows with the square of the
    examples.

    Args:
      C: weight of the summed hinge losses against the margin.
      gamma: 0 is 1 / (D Var(x)), which does not change with the scale of the features.
    """

    C: float = 10.0
    gamma: float = 0.0

    def classifier(self, seed: int) -> Any:
        return _svc(kernel='rbf', C=self.C, gamma=self.gamma or 'scale')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolynomialSVM(Baseline):
    """An SVM with the kernel (gamma x.y + coef0)^degree, one class against one.

    Degree 4 is the SVM of LeCun et al. 1998, https://doi.org/10.1109/5.726791.

    Args:
      C: weight of the summed hinge losses against the margin.
      gamma: 0 is 1 / (D Var(x)).
    """

    C: float = 10.0
    gamma: float = 0.0
    degree: int = 4
    coef0: float = 1.0

    def classifier(self, seed: int) -> Any:
        gamma = self.gamma or 'scale'
        return _svc(kernel='poly', C=self.C, gamma=gamma, degree=self.degree, coef0=self.coef0)


def _svc(**settings) -> Any:
    from sklearn.svm import SVC

    # Without break_ties, `predict` is not always the greatest of `decision_function`.
    return SVC(**settings, decision_function_shape='ovr', break_ties=True, cache_size=_CACHE_MB)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomForest(Baseline):
    """Trees on bootstrap samples, each split the best of sqrt(D) features drawn at random.

    Breiman 2001, https://doi.org/10.1023/A:1010933404324.

    Args:
      trees: how many.
      depth: of a tree, at most; 0 is no limit.
    """

    trees: int = 300
    depth: int = 0

    @property
    def votes(self) -> int:
        return self.trees

    def classifier(self, seed: int) -> Any:
        from sklearn.ensemble import RandomForestClassifier

        depth = self.depth or None
        return RandomForestClassifier(self.trees, max_depth=depth, random_state=seed, n_jobs=-1)


BASELINES = {
    'knn': NearestNeighbors,
    'logistic_regression': LogisticRegression,
    'svm_linear': LinearSVM,
    'svm_rbf': RBFSVM,
    'svm_poly': PolynomialSVM,
    'random_forest': RandomForest,
}


def pixels(images: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] in a row: uint8 [N, H, W, C] -> float32 [N, H * W * C].

    Not shifted by a mean, as for networks: with their background at 0, MNIST's digits are fitted by
    the linear classifiers up to ten times faster (measured), and others do not notice.
    """
    values = np.array(images, np.float32)
    values /= 255  # in place: training sets are large
    return values.reshape(len(values), -1)


def hog(images: np.ndarray, orientations: int, cell: int, block: int) -> np.ndarray:
    """Histograms of oriented gradients: uint8 [N, H, W, C] -> float32 [N, D].

    Every block of neighbouring cells, a cell apart, is normalised by 'L2-Hys'; pixels beyond the last
    whole cell are left out. Dalal & Triggs 2005, https://doi.org/10.1109/CVPR.2005.177.

    Raises:
      UserError: scikit-image is missing, or a block is larger than the image.
    """
    height, width = images.shape[1:3]
    if min(height, width) // cell < block:
        raise UserError(
            f'HOG of {height}x{width} images needs blocks of at most {min(height, width)} pixels; '
            f'config.model.cell {cell} times config.model.block {block} is {cell * block}.'
        )
    try:
        from skimage import feature
    except ImportError:
        raise UserError(
            "HOG features need scikit-image: pip install 'jaxcls[hog]', or choose other features."
        ) from None
    from joblib import Parallel, delayed

    of_one = delayed(
        functools.partial(
            feature.hog,
            orientations=orientations,
            pixels_per_cell=(cell, cell),
            cells_per_block=(block, block),
            channel_axis=-1,
        )
    )
    run = Parallel(n_jobs=-1 if len(images) >= _MIN_PARALLEL else 1, return_as='generator')
    rows = (row.astype(np.float32) for row in run(of_one(image) for image in images))
    size = (height // cell - block + 1) * (width // cell - block + 1) * block**2 * orientations
    return np.fromiter(rows, np.dtype((np.float32, (size,))), len(images))


def color_histogram(images: np.ndarray, bins: int) -> np.ndarray:
    """Square roots of the shares of pixels by colour: uint8 [N, H, W, C] -> float32 [N, bins**C].

    Each channel's 256 levels are cut into `bins` even parts; the last channel's part changes
    fastest. Of roots, the Euclidean distance is Hellinger's, and no colour of much area drowns the
    others. Swain & Ballard 1991, https://doi.org/10.1007/BF00130487; Chapelle et al. 1999,
    https://doi.org/10.1109/72.788646 (the root).

    Raises:
      UserError: too many colours.
    """
    count, channels = len(images), images.shape[-1]
    colors = bins**channels
    if colors > _MAX_COLORS:
        most = math.floor(_MAX_COLORS ** (1 / channels) + 1e-9)
        raise UserError(
            f'config.model.bins {bins} is too many for {channels} channels; give at most {most}.'
        )
    weights = bins ** np.arange(channels)[::-1]
    histograms = np.empty((count, colors), np.float32)
    for i in range(count):
        color = (images[i].reshape(-1, channels).astype(np.int64) * bins // 256) @ weights
        histograms[i] = np.bincount(color, minlength=colors)
    return np.sqrt(histograms / (images.shape[1] * images.shape[2]))


def _side_by_side(extractors, images: np.ndarray) -> np.ndarray:
    parts = [extract(images) for extract in extractors]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
