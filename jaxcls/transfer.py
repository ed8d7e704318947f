"""What a trained network is worth elsewhere: its features, few-shot classification, its weights.

Fine-tuning needs nothing of this: it is training with `config.model.init_from`.
"""

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcls import (
    augment,
    datasets,
    intervals,
    loaders,
    registry,
    runs,
    sources,
    steps,
    weight_files,
    weights,
)
from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS


def extract(run: runs.Run, config: ConfigDict, split: datasets.Split):
    """The features that a run's last layer reads, of every example of a split.

    Args:
      config: says how the images are read and normalised.

    Returns:
      'pooled' float32 [N, D], and labels int32 [N], in the order of the split.
    """
    shape = experiment_lib.make_reader(config, split, train=False).shape
    if shape != run.experiment.image_shape:
        raise UserError(
            f'The images are {list(shape)}, and the run was trained on '
            f"{list(run.experiment.image_shape)}: set --config.data.image_size to the run's size."
        )
    augment.check_normalization(config.data.mean, config.data.std, shape[2])
    batch_size = min(config.batch_size, len(split.source))
    feed, count = experiment_lib.make_evaluation_feed(config, split, run.mesh, batch_size)
    forward = steps.make_forward(run.experiment.model, config.data.mean, config.data.std)

    @jax.jit
    def pooled(variables, data, items):
        batch = feed.fetch(data, jax.tree.map(lambda x: x[0], items))
        features = forward(variables, batch['image'])[1]['pooled']
        return features.astype(np.float32), batch['label'], batch['mask']

    with contextlib.closing(feed):
        parts = [
            jax.device_get(pooled(run.variables, feed.data, feed.items(i, 1))) for i in range(count)
        ]
    features, labels, mask = (np.concatenate(column) for column in zip(*parts, strict=True))
    return features[mask], labels[mask]


def ridge_accuracy(train, test) -> float:
    """Test accuracy of ridge regression on one-hot labels, its penalty chosen by leave-one-out.

    Args:
      train, test: features [N, D] and labels [N].
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-2, 5, 15)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of features that are constant in few examples
        return float(classifier.fit(*train).score(*test))


def few_shot(
    workdir: str | Path,
    shots: Sequence[int],
    seeds: int = 5,
    overrides: Sequence[tuple[str, str]] = (),
    checkpoint: str = 'latest',
) -> dict[str, Any]:
    """How well a linear classifier on a run's features does with few examples of each class.

    Every seed draws other examples; the network is not trained. Many papers on representations report
    this "few-shot ridge" number (Kolesnikov 2020, https://arxiv.org/abs/1912.11370, is one).

    Args:
      shots: examples of each class.
      seeds: number of draws.
      overrides: of the run's config, to take other data or classes: `('data.classes', '(5, 6, 7)')`.

    Returns:
      `data`, `classes`, `validation` (its name), and `shots`: for each of them `per_class`, `top1` (the
      mean), `half_width` (of its 95% interval over the draws; None of one draw) and `draws`.

    Raises:
      UserError: no run, other data than the overrides name, or a class with too few examples.
    """
    if seeds < 1 or not shots or min(shots) < 1:
        raise UserError(
            f'--shots {" ".join(map(str, shots))} and --seeds {seeds}: both must be at least 1.'
        )
    _check_overrides(overrides)
    run = runs.open_run(workdir, checkpoint)
    config = ConfigDict(run.experiment.config.to_dict())
    config_lib.apply_overrides(config, overrides, experiment_lib.TABLES)
    config.data.update(per_class=0, imbalance=1.0, share=1.0, label_noise=0.0)
    seed = experiment_lib.resolve(config).seed
    config.seed = run.experiment.config.seed  # what a folder without splits holds out is the run's
    config = experiment_lib.resolve(config)
    validation = experiment_lib.load_split(config, config.data.validation)
    train = experiment_lib.load_split(config, config.data.train)
    labels, names = sources.read_labels(train.source), dict(enumerate(train.class_names))
    draw = functools.partial(datasets.draw, labels, names, split=config.data.train)
    rows = {(n, s): draw(n, seed + s) for n in shots for s in range(seeds)}
    used = np.unique(np.concatenate(list(rows.values())))
    features, labels = extract(run, config, _part(train, used, labels))
    test = extract(run, config, validation)

    def accuracy(per_class, seed):
        places = np.searchsorted(used, rows[per_class, seed])
        return ridge_accuracy((features[places], labels[places]), test)

    results = []
    for per_class in shots:
        draws = [accuracy(per_class, seed) for seed in range(seeds)]
        half_width = intervals.mean_interval(draws)[1] if seeds > 1 else None
        results.append(
            {
                'per_class': per_class,
                'top1': float(np.mean(draws)),
                'half_width': half_width,
                'draws': draws,
            }
        )
    return {
        'data': config.data.name,
        'classes': list(validation.class_names),
        'validation': config.data.validation,
        'shots': results,
    }


def _check_overrides(overrides: Sequence[tuple[str, str]]):
    for field, _ in overrides:
        if not field.startswith('data.') and field not in ('seed', 'batch_size'):
            raise UserError(
                f'--config.{field}: the network is trained already. few-shot takes fields of '
                '--config.data, --config.seed and --config.batch_size.'
            )


def _part(split: datasets.Split, rows: np.ndarray, labels: np.ndarray) -> datasets.Split:
    return dataclasses.replace(
        split,
        source=sources.subset(split.source, rows, labels[rows]),
        fingerprint=loaders.digest([split.fingerprint, rows.tolist()]),
    )


def export_weights(
    workdir: str | Path, path: str | Path, scheme: str = 'jaxcls', checkpoint: str = 'latest'
) -> dict[str, Any]:
    """Writes a run's weights as safetensors: ours, or with the names and layouts of another library.

    They are those that the run is evaluated with (the moving average where there is one). Images have
    to be normalised as in the run: the file's metadata has `mean`, `std`, and the class names.

    Args:
      scheme: 'jaxcls', 'timm' or 'torchvision'.

    Returns:
      `path`, `arrays` (their number), `parameters`, `model`, `scheme`.

    Raises:
      UserError: no run, a file of that name, or parts that the other library has no name for.
    """
    if Path(path).suffix != '.safetensors':
        raise UserError(f'{path} must end in .safetensors, the format that is written.')
    run = runs.open_run(workdir, checkpoint)
    config = run.experiment.config
    variables = jax.device_get(run.variables)
    state = weights.state_dict(run.experiment.model, variables, scheme)
    if scheme != 'jaxcls':
        _warn_of_changes(config.model, scheme)
    metadata = {
        'format': 'pt',
        'model': config.model.name,
        'mean': json.dumps(config.data.mean),
        'std': json.dumps(config.data.std),
        'class_names': json.dumps(run.class_names),
    }
    weight_files.write(path, state, metadata)
    return {
        'path': str(path),
        'model': config.model.name,
        'scheme': scheme,
        'arrays': len(state),
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(variables['params'])),
    }


def _warn_of_changes(model: ConfigDict, scheme: str):
    """Warns of fields that change what is computed and not which arrays there are."""
    published = registry.defaults(MODELS[model.name])
    same = {'frozen_batch': 'batch'}
    changed = [
        f'{field}={model[field]!r} ({default!r} as published)'
        for field, default in published.items()
        if (isinstance(default, (str, bool)) or field == 'norm_epsilon')
        and not field.endswith('_init')
        and same.get(model[field], model[field]) != default
    ]
    if changed:
        warnings.warn(
            f'The arrays have the names of {scheme}; its {model.name} computes something else, unless it '
            f'is built with {", ".join(changed)}.',
            stacklevel=3,
        )
