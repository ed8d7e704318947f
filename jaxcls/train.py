"""`fit(config, workdir)`: the training loop around one compiled program.

Between two events (a log line, a validation, a checkpoint) nothing waits for the device. What happens
at a step depends on the step alone, and a checkpoint holds the state with the sums not logged yet: so
a run that is killed anywhere resumes to the same bits and the same log.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxcls import (
    baselines,
    evaluation,
    inspection,
    loop,
    metrics,
    pipeline,
    results,
    runs,
    sharding,
    steps,
)
from jaxcls import experiment as experiment_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError


class _Run(NamedTuple):
    """What stays the same during a run."""

    experiment: experiment_lib.Experiment
    mesh: jax.sharding.Mesh
    workdir: Path
    checkpoints: workdir_lib.Checkpoints
    evaluator: evaluation.Evaluator
    feed: pipeline.Feed
    like: Any  # shapes and shardings of (state, totals)
    events: loop.Events
    clock: loop.Clock
    writer: Any  # of TensorBoard's events; None but in the first process
    on_event: loop.OnEvent
    begin_step: Callable[[int], None]  # notes which step is under way


def fit(
    config: ConfigDict,
    workdir: str | Path,
    on_event: loop.OnEvent = lambda event: None,
    until_epoch: float = math.inf,
) -> results.Result:
    """Trains a config in a directory, or goes on with the run that is there.

    Args:
      config: as from `jaxcls.config.get_config()`.
      workdir: of this run alone; made where it is missing.
      on_event: called with each event, a dict whose `kind` is 'begin' (from trained weights or from
        data), 'restart' (a run that was stopped before it saved a step), 'start', 'compiled',
        'progress', 'train', 'validation' or 'checkpoint'.
      until_epoch: where to save and pause, 'paused'; the schedule is that of the whole run.

    Raises:
      UserError: a mistake in the config, the data or the directory, found before anything is
        compiled; or (loop.Diverged) a loss that stays non-finite.
    """
    workdir = Path(workdir)
    config = experiment_lib.resolve(config)
    if config.seeds > 1:
        raise UserError(
            f'fit trains one network and config.seeds is {config.seeds}: use jaxcls.sweep.fit_seeds.'
        )
    if experiment_lib.is_baseline(config):
        return baselines.fit(config, workdir, on_event)
    workdir_lib.check(workdir, config, experiment_lib.TABLES)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    reader, validation, data = experiment_lib.open_data(config)
    workdir_lib.check_same(config, data)
    teacher = runs.open_teacher(config, data)
    experiment = experiment_lib.build_for(config, data, teacher)
    experiment_lib.check_rows(experiment, mesh)
    like = experiment_lib.abstract_checkpoint(experiment, mesh)  # traces the whole step
    start = None
    if not workdir_lib.has_checkpoints(workdir):
        start = runs.make_start(
            experiment, like[0], reader, lambda event: on_event({'kind': 'begin', **event})
        )
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(workdir_lib.locked(workdir))
            workdir_lib.start(workdir, config, data, experiment_lib.TABLES)

        sharding.on_first_process(claim)
        checkpoints = workdir_lib.Checkpoints(workdir, config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(like)
        if not restored and (workdir / 'result.json').is_file():
            raise workdir_lib.no_checkpoint(workdir)
        step = restored.step if restored else 0
        history, dropped = workdir_lib.rewind_metrics(workdir, step)
        if dropped and not restored:
            on_event({'kind': 'restart', 'workdir': workdir, 'dropped': dropped})
        feed = experiment_lib.make_training_feed(experiment, reader, mesh, experiment.total_steps)
        stack.callback(feed.close)
        run = _Run(
            experiment=experiment,
            mesh=mesh,
            workdir=workdir,
            checkpoints=checkpoints,
            evaluator=evaluation.make_evaluator(experiment, validation, mesh),
            feed=feed,
            like=like,
            events=loop.Events.of(experiment, feed),
            clock=loop.Clock(history, int(restored.tree[1]['examples']) if restored else 0),
            writer=loop.tensorboard(workdir, restored, stack),
            on_event=on_event,
            begin_step=stack.enter_context(workdir_lib.attempt(workdir, step)),
        )
        return _finish(run, *_train(run, restored, start, history, until_epoch))


def _train(run: _Run, restored, start, history, until_epoch):
    """From the restored or the first step to the last, an early stop or a signal.

    Returns:
      The state, the records, 'done', 'early', 'paused' or the signal, and the last evaluation, if any.
    """
    experiment, evaluated = run.experiment, None
    zeros = loop.make_zeros(run.like[1])
    tree = (
        restored.tree
        if restored
        else (experiment_lib.initial_state(experiment, run.like[0], start), zeros())
    )
    step = restored.step if restored else 0
    run.on_event({'kind': 'start', 'step': step, 'run': run, 'state': tree[0]})
    if _gives_up(experiment, history):
        return tree[0], history, 'early', None

    def log(step, state, totals):
        totals, bad_in_a_row = jax.device_get((totals, state.bad_steps))
        speed = run.clock.speed(int(totals['examples']))
        record = loop.train_record(experiment, step, run.clock, totals, history, speed)
        history.append(record)
        _write(run, record)
        diverged = loop.divergence(experiment, step, int(bad_in_a_row), history, run.checkpoints)
        if diverged:
            raise loop.Diverged(diverged)

    def validate(step, state):
        nonlocal evaluated
        record, evaluated = _validate(run, step, state)
        history.append(record)
        return _gives_up(experiment, history), loop.is_best(history)

    hooks = loop.Hooks(
        log=log,
        validate=validate,
        save=lambda step, tree: _save(run, step, tree, history),
        wait=run.checkpoints.wait,
        progress=lambda step: _progress(run, step),
    )
    advance = loop.make_advance(
        experiment.train_step, run.feed, run.like, run.clock, run.on_event, run.begin_step
    )
    run.clock.start()
    until = loop.last_step(experiment, until_epoch)
    state, stopped = loop.drive(tree, step, until, run.events, advance, zeros, hooks)
    return state, history, stopped, evaluated


def _gives_up(experiment: experiment_lib.Experiment, history: list[dict[str, Any]]) -> bool:
    """Whether the validation loss has had no new minimum for `early_stopping_epochs`."""
    patience = experiment.config.early_stopping_epochs
    validations = results.of_kind(history, 'validation')
    if not (patience and validations):
        return False
    best = min(validations, key=lambda r: math.inf if r['loss'] is None else r['loss'])
    patience = min(patience, experiment.config.epochs)
    return validations[-1]['step'] - best['step'] >= experiment.steps(patience)


def _validate(
    run: _Run, step: int, state: steps.TrainState
) -> tuple[dict[str, Any], evaluation.Evaluation]:
    """Writes the validation metrics; the evaluation comes along."""
    with run.clock.pause():
        evaluated = run.evaluator(steps.evaluation_variables(state))
        summary = metrics.summarize(evaluated.sums)
    record = loop.validation_record(run.experiment, step, run.clock, summary)
    _write(run, record)
    return record, evaluated


def _write(run: _Run, record: dict[str, Any]):
    run.on_event(record)
    loop.write(run.workdir, run.writer, record)


def _progress(run: _Run, step: int):
    run.checkpoints.check()
    run.on_event({'kind': 'progress', 'step': step})


def _save(run: _Run, step: int, tree, history: list[dict[str, Any]]):
    with run.clock.pause():
        latest = history[-1] if history else {}
        scored = latest.get('kind') == 'validation' and latest['step'] == step
        run.checkpoints.save(step, tree, {'top1': latest['top1']} if scored else None)
        if run.writer:
            with workdir_lib.writable(run.workdir):
                run.writer.flush()
    run.on_event({'kind': 'checkpoint', 'step': step})


def _finish(run: _Run, state, history, stopped: str, evaluated) -> results.Result:
    """At the end of training, writes the result and the pictures."""
    validations = results.of_kind(history, 'validation')
    result = results.Result(
        validations[-1] if validations else {}, history, state, stopped, run.workdir
    )
    complete = evaluated is None and (run.workdir / 'result.json').is_file()
    if stopped in ('done', 'early') and not complete:
        evaluated = evaluated or run.evaluator(steps.evaluation_variables(state))

        def write():
            cost = inspection.cost(run.experiment, state)
            results.write(run.workdir, evaluated.predictions(), history, cost)

        sharding.on_first_process(write)  # the others wait: a sweep looks at what is there
    return result
