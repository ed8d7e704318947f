"""One masked pass over a split: every example counts once, whatever the batch size or the devices."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcls import datasets, metrics, runs, sharding
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError

Evaluator = Callable[[Any], metrics.Sums]


def make_evaluator(experiment: experiment_lib.Experiment, split: datasets.Split, mesh) -> Evaluator:
    """Returns `evaluator(variables) -> sums` over a split, compiled at its first call.

    The sums are those of `metrics.batch_sums` and a `confusion` matrix int32 [K, K].
    """
    config = experiment.config
    feed, count = experiment_lib.make_evaluation_feed(config, split, mesh, config.batch_size)
    place = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=place)
    def step(variables, data, items):
        batch = feed.fetch(data, jax.tree.map(lambda x: x[0], items))
        return batch_sums(experiment, variables, batch)

    def evaluator(variables):
        parts = (step(variables, feed.data, feed.items(i, 1)) for i in range(count))
        return functools.reduce(metrics.add, parts)

    return evaluator


def batch_sums(experiment: experiment_lib.Experiment, variables, batch) -> metrics.Sums:
    """The masked sums of one raw batch in evaluation mode."""
    logits = experiment.predict(variables, batch['image'])
    target = jax.nn.one_hot(batch['label'], experiment.num_classes, dtype=jnp.float32)
    loss = experiment.loss(logits, target)
    sums = metrics.batch_sums(logits, batch['label'], loss, batch['mask'])
    return {**sums, 'confusion': metrics.confusion(logits, batch['label'], batch['mask'])}


def evaluate(workdir: str | Path, split: str = '', checkpoint: str = 'latest') -> dict[str, Any]:
    """Metrics of a trained run on a split.

    Args:
      workdir: of the run.
      split: such as 'test' or 'train[:1000]'; '' is the run's validation split.
      checkpoint: 'latest', 'best' or a step.

    Returns:
      As `evaluate_run`.

    Raises:
      UserError: no run, no checkpoint or no such split.
    """
    return evaluate_run(runs.open_run(workdir, checkpoint), split)


def evaluate_run(run: runs.Run, split: str = '') -> dict[str, Any]:
    """Metrics of an opened run (or of trained weights, `experiment.open_weights`) on a split.

    Returns:
      `metrics.summarize`'s numbers with `split`, `step`, `top1_interval` (Wilson, 95%), `confusion`
      and `class_names`.

    Raises:
      UserError: no such split, or other classes than the run's.
    """
    split = split or run.experiment.config.data.validation
    loaded = experiment_lib.load_split(run.experiment.config, split)
    if loaded.class_names != run.class_names:
        raise UserError(
            f'The classes of {split} are {_listed(loaded.class_names)}; the run was trained on '
            f'{_listed(run.class_names)}. Restore the data set, or evaluate a run of this one.'
        )
    sums = jax.device_get(make_evaluator(run.experiment, loaded, run.mesh)(run.variables))
    return {
        'split': split,
        'step': run.step,
        **metrics.summarize(sums),
        'top1_interval': metrics.wilson_interval(int(sums['top1']), int(sums['examples'])),
        'confusion': sums['confusion'].tolist(),
        'class_names': list(run.class_names),
    }


def _listed(names: tuple[str, ...]) -> str:
    return f'{len(names)} ({runs.first_names(names)})'
