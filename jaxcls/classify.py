"""Image files to classes: single ones, folders and globs, a batch at a time."""

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcls import experiment as experiment_lib
from jaxcls import runs
from jaxcls.errors import UserError

_DECODERS = min(4, os.cpu_count() or 1)


class File(NamedTuple):
    """A file to classify. Named ones must be images; those found in a folder or by a glob may not be."""

    path: Path
    named: bool


def find(places: Iterable[str | Path]) -> Iterator[File]:
    """The files that paths, folders (with all below, but for hidden ones) and globs stand for, in order.

    Yields them as it finds them. `**` in a glob is any number of folders; a file whose name has the
    characters of a glob is itself. Links to folders are not followed.

    Raises:
      UserError: (when asked for that place) nothing there.
    """
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = _below(path)
        elif glob.has_magic(str(place)) and not path.exists():
            # Path.glob takes no absolute ones.
            hits = map(Path, sorted(glob.glob(str(place), recursive=True)))  # noqa: PTH207
            found = (file for hit in hits if not hit.is_dir() for file in [File(hit, False)])
        else:
            found = iter([File(path, True)])
        first = next(found, None)
        if first is None:
            raise UserError(f'{place} has no files. Give the path of an image, a folder or a glob.')
        yield first
        yield from found


def _below(folder: Path) -> Iterator[File]:
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            if not name.startswith('.'):
                yield File(Path(directory, name), False)


def make_classifier(run: runs.Run) -> Callable[[np.ndarray], np.ndarray]:
    """`classifier(images) -> probabilities`: uint8 [B, H, W, C] to float64 [B, K], the softmax.

    Compiled once for each number of images.
    """
    apply = jax.jit(run.experiment.predict)
    return lambda images: np.asarray(jax.nn.softmax(apply(run.variables, images)), np.float64)


def ranked(class_names: Sequence[str], probabilities: np.ndarray, top: int) -> list[dict[str, Any]]:
    """The `top` most probable classes: `[{'class': name, 'probability': p}, ...]` of [K]."""
    order = np.argsort(-probabilities, kind='stable')[:top]
    return [{'class': class_names[k], 'probability': float(probabilities[k])} for k in order]


def classify(run: runs.Run, files: Iterable[File], top: int = 5) -> Iterator[dict[str, Any]]:
    """Classifies files one batch after the other; only one batch is in memory.

    Yields:
      Of each file, in order, as `predict`.

    Raises:
      UserError: (after what comes before it) a named file that is no image.
    """
    classifier = make_classifier(run)
    files = iter(files)
    size = 0
    with ThreadPoolExecutor(_DECODERS) as pool:
        while chunk := list(itertools.islice(files, size or run.experiment.config.batch_size)):
            size = size or len(chunk)
            images = list(pool.map(lambda file: _read(run.experiment, file), chunk))
            batch = np.zeros((size, *run.experiment.image_shape), np.uint8)
            for row, image in enumerate(images):
                if isinstance(image, np.ndarray):
                    batch[row] = image
            probabilities = classifier(batch)
            for file, image, row in zip(chunk, images, probabilities, strict=False):
                if isinstance(image, np.ndarray):
                    found = {'predictions': ranked(run.class_names, row, top)}
                elif file.named:
                    raise image
                else:
                    found = {'problem': str(image)}
                yield {'image': str(file.path), **found}


def _read(experiment: experiment_lib.Experiment, file: File) -> np.ndarray | UserError:
    try:
        return experiment_lib.read_image(experiment, file.path)
    except UserError as error:
        return error


def predict(
    workdir: str | Path, images: Sequence[str | Path], top: int = 5, checkpoint: str = 'latest'
) -> list[dict[str, Any]]:
    """The most probable classes of image files, the first of which is the prediction.

    Images are cropped and resized as in the run's evaluation; where it took images of one size, to
    that size.

    Args:
      images: paths of images, folders or globs, see `find`.

    Returns:
      For each image `{'image': path, 'predictions': [{'class': name, 'probability': p}, ...]}`; for a
      file of a folder or glob that is no image, `{'image': path, 'problem': why}`.

    Raises:
      UserError: no run or checkpoint, nothing at a path, or a file given itself that is no image.
    """
    run = runs.open_run(workdir, checkpoint)
    check(images)
    return list(classify(run, find(images), top))


def check(places: Iterable[str | Path]):
    """Raises UserError where a path is neither a file, a folder nor a glob: before any work."""
    for place in places:
        if not (Path(place).exists() or glob.has_magic(str(place))):
            raise UserError(f'{place} is not there. Give the path of an image, a folder or a glob.')
