"""Finished runs on disk, made without training: digits, and logits that are wrong where they are told."""

import json
from pathlib import Path

import numpy as np

from jaxcls import config as config_lib
from jaxcls import datasets, experiment, intervals, predictions, workdir

LABEL = np.array([label for _, label in datasets.load('digits', 'test', '', 0).source], np.int32)
# Of a run of three epochs, no more than a picture needs.
RECORDS = [
    {
        'kind': kind,
        'step': epoch * 10,
        'epoch': float(epoch),
        'loss': loss / epoch,
        'top1': 1 - loss / 4,
    }
    for epoch in (1, 2, 3)
    for kind, loss in (('train', 1.0), ('validation', 2.0))
]
NAMES = [str(i) for i in range(10)]


def write(
    path: Path, mistakes: int, seed: int = 0, names=NAMES, ended: bool = True, **fields
) -> Path:
    """A run of the digits with so many mistakes, others for another seed.

    Args:
      fields: of the config; a whole section by its name.
    """
    config = config_lib.get_config()
    config.update(seed=seed, **fields)
    config = experiment.resolve(config)
    path.mkdir(parents=True)
    found = _predictions(mistakes, seed)
    (path / 'config.json').write_text(config_lib.to_json(config))
    data = {
        'class_names': names,
        'image_shape': [8, 8, 1],
        'examples': {'train': 1437, 'test': 360},
    }
    (path / 'data.json').write_text(json.dumps(data))
    command = ['jaxcls', 'train', '--config.seed=<b>']
    (path / 'environment.json').write_text(json.dumps({'jax': '0.10.2', 'command': command}))
    records = [
        {
            'kind': kind, 'step': 10 * e, 'epoch': float(e), 'seconds': float(e), 'top5': 1.0,
            'examples': 1437.0, 'loss': (1 + seed / 10) / e**2, 'top1': 1 - lost / e / 10,
            'images_per_second': 1000.0 + e, 'learning_rate': 0.1 / e, 'bad_steps': 0,
        }
        for e in (1, 2, 3, 4)
        for kind, lost in (('train', 0.1), ('validation', 0.2))
    ]  # fmt: skip
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    if ended:
        predictions.save(path / 'predictions.npz', found)
        interval = intervals.wilson_interval(360 - mistakes, 360)
        result = {**records[-1], **predictions.summarize(found), 'top1_interval': interval}
        result['best_top1'] = result['top1']
        workdir.write_json(path / 'result.json', {**result, 'parameters': 53226, 'flops': 694784})
    return path


def write_group(path: Path, mistakes: list[int], **fields) -> Path:
    """The runs of several seeds."""
    for seed, count in enumerate(mistakes):
        write(path / f'seed-{seed}', count, seed, **fields)
    config = config_lib.get_config()
    config.update(seeds=len(mistakes), **fields)
    (path / 'config.json').write_text(config_lib.to_json(experiment.resolve(config)))
    return path


def _predictions(mistakes: int, seed: int) -> predictions.Predictions:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(360, 10)).astype(np.float32)
    logits[np.arange(360), LABEL] += 8
    wrong = rng.permutation(360)[:mistakes]
    logits[wrong, (LABEL[wrong] + 1) % 10] += 16
    return predictions.Predictions(logits, LABEL)
