"""`fit(config, workdir)` for a classical baseline: the data, metrics and files of a network's run.

No estimator is kept: on disk it would be a pickle, and nothing out of a workdir is ever executed. What
a baseline leaves are its predictions of the validation split.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcls import config as config_lib
from jaxcls import evaluation, loop, losses, metrics, pipeline, registry, results
from jaxcls import experiment as experiment_lib
from jaxcls import predictions as predictions_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError
from jaxcls.estimators import BASELINES, Baseline

# What a baseline reads of a config; of `data` not `mean` and `std`, which are for networks.
_READ = ('data', 'model', 'seed', 'seeds', 'seeds_per_program')
# Of the training split, so many are scored: a large SVM takes longer to score than to be fitted.
_TRAINING_SCORED = 2_000
# Images that are scored at once: few enough that their features fit in memory.
_CHUNK = 2_000
_TINY = 1e-30


def fit(
    config: ConfigDict, workdir: str | Path, on_event: loop.OnEvent = lambda event: None
) -> results.Result:
    """Fits a baseline in a directory and scores it; one that has ended there is left as it is.

    The records are those of a network at its one epoch and step: of the training split, or 2,000
    images of it drawn by the seed; and of the validation split. `loss` is the cross-entropy of the
    logits (`class_logits`), `images_per_second` counts the fit alone.

    Args:
      config: resolved, `config.model` a baseline.
      workdir: of this run alone; made where it is missing.
      on_event: called with a 'baseline' event before the fit and then with the records.

    Raises:
      UserError: a mistake in the config, the data or the directory.
    """
    workdir = Path(workdir)
    baseline = make_baseline(config)
    workdir_lib.check(workdir, config, experiment_lib.TABLES)
    if jax.process_count() > 1:
        raise UserError(f'{config.model.name} runs in one process; start it on one host.')
    reader, validation, data = experiment_lib.open_data(config, train=False)
    readers = [reader, experiment_lib.make_reader(config, validation, train=False)]
    with workdir_lib.locked(workdir):
        workdir_lib.start(workdir, config, data, experiment_lib.TABLES)
        records = workdir_lib.read_metrics(workdir)
        if not (records and (workdir / 'result.json').is_file()):
            workdir_lib.rewind_metrics(workdir, 0)
            records, predictions = _fit_and_score(config, baseline, readers, on_event)
            for record in records:
                workdir_lib.append_metrics(workdir, record)
            results.write(workdir, predictions, records)
    return results.Result(records[-1], records, None, 'done', workdir)


def make_baseline(config: ConfigDict) -> Baseline:
    """The baseline of a resolved config.

    Raises:
      UserError: an argument out of its range, or a field of the config that no baseline reads.
    """
    arguments = config_lib.arguments('model', config.model)
    baseline = registry.bind(BASELINES, 'model', **arguments)()
    changed = config_lib.differences(experiment_lib.resolve(config_lib.get_config()), config)
    unread = [path for path in changed if path.partition('.')[0] not in _READ]
    unread += [f'model.{f}' for f in config.model if f not in arguments and config.model[f]]
    unread += ['data.crop'] if config.data.crop != 'center' else []
    unread += ['data.pipeline'] if config.data.pipeline == 'stream' else []
    if unread:
        names = dict.fromkeys(f'config.{path.partition("[")[0]}' for path in unread)
        raise UserError(
            f'{config.model.name} is fitted once, by scikit-learn, to images as they are, and has no use '
            f'for {", ".join(names)}. Leave that at its default: start from jaxcls.config.get_config() '
            'or from the experiment of a baseline.'
        )
    return baseline


def _fit_and_score(
    config: ConfigDict, baseline: Baseline, readers: list[pipeline.Reader], on_event: loop.OnEvent
) -> tuple[list[dict[str, Any]], predictions_lib.Predictions]:
    """The two records and the predictions of the validation split."""
    (images, label), validation = map(pipeline.load_arrays, readers)
    classes, begin = len(readers[0].split.class_names), time.perf_counter()
    estimator = baseline.pipeline(config.seed)
    extract, classifier = estimator[:-1], estimator[-1]

    def place():
        return {'step': 1, 'epoch': 1.0, 'seconds': round(time.perf_counter() - begin, 3)}

    with _explained(config):
        features = extract.fit_transform(images)
        sizes = {'examples': features.shape[0], 'features': features.shape[1]}
        on_event({'kind': 'baseline', 'estimator': ' '.join(str(classifier).split()), **sizes})
        classifier.fit(features, label)
        speed = {'images_per_second': round(len(label) / (time.perf_counter() - begin), 1)}
        chosen = np.sort(pipeline.permutation(config.seed, 0, len(label))[:_TRAINING_SCORED])
        scores = [
            class_logits(classifier, features[chosen[i : i + _CHUNK]], classes, baseline.votes)
            for i in range(0, len(chosen), _CHUNK)
        ]
        sums = _train_sums(np.concatenate(scores), label[chosen])
        idle = {'learning_rate': 0.0, 'bad_steps': 0}
        records = [
            {'kind': 'train', **place(), **loop.finite(metrics.summarize(sums)), **idle, **speed}
        ]
        on_event(records[0])
        logits = predict(estimator, validation[0], classes, baseline.votes)
    predictions = predictions_lib.Predictions(logits, np.asarray(validation[1], np.int32))
    records += [
        {
            'kind': 'validation',
            **place(),
            **loop.finite(metrics.summarize(_validation_sums(*predictions))),
        }
    ]
    on_event(records[1])
    return records, predictions


@contextlib.contextmanager
def _explained(config: ConfigDict) -> Iterator[None]:
    """Makes scikit-learn's objections to the arguments and the data the user's to mend."""
    try:
        yield
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip('.')
        raise UserError(
            f'{config.model.name} cannot be fitted to these images of {config.data.name}: {reason}. '
            'Change the arguments of config.model or what config.data takes.'
        ) from error


@jax.jit
def _train_sums(logits: jax.Array, label: jax.Array) -> metrics.Sums:
    """Those of a network's training step."""
    target = jax.nn.one_hot(label, logits.shape[1])
    loss = losses.cross_entropy(logits, target)
    return metrics.batch_sums(logits, label, loss, jnp.ones(len(label), bool))


@jax.jit
def _validation_sums(logits: jax.Array, label: jax.Array) -> metrics.Sums:
    mask = jnp.ones(len(label), bool)
    return evaluation.batch_sums(losses.cross_entropy, logits, label, mask)


def predict(estimator: Any, images: np.ndarray, num_classes: int, votes: int = 0) -> np.ndarray:
    """Logits float32 [N, K] of images uint8 [N, H, W, C] by a fitted `Baseline.pipeline`.

    Args:
      votes: `Baseline.votes`.
    """
    chunks = (images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK))
    return np.concatenate([
        class_logits(estimator[-1], estimator[:-1].transform(chunk), num_classes, votes)
        for chunk in chunks
    ])  # fmt: skip


def class_logits(
    classifier: Any, features: np.ndarray, num_classes: int, votes: int = 0
) -> np.ndarray:
    """A fitted classifier's scores as finite logits float32 [N, K], the greatest that of `predict`.

    Logarithms of the probabilities, where it has some. Those of `votes` voters have one vote more,
    shared by all classes, so that none is impossible. Otherwise its decision values, which are no
    probabilities: calibrate them first. A class without a training example comes last.
    """
    probable = hasattr(classifier, 'predict_proba')
    scores = classifier.predict_proba(features) if probable else _decisions(classifier, features)
    absent = 0.0 if probable else scores.min(1, keepdims=True) - 1
    full = np.broadcast_to(absent, (len(scores), num_classes)).astype(np.float64)
    full[:, classifier.classes_] = scores
    if probable and votes:
        full = (full * votes + 1 / num_classes) / (votes + 1)
    return _rounded(np.log(np.maximum(full, _TINY)) if probable else full)


def _decisions(classifier: Any, features: np.ndarray) -> np.ndarray:
    """Decision values [N, K]; of two classes, scikit-learn gives those of the second alone."""
    values = classifier.decision_function(features)
    return np.stack([np.zeros_like(values), values], axis=1) if values.ndim == 1 else values


def _rounded(scores: np.ndarray) -> np.ndarray:
    """float64 to float32, the first of the greatest being the same where rounding makes equals."""
    logits = scores.astype(np.float32)
    best = scores.argmax(1)
    rows = np.flatnonzero(logits.argmax(1) != best)
    logits[rows, best[rows]] = np.nextafter(logits[rows].max(1), np.float32(np.inf))
    return logits
