"""Why a trained run answers as it does: maps of the image, how far they can be trusted, and boxes.

`attributions` has the methods; here they meet runs, files and data sets.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.ndimage
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxcls import attributions, datasets, intervals, pipeline, registry, runs, steps
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError, require

_STEPS = 28  # of deletion and insertion
DEFAULT = ('saliency', 'smooth_grad', 'integrated_gradients', 'occlusion', 'grad_cam')


class Explanation(NamedTuple):
    """Attributes:
    label: the class that is explained.
    probability: of that class.
    heat: by method, float32 [H, W] in [0, 1].
    completeness: of integrated gradients (`attributions.completeness`); None without them.
    """

    label: int
    probability: float
    heat: dict[str, np.ndarray]
    completeness: float | None


def make_explainer(
    run: runs.Run, methods: Sequence[str] = ('grad_cam',), feature: str = ''
) -> Callable[[np.ndarray, int | None], Explanation]:
    """`explainer(image, label=None) -> Explanation` of uint8 [H, W, C] of the run's shape.

    Without a label, of the most probable class.

    Args:
      feature: of Grad-CAM and CAM; '' is the last with rows and columns.

    Raises:
      UserError: no such method or feature, or the network has none with rows and columns.
    """
    network = network_of(run, feature, methods)

    def explain(image, label=None):
        pixels = np.float32(image) / 255
        logits = network.logits(pixels[None])[0]
        label = int(logits.argmax()) if label is None else label
        probability = float(np.exp(logits[label] - np.logaddexp.reduce(logits)))
        found = {name: attributions.METHODS[name](network, pixels, label) for name in methods}
        gap = None
        if 'integrated_gradients' in found:
            gap = attributions.completeness(network, pixels, label, found['integrated_gradients'])
        heat = {name: attributions.heat_map(value) for name, value in found.items()}
        return Explanation(label, probability, heat, gap)

    return explain


def network_of(
    run: runs.Run, feature: str = '', methods: Sequence[str] = attributions.OF_FEATURES
) -> attributions.Network:
    """A run's network as `attributions` takes it; `methods` decide whether it must have maps.

    Raises:
      UserError: as `make_explainer`.
    """
    for name in methods:
        registry.lookup(attributions.METHODS, name, '--methods')
    experiment = run.experiment
    data = experiment.config.data
    forward = steps.make_float_forward(experiment.model, data.mean, data.std)
    maps = any(name in attributions.OF_FEATURES for name in methods)
    return attributions.make_network(
        forward, run.variables, experiment.image_shape, feature, maps=maps
    )


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A heat map [H, W] in [0, 1] laid over uint8 [H, W, C]: uint8 [H, W, 3]."""
    grey = np.float32(image).mean(-1, keepdims=True) / 255
    color = colormaps['inferno'](heat)[..., :3]
    shown = 0.35 * grey + 0.65 * color * (0.4 + 0.6 * grey)
    return np.uint8(255 * np.clip(shown, 0, 1) + 0.5)


def explain(
    workdir: str | Path,
    images: Sequence[str | Path],
    methods: Sequence[str] = DEFAULT,
    label: str = '',
    feature: str = '',
    checkpoint: str = 'latest',
) -> tuple[list[dict[str, Any]], Figure]:
    """Explains the answers to image files, and draws them side by side.

    Args:
      label: the name of the class to explain; '' is the most probable of each image.

    Returns:
      For each image `image`, `class`, `probability`, `completeness` and the `peak` of each method
      (row and column, as shares of the height and width); and the picture.

    Raises:
      UserError: no run, no such class, method or feature, or a file that is no image.
    """
    run = runs.open_run(workdir, checkpoint)
    wanted = _class(run, label) if label else None
    explainer = make_explainer(run, methods, feature)
    read = [experiment_lib.read_image(run.experiment, path) for path in images]  # all, first
    rows, pictures = [], []
    for path, pixels in zip(images, read, strict=True):
        found = explainer(pixels, wanted)
        name = run.class_names[found.label]
        rows.append(
            {
                'image': str(path),
                'class': name,
                'probability': found.probability,
                'completeness': found.completeness,
                'peak': {name: _peak(heat) for name, heat in found.heat.items()},
            }
        )
        pictures.append((f'{name} {found.probability:.0%}', pixels, found.heat))
    return rows, sheet(pictures)


def _class(run: runs.Run, label: str) -> int:
    if label not in run.class_names:
        raise UserError(
            f'--label={label!r} is no class. {registry.did_you_mean(label, run.class_names)}'
        )
    return run.class_names.index(label)


def _peak(heat: np.ndarray) -> list[float]:
    place = np.unravel_index(int(heat.argmax()), heat.shape)
    return [float((i + 0.5) / n) for i, n in zip(place, heat.shape, strict=True)]


def sheet(pictures: Sequence[tuple[str, np.ndarray, dict[str, np.ndarray]]]) -> Figure:
    """A row for each (title, uint8 [H, W, C], heat map by method): the image, then the overlays."""
    columns = 1 + max(len(heat) for _, _, heat in pictures)
    figure = Figure(figsize=(1.9 * columns, 2.1 * len(pictures)), layout='constrained')
    grid = figure.subplots(len(pictures), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (title, pixels, heat) in zip(grid, pictures, strict=True):
        shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
        row[0].imshow(shown, cmap='gray', vmin=0, vmax=255)
        row[0].set_title(title, fontsize=8, parse_math=False)
        for axes, (name, values) in zip(row[1:], heat.items(), strict=False):
            axes.imshow(overlay(pixels, values))
            axes.set_title(name.replace('_', ' '), fontsize=8)
    return figure


def curve(
    network: attributions.Network,
    image: np.ndarray,
    label: int,
    heat: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
) -> np.ndarray:
    """The label's probability as the pixels of `end` replace those of `start`, the hottest first.

    Deletion goes from the image to a blank one, insertion from a blurred one to the image (Petsiuk
    2018, https://arxiv.org/abs/1806.07421).

    Args:
      image, start, end: float32 [H, W, C] in [0, 1].
      heat: [H, W].

    Returns:
      float32 [steps + 1], from none to all of the pixels.
    """
    order = np.argsort(-heat, axis=None, kind='stable')
    counts = np.linspace(0, order.size, min(_STEPS, order.size) + 1).round().astype(int)
    rank = np.empty(order.size, int)
    rank[order] = np.arange(order.size)
    replaced = rank.reshape(heat.shape)[None] < counts[:, None, None]
    logits = network.logits(np.where(replaced[..., None], end, start))
    return np.exp(logits[:, label] - np.logaddexp.reduce(logits, axis=-1))


def area(values: np.ndarray) -> float:
    """Under a curve over [0, 1]."""
    return float(np.trapezoid(values, dx=1 / (len(values) - 1)))


def measure(
    workdir: str | Path,
    methods: Sequence[str] = DEFAULT,
    split: str = '',
    examples: int = 50,
    feature: str = '',
    checkpoint: str = 'latest',
    threshold: float = 0.5,
) -> dict[str, Any]:
    """How good explanations are, on examples of a split drawn by the run's seed.

    Args:
      threshold: of `heat_box`; choose it on training images.

    Returns:
      `split`, `examples` and a row a method, last 'random', which knows nothing: `deletion` (less is
      better) and `insertion` (more is better), the mean area under `curve` with the half-width of its
      95% interval; and `head` and `all`, the rank correlation of its maps with those of the network
      with a fresh head, and with all of its weights fresh: near 1 says that it shows the image and not
      the network (Adebayo 2018, https://arxiv.org/abs/1810.03292). Where the data set has boxes, also
      `boxes`, see `localisation`.

    Raises:
      UserError: no run, split, method or feature.
    """
    require(examples >= 2, '--examples', examples, 'at least 2')
    require(0 < threshold < 1, '--threshold', threshold, 'between 0 and 1')
    run = runs.open_run(workdir, checkpoint)
    network = network_of(run, feature, methods)
    config = run.experiment.config
    split, loaded = runs.load_split(run, split)
    rows = pipeline.permutation(config.seed, 0, len(loaded.source))[:examples]
    reader = experiment_lib.make_reader(config, loaded, train=False)
    images, labels = zip(*(reader(int(row)) for row in rows), strict=True)
    pixels = np.float32(images) / 255
    predicted = network.logits(pixels).argmax(-1)
    others = {
        name: network_of(run._replace(variables=variables), feature, methods)
        for name, variables in _randomised(run).items()
    }
    table = attributions.METHODS | {'random': attributions.at_random}
    found = {
        name: _measure(network, others, table[name], pixels, predicted, config.data.mean)
        for name in (*methods, 'random')
    }
    result = {'split': split, 'examples': len(images), 'methods': found}
    boxes = _boxes(config.data, split, config.seed, loaded, rows)
    if boxes is not None:
        result['boxes'] = {
            name: localisation(network, table[name], images, labels, boxes, threshold)
            for name in (*methods, 'random')
        }
    return result


def _boxes(data, split: str, seed: int, loaded: datasets.Split, rows) -> np.ndarray | None:
    """Of some examples, as the network sees them, [N, 4]; None where there are none for all of the data."""
    drawn = data.per_class or data.imbalance > 1 or data.share < 1
    part = data.classes or (split == data.train and drawn)
    boxes = None if part else datasets.load_boxes(data.name, split, data.dir, seed)
    if boxes is None or not data.image_size:
        return boxes if boxes is None else boxes[rows]
    sizes = [datasets.size_of(loaded.source[int(row)][0]) for row in rows]
    return pipeline.boxes_in_crop(boxes[rows], sizes, data.crop_fraction)


def _randomised(run: runs.Run) -> dict[str, Any]:
    """The run's variables with a fresh head, and with everything fresh, of another seed."""
    state = jax.jit(lambda seed: experiment_lib.init(run.experiment, seed))(
        np.int32(run.experiment.config.seed ^ 0x5A5A5A)
    )
    fresh = {'params': state.params, 'batch_stats': state.batch_stats}
    params = {**run.variables['params'], 'head': fresh['params']['head']}
    return {'head': {**run.variables, 'params': params}, 'all': fresh}


def _measure(network, others, method, images, labels, mean) -> dict[str, Any]:
    areas, correlations = {'deletion': [], 'insertion': []}, {name: [] for name in others}
    for image, label in zip(images, labels, strict=True):
        heat = attributions.heat_map(method(network, image, label))
        blank = np.broadcast_to(np.float32(mean), image.shape)
        sigma = max(1, min(image.shape[:2]) / 16)
        blurred = scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0))
        areas['deletion'].append(area(curve(network, image, label, heat, image, blank)))
        areas['insertion'].append(area(curve(network, image, label, heat, blurred, image)))
        for name, other in others.items():
            # A map of noise is drawn anew for another network.
            seed = {'seed': 1} if method is attributions.at_random else {}
            theirs = attributions.heat_map(method(other, image, label, **seed))
            correlations[name].append(_rank_correlation(heat, theirs))
    found = {}
    for name, values in areas.items():
        center, half = intervals.mean_interval(values)
        found |= {name: center, f'{name}_half': half}
    return found | {name: float(np.mean(values)) for name, values in correlations.items()}


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where a map is flat."""
    import scipy.stats  # slow to import

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(a, b, axis=None).statistic)


def localisation(
    network: attributions.Network,
    method: Callable,
    images: Sequence[np.ndarray],
    labels: Sequence[int],
    boxes: np.ndarray,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Boxes drawn round the maps of the true classes against those of the data set.

    Args:
      images: uint8 [H, W, C] each; labels: of each; boxes: [N, 4] as `heat_box` returns them.

    Returns:
      `iou`, the mean; `known`, the share at an IoU of 0.5 or more with its Wilson interval `known_low`
      and `known_high`; `top1`, the share where the predicted class is right too.
    """
    pixels = np.float32(images) / 255
    right = network.logits(pixels).argmax(-1) == np.array(labels)
    heats = [
        attributions.heat_map(method(network, image, label))
        for image, label in zip(pixels, labels, strict=True)
    ]
    overlaps = [iou(heat_box(heat, threshold), box) for heat, box in zip(heats, boxes, strict=True)]
    hits = np.array(overlaps) >= 0.5
    low, high = intervals.wilson_interval(int(hits.sum()), len(hits))
    return {
        'iou': float(np.mean(overlaps)),
        'known': float(hits.mean()),
        'known_low': low,
        'known_high': high,
        'top1': float((hits & right).mean()),
    }


def heat_box(heat: np.ndarray, threshold: float) -> np.ndarray:
    """The box about the largest connected part of a map that is above a share of its maximum.

    Zhou 2016. float32 [4]: top, left, bottom, right, as shares of the height and the width.
    """
    hot = heat >= threshold * heat.max()
    parts, count = scipy.ndimage.label(hot, np.ones((3, 3)))
    sizes = scipy.ndimage.sum_labels(hot, parts, range(1, count + 1))
    rows, columns = scipy.ndimage.find_objects(parts)[int(np.argmax(sizes))]
    height, width = heat.shape
    edges = (rows.start / height, columns.start / width, rows.stop / height, columns.stop / width)
    return np.float32(edges)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (top, left, bottom, right)."""
    edges = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = float(np.prod(np.maximum(edges[1] - edges[0], 0)))
    union = sum(float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0
