"""One masked pass over a split: every example counts once, whatever the batch size or the devices."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import datasets, intervals, metrics, results, runs, sharding
from jaxcls import experiment as experiment_lib
from jaxcls import predictions as predictions_lib
from jaxcls import tta as tta_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError


class Evaluation(NamedTuple):
    """What one pass leaves on the device.

    Attributes:
      sums: over the split, of `batch_sums`.
      batches: (logits [B, K], label [B], mask [B]) of each batch.
    """

    sums: metrics.Sums
    batches: list[tuple[jax.Array, jax.Array, jax.Array]]

    def predictions(self) -> predictions_lib.Predictions:
        """The logits and labels of all examples, on the host."""
        rows = [
            [x[mask] for x in (logits, label)]
            for logits, label, mask in jax.device_get(self.batches)
        ]
        return predictions_lib.Predictions(*map(np.concatenate, zip(*rows, strict=True)))

    def of(self, i: int) -> 'Evaluation':
        """That of one run of many, whose sums and logits have a leading axis of runs."""
        batches = [(logits[i], label, mask) for logits, label, mask in self.batches]
        return Evaluation(jax.tree.map(lambda x: x[i], self.sums), batches)


Evaluator = Callable[[Any], Evaluation]


def make_evaluator(
    experiment: experiment_lib.Experiment,
    split: datasets.Split,
    mesh,
    predict: Callable | None = None,
    many: bool = False,
) -> Evaluator:
    """Returns `evaluator(variables) -> Evaluation` of a split, compiled at its first call.

    Args:
      predict: in place of the experiment's, such as with test-time augmentation.
      many: the variables have a leading axis of runs, and so have the sums and the logits.
    """
    config, predict = experiment.config, predict or experiment.predict
    feed, count = experiment_lib.make_evaluation_feed(config, split, mesh, config.batch_size)
    place = sharding.replicated(mesh)

    def measure(variables, batch):
        logits = predict(variables, batch['image'])
        return batch_sums(experiment.loss, logits, batch['label'], batch['mask']), logits

    if many:
        measure = jax.vmap(measure, in_axes=(0, None))

    @functools.partial(jax.jit, out_shardings=place)
    def step(variables, data, items):
        batch = feed.fetch(data, jax.tree.map(lambda x: x[0], items))
        sums, logits = measure(variables, batch)
        return sums, (logits, batch['label'], batch['mask'])

    def evaluator(variables):
        parts = [step(variables, feed.data, feed.items(i, 1)) for i in range(count)]
        sums, batches = zip(*parts, strict=True)
        return Evaluation(functools.reduce(metrics.add, sums), list(batches))

    return evaluator


def batch_sums(
    loss: Callable, logits: jax.Array, label: jax.Array, mask: jax.Array
) -> metrics.Sums:
    """`metrics.batch_sums` and a `confusion` matrix int32 [K, K]: [B, K], [B], [B]."""
    target = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
    sums = metrics.batch_sums(logits, label, loss(logits, target), mask)
    return {**sums, 'confusion': metrics.confusion(logits, label, mask)}


def evaluate(
    workdir: str | Path, split: str = '', checkpoint: str = 'latest', tta: str = 'none'
) -> dict[str, Any]:
    """Metrics of a trained run, or of the runs of several seeds, on a split.

    Args:
      workdir: of the run.
      split: such as 'test' or 'train[:1000]'; '' is the run's validation split.
      checkpoint: 'latest', 'best' or a step.
      tta: test-time augmentation, see `tta.make_predict`.

    Returns:
      As `evaluate_run`; of a baseline, its result.json. Of several seeds: `split`; `seeds`, how many
      the config has; `members`, one such dict for each that has ended; and `mean`, the mean and the
      half-width of the 95% t-interval of each number.

    Raises:
      UserError: no run, no checkpoint, no such split, or no seed that has ended; or other than the
        defaults of a baseline.
    """
    config = workdir_lib.read_config(Path(workdir))
    if config.seeds > 1:
        members = results.read(workdir).members
        ended = [member.workdir for member in members if member.result]
        if not ended:
            begun = [m.workdir for m in members if workdir_lib.has_checkpoints(m.workdir)]
            choice = f', or evaluate one as it is: {begun[0]}' if begun else ''
            raise UserError(
                f'None of the {config.seeds} seeds of {workdir} has ended. Repeat its `jaxcls train`{choice}.'
            )
        found = [evaluate(place, split, checkpoint, tta) for place in ended]
        return {
            'split': found[0]['split'],
            'seeds': config.seeds,
            'members': found,
            'mean': results.means(found),
        }
    if experiment_lib.is_baseline(config):
        return _evaluate_baseline(Path(workdir), split, checkpoint, tta)
    return evaluate_run(runs.open_run(workdir, checkpoint), split, tta)


def _evaluate_baseline(workdir: Path, split: str, checkpoint: str, tta: str) -> dict[str, Any]:
    """A baseline leaves no estimator to run again, but its predictions of the validation split."""
    if (checkpoint, tta) != ('latest', 'none'):
        raise UserError(
            f'{workdir} is a baseline, which has neither checkpoints nor test-time augmentation: '
            f'leave out --checkpoint={checkpoint} --tta={tta}.'
        )
    [member] = results.read(workdir).members
    validation = member.config.data.validation
    if split not in ('', validation):
        raise UserError(
            f'{workdir} is a baseline, which keeps its predictions of {validation!r} alone. Fit it anew '
            f'with --config.data.validation={split}.'
        )
    if not member.result:
        raise UserError(f'{workdir} has not ended. Repeat its `jaxcls train`.')
    names = {'split': validation, 'class_names': member.data['class_names']}
    return {**member.result, **names}


def evaluate_run(run: runs.Run, split: str = '', tta: str = 'none') -> dict[str, Any]:
    """Metrics of an opened run (or of trained weights, `experiment.open_weights`) on a split.

    Returns:
      All of `predictions.summarize`, with `loss`, the mean of the config's, `split`, `step`,
      `top1_interval` (Wilson, 95%) and `class_names`.

    Raises:
      UserError: no such split, or other classes than the run's.
    """
    split, loaded = runs.load_split(run, split)
    predict = tta_lib.make_predict(run.experiment, tta)
    evaluated = make_evaluator(run.experiment, loaded, run.mesh, predict)(run.variables)
    sums = jax.device_get(evaluated.sums)
    return {
        'split': split,
        'step': run.step,
        'loss': metrics.summarize(sums)['loss'],
        **predictions_lib.summarize(evaluated.predictions()),
        'top1_interval': intervals.wilson_interval(int(sums['top1']), int(sums['examples'])),
        'class_names': list(run.class_names),
    }
