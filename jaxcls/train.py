"""`fit(config, workdir)`: the training loop around one compiled program.

Between two events (a log line, a validation, a checkpoint) nothing waits for the device. What happens
at a step depends on the step alone, and a checkpoint holds the state with the sums not logged yet: so
a run that is killed anywhere resumes to the same bits and the same log.
"""

import bisect
import collections
import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from jaxcls import evaluation, metrics, pipeline, runs, sharding, steps
from jaxcls import experiment as experiment_lib
from jaxcls import report as report_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError

# So many steps over resident data are one program on an accelerator.
_STEPS_PER_CALL = 50
# Calls that may be under way on the device: enough to keep it busy, few enough to stop soon.
_CALLS_AHEAD = 2

OnEvent = Callable[[dict[str, Any]], None]


class Result(NamedTuple):
    """What `fit` returns.

    Attributes:
      metrics: the last validation record.
      records: every record of metrics.jsonl.
      state: the final state.
      stopped: 'done', 'early' (no better validation loss), 'SIGINT' or 'SIGTERM'.
      workdir: of the run.
    """

    metrics: dict[str, Any]
    records: list[dict[str, Any]]
    state: steps.TrainState
    stopped: str
    workdir: Path


class _Run(NamedTuple):
    """What stays the same during a run."""

    experiment: experiment_lib.Experiment
    mesh: jax.sharding.Mesh
    workdir: Path
    checkpoints: workdir_lib.Checkpoints
    evaluator: evaluation.Evaluator
    feed: pipeline.Feed
    like: Any  # shapes and shardings of (state, totals)
    events: '_Events'
    clock: '_Clock'
    writer: SummaryWriter | None  # of the first process
    on_event: OnEvent


def fit(config: ConfigDict, workdir: str | Path, on_event: OnEvent = lambda event: None) -> Result:
    """Trains a config in a directory, or goes on with the run that is there.

    Args:
      config: as from `jaxcls.config.get_config()`.
      workdir: of this run alone; made where it is missing.
      on_event: called with each event, a dict whose `kind` is 'begin' (from trained
        weights or from data), 'start', 'compiled', 'progress', 'train', 'validation' or 'checkpoint'.

    Raises:
      UserError: a mistake in the config, the data or the directory, found before anything is
        compiled; or a loss that stays non-finite.
    """
    workdir = Path(workdir)
    config = experiment_lib.resolve(config)
    workdir_lib.check(workdir, config)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    train, validation = (
        experiment_lib.load_split(config, split)
        for split in (config.data.train, config.data.validation)
    )
    _check_classes(train.class_names, validation.class_names)
    reader = experiment_lib.make_reader(config, train, train=True)
    experiment = experiment_lib.build(
        config, reader.shape, len(train.class_names), len(train.source)
    )
    like = experiment_lib.abstract_checkpoint(experiment, mesh)  # traces the whole step
    start = None
    if not workdir_lib.has_checkpoints(workdir):
        start = runs.make_start(
            experiment, like[0], reader, lambda event: on_event({'kind': 'begin', **event})
        )
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(workdir_lib.locked(workdir))
            workdir_lib.start(workdir, config, _describe_data(config, reader, validation))

        sharding.on_first_process(claim)
        checkpoints = workdir_lib.Checkpoints(workdir, config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(like)
        history = _rewind(workdir, restored.step if restored else 0)
        feed = _training_feed(experiment, reader, mesh)
        stack.callback(feed.close)
        run = _Run(
            experiment=experiment,
            mesh=mesh,
            workdir=workdir,
            checkpoints=checkpoints,
            evaluator=evaluation.make_evaluator(experiment, validation, mesh),
            feed=feed,
            like=like,
            events=_Events.of(experiment, feed),
            clock=_Clock(history[-1]['seconds'] if history else 0.0),
            writer=_tensorboard(workdir, restored, stack),
            on_event=on_event,
        )
        return _finish(run, *_train(run, restored, start, history))


def _describe_data(config, reader: pipeline.Reader, validation) -> dict[str, Any]:
    sizes = {
        config.data.train: len(reader.split.source),
        config.data.validation: len(validation.source),
    }
    names, shape = reader.split.class_names, reader.shape
    return {'class_names': names, 'image_shape': shape, 'examples': sizes}


def _training_feed(experiment, reader: pipeline.Reader, mesh) -> pipeline.Feed:
    config = experiment.config
    order = functools.partial(
        pipeline.training_order, config.seed, experiment.examples, config.batch_size
    )
    return experiment_lib.make_feed(config, reader, order, mesh, experiment.total_steps, train=True)


def _tensorboard(workdir: Path, restored, stack: contextlib.ExitStack) -> SummaryWriter | None:
    """The event file of the first process; what an earlier start wrote after the step is purged."""
    if jax.process_index():
        return None
    writer = SummaryWriter(str(workdir), purge_step=restored.step + 1 if restored else None)
    stack.callback(writer.close)
    return writer


def _check_classes(train: tuple[str, ...], validation: tuple[str, ...]):
    if train != validation:
        raise UserError(
            f'The training split has {len(train)} classes and the validation split '
            f'{len(validation)}; only in training: {sorted(set(train) - set(validation))[:5]}, only '
            f'in validation: {sorted(set(validation) - set(train))[:5]}. Give both the same classes.'
        )


def _rewind(workdir: Path, step: int) -> list[dict[str, Any]]:
    """The records up to a step; the log is cut there."""
    if jax.process_index() == 0:
        workdir_lib.rewind_metrics(workdir, step)
    return [record for record in workdir_lib.read_metrics(workdir) if record['step'] <= step]


class _Events(NamedTuple):
    """The steps after which something is logged, validated or saved; each call of a program ends by one."""

    log: frozenset[int]
    validate: frozenset[int]
    checkpoint: frozenset[int]
    stops: list[int]
    steps_per_call: int

    @classmethod
    def of(cls, experiment: experiment_lib.Experiment, feed: pipeline.Feed) -> '_Events':
        config, total = experiment.config, experiment.total_steps

        def every(epochs):
            epochs = max(epochs, config.batch_size / experiment.examples)
            due = {experiment.steps(i * epochs) for i in range(1, int(config.epochs / epochs) + 2)}
            return frozenset(step for step in due if step < total) | {total}

        validate = every(config.validate_every_epochs)
        checkpoint = every(config.checkpoint_every_epochs)
        log = validate | set(range(config.log_every_steps, total, config.log_every_steps))
        # On CPU convolutions are slow inside a loop; streamed batches of many steps would fill memory.
        several = jax.default_backend() != 'cpu' and feed.resident
        per_call = config.steps_per_call or (_STEPS_PER_CALL if several else 1)
        return cls(log, validate, checkpoint, sorted(log | checkpoint), per_call)

    def next_call(self, step: int) -> int:
        """How many steps to run as one program: all of a call, or one where an event is nearer."""
        near = self.stops[bisect.bisect_right(self.stops, step)] - step
        return self.steps_per_call if near >= self.steps_per_call else 1


class _Clock:
    """Wall time: of the whole run, and of training alone between two log lines."""

    def __init__(self, seconds: float):
        self.begin = time.perf_counter() - seconds
        self.mark, self.paused = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Since the run began, over all its restarts."""
        return time.perf_counter() - self.begin

    @contextlib.contextmanager
    def pause(self):
        """Leaves something out of the training time."""
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def lap(self) -> float:
        """Training seconds since the last lap."""
        now = time.perf_counter()
        lap, self.mark, self.paused = now - self.mark - self.paused, now, 0.0
        return lap


class _Signals:
    """Ctrl-C and SIGTERM as a flag, so that the step under way is finished and saved."""

    def __enter__(self):
        self.name, self.previous = '', {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, _frame):
        self.name = signal.Signals(number).name
        signal.signal(number, self.previous[number])  # a second one ends at once

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def received(self, together: bool) -> str:
        """The signal's name or ''; several processes ask each other, where all are together."""
        if jax.process_count() == 1:
            return self.name
        if not together:
            return ''
        anyone = multihost_utils.process_allgather(jnp.int32(bool(self.name))).any()
        return (self.name or 'SIGTERM') if anyone else ''


def _train(run: _Run, restored, start, history):
    """From the restored or the first step to the last, an early stop or a signal.

    Returns:
      The state, the records, 'done', 'early' or the signal, and the last confusion matrix, if any.
    """
    experiment, events = run.experiment, run.events
    zeros = _make_zeros(run.like[1])
    state, totals = (
        restored.tree
        if restored
        else (experiment_lib.initial_state(experiment, run.like[0], start), zeros())
    )
    step = restored.step if restored else 0
    run.on_event({'kind': 'start', 'step': step, 'run': run, 'state': state})
    advance = _make_advance(run)
    early, confusion = _gives_up(experiment, history), None
    run.clock.lap()
    with _Signals() as signals:
        while step < experiment.total_steps and not early:
            count = events.next_call(step)
            state, totals = advance(step, count, state, totals)
            step += count
            run.on_event({'kind': 'progress', 'step': step})
            if step in events.log:
                history.append(_log(run, step, state, totals, history))
                totals = zeros()
            best = False
            if step in events.validate:
                record, confusion = _validate(run, step, state)
                history.append(record)
                early, best = _gives_up(experiment, history), _is_best(history)
            name = signals.received(step in events.log)
            if step in events.checkpoint or best or early or name:
                _save(run, step, (state, totals), history)
            if name:
                return state, history, name, confusion
    return state, history, 'early' if early else 'done', confusion


def _make_zeros(like) -> Callable:
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)  # noqa: E731
    return jax.jit(zeros, out_shardings=places)


def _make_advance(run: _Run) -> Callable:
    """`advance(step, count, state, totals)`: runs `count` steps, compiling at the first call of a count."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.like)
    run_steps = jax.jit(
        steps.make_run_steps(run.experiment.train_step, run.feed.fetch),
        donate_argnums=0,
        out_shardings=places,
    )
    programs, ahead = {}, collections.deque()

    def advance(step, count, state, totals):
        args = (state, totals, run.feed.data, run.feed.items(step, count))
        if count not in programs:
            with run.clock.pause():
                begin = time.perf_counter()
                programs[count] = run_steps.lower(*args).compile()
                seconds = time.perf_counter() - begin
            run.on_event({'kind': 'compiled', 'steps': count, 'seconds': seconds})
        state, totals = programs[count](*args)
        ahead.append(totals)
        if len(ahead) > _CALLS_AHEAD:
            jax.block_until_ready(ahead.popleft())
        return state, totals

    return advance


def _validations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in history if record['kind'] == 'validation']


def _gives_up(experiment: experiment_lib.Experiment, history: list[dict[str, Any]]) -> bool:
    """Whether the validation loss has had no new minimum for `early_stopping_epochs`."""
    patience, validations = experiment.config.early_stopping_epochs, _validations(history)
    if not (patience and validations):
        return False
    best = min(validations, key=lambda r: math.inf if r['loss'] is None else r['loss'])
    return validations[-1]['step'] - best['step'] >= experiment.steps(patience)


def _is_best(history: list[dict[str, Any]]) -> bool:
    """Whether the last validation has the highest accuracy so far."""
    *earlier, last = _validations(history)
    return all(record['top1'] < last['top1'] for record in earlier)


def _log(run: _Run, step: int, state: steps.TrainState, totals, history) -> dict[str, Any]:
    """Writes the training metrics since the last log line."""
    totals, bad_in_a_row = jax.device_get((totals, state.bad_steps))
    bad_steps = int(totals['bad_steps'])
    # A skipped step does not move the optimiser's schedule on.
    skipped = bad_steps + sum(record.get('bad_steps', 0) for record in history)
    record = {
        'kind': 'train',
        **_place(run, step),
        **_finite(metrics.summarize(totals)),
        'learning_rate': float(run.experiment.learning_rate(max(step - 1 - skipped, 0))),
        'bad_steps': bad_steps,
        'images_per_second': round(int(totals['examples']) / run.clock.lap(), 1),
    }
    _write(run, record)
    if bad_in_a_row >= run.experiment.config.max_bad_steps:
        raise UserError(_diverged(run, step, int(bad_in_a_row)))
    return record


def _diverged(run: _Run, step: int, bad_in_a_row: int) -> str:
    run.checkpoints.wait()
    saved = run.checkpoints.manager.latest_step()
    kept = (
        'There is no checkpoint yet' if saved is None else f'Step {saved} is saved in {run.workdir}'
    )
    return (
        f'Stopped at step {step}: the loss or its gradient has not been finite in the last '
        f'{bad_in_a_row} steps, since step {step - bad_in_a_row + 1} '
        f'(config.max_bad_steps={run.experiment.config.max_bad_steps}). {kept}. Try, in another '
        '--workdir, a lower config.learning_rate, config.clip_norm=1.0 or a longer '
        'config.warmup_epochs.'
    )


def _finite(summary: dict[str, float]) -> dict[str, float | None]:
    """None, which JSON has, for NaN and infinity, which it has not."""
    return {key: value if math.isfinite(value) else None for key, value in summary.items()}


def _validate(run: _Run, step: int, state: steps.TrainState) -> tuple[dict[str, Any], Any]:
    """Writes the validation metrics; the confusion matrix comes along."""
    with run.clock.pause():
        sums = jax.device_get(run.evaluator(steps.evaluation_variables(state)))
    record = {'kind': 'validation', **_place(run, step), **_finite(metrics.summarize(sums))}
    _write(run, record)
    return record, sums['confusion']


def _place(run: _Run, step: int) -> dict[str, Any]:
    epoch = step * run.experiment.config.batch_size / run.experiment.examples
    return {'step': step, 'epoch': round(epoch, 4), 'seconds': round(run.clock.seconds(), 3)}


def _write(run: _Run, record: dict[str, Any]):
    run.on_event(record)
    if not run.writer:
        return
    workdir_lib.append_metrics(run.workdir, record)
    for name, value in record.items():
        if name not in ('kind', 'step') and value is not None:
            run.writer.add_scalar(f'{name}/{record["kind"]}', value, record['step'])


def _save(run: _Run, step: int, tree, history: list[dict[str, Any]]):
    with run.clock.pause():
        latest = history[-1] if history else {}
        scored = latest.get('kind') == 'validation' and latest['step'] == step
        run.checkpoints.save(step, tree, {'top1': latest['top1']} if scored else None)
        if run.writer:
            run.writer.flush()
    run.on_event({'kind': 'checkpoint', 'step': step})


def _finish(run: _Run, state, history, stopped: str, confusion) -> Result:
    """Waits for the last checkpoint and, at the end of training, writes the result and the pictures."""
    run.checkpoints.wait()
    validations = _validations(history)
    result = Result(validations[-1] if validations else {}, history, state, stopped, run.workdir)
    if stopped in ('done', 'early'):
        if confusion is None:  # the run was complete before
            sums = run.evaluator(steps.evaluation_variables(state))
            confusion = jax.device_get(sums['confusion'])
        if jax.process_index() == 0:
            report_lib.write(run.workdir, confusion, history)
    return result
