"""Which pixels, or which places of a feature map, a network's answer hangs on.

Every method is a function of a `Network`, one image and one class, and returns a map of the image. A
network is asked in batches of one size, so that all methods together compile three programs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxcls import registry
from jaxcls.errors import UserError, require

# (variables, float [N, H, W, C] in [0, 1]) -> (logits [N, K], features).
Forward = Callable[[Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

SAMPLES = 32  # of SmoothGrad


class Network(NamedTuple):
    """A trained network as its explanations see it. Images are float32 [N, H, W, C] in [0, 1].

    Attributes:
      logits: `images -> [N, K]`.
      gradients: `(images, label) -> [N, H, W, C]`, of the label's logit.
      maps: `(images, label) -> (activation, gradient)`, both [N, h, w, D], of the feature.
      head: the kernel of the last linear layer, [D, K].
    """

    logits: Callable[[np.ndarray], np.ndarray]
    gradients: Callable[[np.ndarray, int], np.ndarray]
    maps: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    head: np.ndarray


def make_network(
    forward: Forward,
    variables: Any,
    image_shape: tuple[int, int, int],
    feature: str = '',
    maps: bool = True,
) -> Network:
    """Compiles what the methods ask a network for, each at its first use.

    Args:
      forward: in evaluation mode: no image of a batch may have a say in another's logits.
      feature: the feature of `Network.maps`; '' is the last that has rows and columns, all of which have
        a say: of a transformer that reads the class token alone, its last block's have none.
      maps: whether they will be asked for; a network without such a feature has none.

    Raises:
      UserError: no such feature, or one without rows and columns.
    """
    size = 16 if np.prod(image_shape) <= 64 * 64 * 3 else 4
    abstract = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)

    def logit_sum(variables, images, label):
        logits = forward(variables, images)[0]
        return jnp.take(logits, label, axis=-1).sum()

    logits = jax.jit(lambda variables, images: forward(variables, images)[0])
    gradients = jax.jit(jax.grad(logit_sum, argnums=1))
    of_feature = jax.jit(functools.partial(_feature_gradient, forward), static_argnums=3)
    if maps or feature:

        def has_a_say(name):
            images = np.random.default_rng(0).random(abstract.shape, np.float32)
            return bool(np.any(of_feature(variables, images, np.int32(0), name)[1]))

        feature = _find_feature(forward, variables, abstract, feature, has_a_say)

    def maps_of_feature(variables, images, label):
        return of_feature(variables, images, label, feature)

    def ask(function, images, *label):
        label = [np.int32(value) for value in label]
        parts = []
        for start in range(0, len(images), size):
            part = np.asarray(images[start : start + size], np.float32)
            padded = np.concatenate(
                [part, np.zeros((size - len(part), *part.shape[1:]), np.float32)]
            )
            parts.append(jax.device_get(function(variables, padded, *label)))
        return jax.tree.map(lambda *xs: np.float32(np.concatenate(xs)[: len(images)]), *parts)

    return Network(
        lambda images: ask(logits, images),
        lambda images, label: ask(gradients, images, label),
        lambda images, label: ask(maps_of_feature, images, label),
        np.asarray(variables['params']['head']['kernel'], np.float32),
    )


def _find_feature(
    forward: Forward, variables, images, feature: str, has_a_say: Callable[[str], bool]
) -> str:
    order = []  # a traced dict comes back sorted

    def traced(variables, images):
        features = forward(variables, images)[1]
        order.extend(features)
        return features

    shapes = {name: leaf.shape for name, leaf in jax.eval_shape(traced, variables, images).items()}
    spatial = [name for name in order if _grid(shapes[name])]
    if feature in spatial:
        if len(shapes[feature]) == 3 and not has_a_say(feature):
            raise UserError(
                f'--feature={feature!r} has rows and columns, and none has a say: the head reads the class '
                'token alone. Take an earlier one, or leave --feature out.'
            )
        return feature
    if feature:
        raise UserError(
            f'--feature={feature!r} is no feature with rows and columns. '
            f'{registry.did_you_mean(feature, spatial)}'
        )
    if not spatial:
        raise UserError(
            'The network has no feature with rows and columns, which Grad-CAM needs. Take another '
            f'method: {", ".join(name for name in METHODS if name not in OF_FEATURES)}.'
        )
    # Of images the last is read as a whole, of tokens maybe the class's alone.
    return next((f for f in spatial[::-1] if len(shapes[f]) == 4 or has_a_say(f)), spatial[-1])


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a feature, [N, h, w, D] or tokens [N, T, D]; () where it has none."""
    if len(shape) == 4 and shape[1] * shape[2] > 1:
        return shape[1], shape[2]
    side = round(shape[1] ** 0.5) if len(shape) == 3 else 0
    # A transformer's tokens: those of the image, in rows, and maybe a first one for the class.
    return (side, side) if side > 1 and shape[1] - side**2 in (0, 1) else ()


def _feature_gradient(forward: Forward, variables, images, label, feature: str):
    """A feature and the gradient of the label's logit with respect to it, both [N, h, w, D].

    The features that a model returns are steps on the way to its logits: its jaxpr is cut in two there.
    """
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(variables, images)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    place = next(i for i, path in enumerate(paths) if getattr(path[-1], 'key', None) == feature)
    before, after = _cut(closed.jaxpr, closed.jaxpr.outvars[place])
    inputs = jax.tree.leaves((variables, images))
    value, *others = jax.core.eval_jaxpr(before, closed.consts, *inputs)

    def logit_sum(value):
        logits, *_ = jax.core.eval_jaxpr(after, (), value, *others)
        return jnp.take(logits, label, axis=-1).sum()

    gradient = jax.grad(logit_sum)(value)
    rows, columns = _grid(value.shape)

    def as_grid(x):
        x = x[:, -rows * columns :] if x.ndim == 3 else x
        return x.reshape(len(x), rows, columns, x.shape[-1]).astype(jnp.float32)

    return as_grid(value), as_grid(gradient)


def _cut(jaxpr, variable):
    """The part of a jaxpr that ends with a variable, and the rest.

    The first returns the variable and whatever else the second reads; the second takes these.
    """
    made = next(i for i, eqn in enumerate(jaxpr.eqns) if variable in eqn.outvars) + 1
    rest = jaxpr.eqns[made:]
    own = {output for eqn in rest for output in eqn.outvars}
    read = [*(atom for eqn in rest for atom in eqn.invars), *jaxpr.outvars]
    read = {atom: None for atom in read if not isinstance(atom, Literal) and atom not in own}
    handed = [variable, *(atom for atom in read if atom is not variable)]
    before = jaxpr.replace(eqns=jaxpr.eqns[:made], outvars=handed)
    return before, jaxpr.replace(eqns=rest, constvars=[], invars=handed)


def saliency(network: Network, image: np.ndarray, label: int) -> np.ndarray:
    """|d logit / d pixel|, the largest of the channels: float32 [H, W].

    Simonyan et al. 2013, https://arxiv.org/abs/1312.6034.
    """
    return np.abs(network.gradients(image[None], label)[0]).max(-1)


def smooth_grad(
    network: Network, image: np.ndarray, label: int, noise: float = 0.15, seed: int = 0
) -> np.ndarray:
    """`saliency` of the mean gradient over noisy copies of the image: float32 [H, W].

    Smilkov et al. 2017, https://arxiv.org/abs/1706.03825.

    Args:
      noise: standard deviation, as a share of the image's range. 0 is `saliency`.
    """
    random = np.random.default_rng(seed).standard_normal((SAMPLES, *image.shape), np.float32)
    noisy = image + noise * (image.max() - image.min()) * random
    return np.abs(network.gradients(noisy, label).mean(0)).max(-1)


def integrated_gradients(
    network: Network,
    image: np.ndarray,
    label: int,
    baseline: np.ndarray | float = 0.0,
    steps: int = 64,
) -> np.ndarray:
    """(image - baseline) times the mean gradient on the line between: float32 [H, W, C].

    Their sum is the difference of the logits of image and baseline, up to the error of the integral
    (`completeness`). Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365.

    Args:
      baseline: what stands for nothing: black by default.
      steps: points of the Gauss-Legendre rule.
    """
    require(steps >= 1, 'steps', steps, 'at least 1')
    points, weights = np.polynomial.legendre.leggauss(steps)
    points, weights = (points + 1) / 2, weights / 2  # from [-1, 1] to [0, 1]
    difference = image - np.broadcast_to(np.float32(baseline), image.shape)
    line = (image - difference) + points[:, None, None, None].astype(np.float32) * difference
    mean = np.tensordot(weights.astype(np.float32), network.gradients(line, label), 1)
    return difference * mean


def completeness(
    network: Network,
    image: np.ndarray,
    label: int,
    attribution: np.ndarray,
    baseline: np.ndarray | float = 0.0,
) -> float:
    """How far attributions are from summing to the difference of the logits, as a share of it."""
    pair = np.stack([image, np.broadcast_to(np.float32(baseline), image.shape)])
    logits = network.logits(pair)[:, label]
    difference = float(logits[0] - logits[1])
    return abs(float(attribution.sum()) - difference) / max(abs(difference), 1e-6)


def occlusion(
    network: Network, image: np.ndarray, label: int, window: int = 0, fill: float = 0.5
) -> np.ndarray:
    """How far the logit falls where a grey square hides a place: float32 [H, W].

    The square moves by half its side; a pixel has the mean of the squares that hide it. Zeiler &
    Fergus 2013, https://arxiv.org/abs/1311.2901.

    Args:
      window: side of the square; 0 is a quarter of the image's, at least 2.
    """
    height, width = image.shape[:2]
    window = window or max(2, min(height, width) // 4)
    stride = max(1, window // 2)
    places = [
        (top, left)
        for top in range(0, max(1, height - window + stride), stride)
        for left in range(0, max(1, width - window + stride), stride)
    ]
    hidden = np.repeat(image[None], len(places) + 1, 0)
    for copy, (top, left) in zip(hidden[1:], places, strict=True):
        copy[top : top + window, left : left + window] = fill
    logits = network.logits(hidden)[:, label]
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for (top, left), logit in zip(places, logits[1:], strict=True):
        square = np.s_[top : top + window, left : left + window]
        total[square] += logits[0] - logit
        count[square] += 1
    return np.float32(total / np.maximum(count, 1))


def grad_cam(network: Network, image: np.ndarray, label: int) -> np.ndarray:
    """The feature's maps, each weighted by its mean gradient, where positive: float32 [H, W].

    Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391. For a transformer, of the grid of tokens.
    """
    activation, gradient = (x[0] for x in network.maps(image[None], label))
    return _enlarged(np.maximum(activation @ gradient.mean((0, 1)), 0), image.shape)


def cam(network: Network, image: np.ndarray, label: int) -> np.ndarray:
    """The feature's maps, each weighted as the head weights its mean: float32 [H, W].

    For networks whose head reads the mean of the feature over rows and columns. Zhou et al. 2016,
    https://arxiv.org/abs/1512.04150.

    Raises:
      UserError: the head reads something else.
    """
    activation, gradient = (x[0] for x in network.maps(image[None], label))
    weights = network.head[:, label]
    mean = np.broadcast_to(
        weights / np.prod(activation.shape[:2]), activation.shape[:2] + weights.shape
    )
    if activation.shape[-1] != len(weights) or not np.allclose(
        gradient, mean, rtol=1e-3, atol=1e-5 * np.abs(weights).max()
    ):
        raise UserError(
            "CAM needs a head that reads the feature's mean over rows and columns, as a ResNet's does. "
            "Take 'grad_cam', which is the same there and works for others."
        )
    return _enlarged(np.maximum(activation @ weights, 0), image.shape)


def _enlarged(heat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.image.resize(heat, shape[:2], 'linear'), np.float32)


def at_random(network: Network, image: np.ndarray, label: int, seed: int = 0) -> np.ndarray:
    """Noise that knows nothing of the network, for comparison: float32 [H, W]."""
    del network, label
    digest = int(np.abs(image).sum(dtype=np.float64) * 1e3)
    return np.random.default_rng([seed, digest]).random(image.shape[:2], np.float32)


METHODS: dict[str, Callable[[Network, np.ndarray, int], np.ndarray]] = {
    'saliency': saliency,
    'smooth_grad': smooth_grad,
    'integrated_gradients': integrated_gradients,
    'occlusion': occlusion,
    'grad_cam': grad_cam,
    'cam': cam,
}
OF_FEATURES = ('grad_cam', 'cam')  # the others need no rows and columns of a feature


def heat_map(attribution: np.ndarray) -> np.ndarray:
    """float32 [H, W] in [0, 1]: what speaks for the class, relative to the most that does.

    Channels are summed. What speaks against it is 0, and so is NaN.
    """
    attribution = attribution.sum(-1) if attribution.ndim == 3 else attribution
    positive = np.maximum(np.nan_to_num(attribution), 0)
    return np.float32(positive / max(float(positive.max()), 1e-12))
