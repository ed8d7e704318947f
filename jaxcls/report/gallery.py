"""What a run looks like inside: its worst mistakes, suspected label errors and first filters."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxcls import datasets, explain, pipeline, runs
from jaxcls import experiment as experiment_lib
from jaxcls import predictions as predictions_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS
from jaxcls.report.page import Section
from jaxcls.results import Member

MISTAKES, LABEL_ISSUES, EXPLAINED, FILTERS = 24, 16, 8, 64
_PIXELS = 192  # of the long side of an image on the page
_CAPTIONS = (
    'Under each its label, then → what it was taken for, with the probabilities given to both.'
)
_CHANGED = 'the data are no longer those that it was validated on.'


def sections(member: Member, of: str = '') -> list[Section]:
    """The images of a run that has ended; where its data or checkpoint are gone, a sentence says so.

    Args:
      of: the beginning of each note, such as which seed it is.
    """
    mistakes, issues = predictions_lib.mistakes, predictions_lib.label_issues
    return [
        _section(
            'Most confident mistakes',
            f'{of}The images that it was surest about and wrong. {_CAPTIONS}',
            lambda: _examples(member, mistakes, MISTAKES, 'It made no mistakes.'),
        ),
        _section(
            'Suspected label errors',
            f'{of}Another class is as probable as it usually is for images of that class (confident '
            f'learning). Many are only hard; some are wrong labels. {_CAPTIONS}',
            lambda: _examples(member, issues, LABEL_ISSUES, 'No label is suspect.'),
        ),
        _section(
            'What it looked at',
            f'{of}The first of these mistakes, each with the places that spoke most for the class that it '
            'was taken for (Grad-CAM).',
            lambda: _explained(member),
        ),
        _section(
            'First-layer filters',
            f'{of}The kernels of the first layer, each scaled to its own range: mid-grey is zero.',
            lambda: _filters(member),
            columns=16,
        ),
    ]


def _section(title: str, note: str, make: Callable, columns: int = 8) -> Section:
    """`make() -> images | sentence` as a section."""
    try:
        found = make()
    except UserError as error:
        reason = str(error).split('. ')[0]  # the rest is how to train, not to report
        found = f'Not shown: {reason}.'
    if isinstance(found, str):
        return {'kind': 'text', 'title': title, 'paragraphs': [found]}
    return {'kind': 'images', 'title': title, 'note': note, 'images': found, 'columns': columns}


def _examples(member: Member, choose: Callable, count: int, none: str) -> list[dict] | str:
    predictions = member.predictions
    chosen = choose(predictions, count)
    if not len(chosen):
        return none
    reader = _reader(member, predictions)
    few = predictions_lib.Predictions(*(x[chosen] for x in predictions))
    shares, guesses = predictions_lib.probabilities(few), predictions_lib.predicted(few)
    names = member.data['class_names']
    images = []
    for index, label, guess, share in zip(chosen, few.label, guesses, shares, strict=True):
        pixels, found = reader(int(index))
        if found != label:
            raise UserError(_CHANGED)
        caption = f'{names[label]} ({share[label]:.0%})\n→ {names[guess]} ({share[guess]:.0%})'
        images.append({'pixels': fit(pixels), 'caption': caption})
    return images


def _reader(member: Member, predictions: predictions_lib.Predictions) -> pipeline.Reader:
    """Of the run's validation split.

    Raises:
      UserError: it is not there any more, or is another.
    """
    config = experiment_lib.resolve(member.config)
    try:
        split: datasets.Split = experiment_lib.load_split(config, config.data.validation)
    except OSError as error:
        raise UserError(f'the images cannot be read: {error}.') from None
    if len(split.source) != len(predictions.label):
        raise UserError(_CHANGED)
    return experiment_lib.make_reader(config, split, train=False)


def fit(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] with C of 1 or 3, no larger than the page shows."""
    pixels = np.asarray(pixels)
    if pixels.shape[-1] not in (1, 3):
        pixels = pixels[..., :1]
    factor = _PIXELS / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    size = [max(1, round(n * factor)) for n in (pixels.shape[1], pixels.shape[0])]
    picture = datasets.to_picture(pixels)
    return datasets.to_array(picture.resize(size, Image.Resampling.LANCZOS))


def _explained(member: Member) -> list[dict] | str:
    if not workdir_lib.has_checkpoints(member.workdir):
        return 'Not shown: the run has no checkpoint of its own.'
    predictions = member.predictions
    chosen = predictions_lib.mistakes(predictions, EXPLAINED)
    if not len(chosen):
        return 'It made no mistakes.'
    reader, explainer = (
        _reader(member, predictions),
        explain.make_explainer(runs.open_run(member.workdir)),
    )
    images = []
    for index in chosen:
        pixels, label = reader(int(index))
        found = explainer(pixels)
        shown = explain.overlay(pixels, found.heat['grad_cam'])
        names = member.data['class_names']
        caption = f'{names[label]}\n→ {names[found.label]} ({found.probability:.0%})'
        images.append({'pixels': fit(shown), 'caption': caption})
    return images


def _filters(member: Member) -> list[dict] | str:
    if member.config.model.name not in MODELS:
        return f'{member.config.model.name} is no network: it has no filters.'
    if not workdir_lib.has_checkpoints(member.workdir):
        return 'Not shown: the run has no checkpoint of its own.'
    params = runs.open_run(member.workdir).variables['params']
    return filters(params, member.data['image_shape'], member.data['class_names'])


def filters(
    params: Any, image_shape: Sequence[int], class_names: Sequence[str]
) -> list[dict] | str:
    """The first kernel that sees the image, as images: a convolution's, or a dense layer's.

    Args:
      params: nested dicts of arrays, by layer.
      image_shape: (H, W, C).
      class_names: a dense layer of as many outputs has a template of each.

    Returns:
      At most 64 images of `page`; a sentence where no kernel has the shape of the image.
    """
    height, width, channels = image_shape
    kernels = [np.asarray(kernel, np.float32) for kernel in _kernels(params)]
    for kernel in kernels:
        if kernel.ndim == 4 and kernel.shape[2] == channels:
            return _pictures(kernel, [f'filter {i}' for i in range(kernel.shape[3])])
    for kernel in kernels:
        if kernel.ndim == 2 and kernel.shape[0] == height * width * channels:
            units = kernel.shape[1]
            names = (
                class_names if units == len(class_names) else [f'unit {i}' for i in range(units)]
            )
            return _pictures(kernel.reshape(height, width, channels, units), names)
    return 'No layer of the network has kernels of the shape of the image.'


def _kernels(tree) -> list[Any]:
    """The leaves called 'kernel' in the order of the tree, those named as first layers are first."""
    found = []

    def walk(node, path):
        for name, item in node.items():
            if hasattr(item, 'items'):
                walk(item, (*path, name))
            elif name == 'kernel':
                found.append((path, item))

    walk(tree, ())
    first = ('stem', 'patch', 'conv1', 'conv_1', 'hidden1', 'dense1')
    found.sort(key=lambda pair: not any(name in '/'.join(pair[0]) for name in first))
    return [kernel for _, kernel in found]


def _pictures(kernel: np.ndarray, names: Sequence[str]) -> list[dict]:
    """float [H, W, C, N]; other than 3 channels are averaged."""
    if kernel.shape[2] != 3:
        kernel = kernel.mean(2, keepdims=True)
    scale = np.maximum(np.abs(kernel).max((0, 1, 2)), 1e-12)
    pixels = np.nan_to_num(127.5 * (1 + kernel / scale), nan=127.5).round().astype(np.uint8)
    pairs = list(zip(np.moveaxis(pixels, -1, 0), names, strict=True))[:FILTERS]
    return [{'pixels': image, 'caption': str(name)} for image, name in pairs]
