"""A trained run put to use: predictions for image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcls import datasets, pipeline
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
    run = experiment_lib.open_run(workdir, checkpoint)
    batch = np.stack([_load(run.experiment, Path(path)) for path in images])
    logits = jax.jit(run.experiment.predict)(run.variables, batch)
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
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
