"""A trained run put to use: predictions for image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcls import datasets, pipeline, runs
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError


def predict(
    workdir: str | Path, images: Sequence[str | Path], top: int = 5, checkpoint: str = 'latest'
) -> list[dict[str, Any]]:
    """The most probable classes of image files, the first of which is the prediction.

    Images are cropped and resized as in the run's evaluation; where it took images of one size, to
    that size.

    Returns:
      For each image `{'image': path, 'predictions': [{'class': name, 'probability': p}, ...]}`.

    Raises:
      UserError: no run or checkpoint, or a file that is no image.
    """
    run = runs.open_run(workdir, checkpoint)
    apply = jax.jit(run.experiment.predict)
    size = min(run.experiment.config.batch_size, len(images))
    probabilities = []
    for start in range(0, len(images), size):
        batch = np.zeros((size, *run.experiment.image_shape), np.uint8)
        for row, path in enumerate(images[start : start + size]):
            batch[row] = _load(run.experiment, Path(path))
        logits = apply(run.variables, batch)
        probabilities.extend(np.asarray(jax.nn.softmax(logits), np.float64))
    probabilities = probabilities[: len(images)]
    return [
        {
            'image': str(path),
            'predictions': [
                {'class': run.class_names[k], 'probability': float(row[k])}
                for k in np.argsort(-row, kind='stable')[:top]
            ],
        }
        for path, row in zip(images, probabilities, strict=True)
    ]


def _load(experiment: experiment_lib.Experiment, path: Path) -> np.ndarray:
    height, width, channels = experiment.image_shape
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise UserError(
            f'{path} cannot be read: {error.strerror}. Give the path of an image.'
        ) from None
    try:
        image = datasets.decode(encoded, channels)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    data = experiment.config.data
    if not data.image_size and image.shape[:2] == (height, width):
        return image
    if height == width:
        fraction = data.crop_fraction if data.image_size else 1.0
        box = pipeline.center_box(*image.shape[:2], fraction)
    else:
        box = (0, 0, image.shape[1], image.shape[0])
    return pipeline.resize(image, (height, width), box)
