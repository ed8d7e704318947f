"""The loop of steps around one compiled program, for one run or for many in one program.

What happens at a step depends on the step alone. Between two events (a log line, a validation, a
checkpoint) nothing waits for the device.
"""

import bisect
import collections
import contextlib
import functools
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxcls import experiment as experiment_lib
from jaxcls import metrics, pipeline, steps
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError

# So many steps over resident data are one program on an accelerator.
_STEPS_PER_CALL = 50
# Calls that may be under way on the device: enough to keep it busy, few enough to stop soon.
_CALLS_AHEAD = 2

OnEvent = Callable[[dict[str, Any]], None]


class Events(NamedTuple):
    """The steps after which something is logged, validated or saved; each call of a program ends by one."""

    log: frozenset[int]
    validate: frozenset[int]
    checkpoint: frozenset[int]
    stops: list[int]
    steps_per_call: int

    @classmethod
    def of(cls, experiment: experiment_lib.Experiment, feed: pipeline.Feed) -> 'Events':
        config, total = experiment.config, experiment.total_steps

        def every(epochs):
            epochs = min(max(epochs, config.batch_size / experiment.examples), config.epochs)
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


class Clock:
    """Wall time of the whole run, and the speed of training alone between two log lines.

    Args:
      history: the run's records so far.
      examples: of the sums that are not logged yet, of an earlier start.
      runs: how many share the time; it is that of one.
    """

    def __init__(self, history: list[dict[str, Any]], examples: int = 0, runs: int = 1):
        self.runs, self.earlier = runs, examples
        self.begin = time.perf_counter() - (history[-1]['seconds'] * runs if history else 0.0)
        self.mark, self.paused = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Since the run began, over all its restarts."""
        return (time.perf_counter() - self.begin) / self.runs

    @contextlib.contextmanager
    def pause(self):
        """Leaves something out of the training time."""
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def start(self):
        """Begins to time the training."""
        self.mark, self.paused = time.perf_counter(), 0.0

    def speed(self, examples: int) -> float:
        """Images a second since the last call, of sums of so many examples."""
        seconds = (time.perf_counter() - self.mark - self.paused) / self.runs
        speed, self.earlier = (examples - self.earlier) / seconds, 0
        self.start()
        return speed


class Signals:
    """Ctrl-C and SIGTERM as a flag, so that the step under way is finished and saved."""

    def __enter__(self):
        self.name, self.previous = '', {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, _frame):
        self.name = signal.Signals(number).name
        self.__exit__()  # a second one, of either kind, is not waited for

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


def make_zeros(like) -> Callable:
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)  # noqa: E731
    return jax.jit(zeros, out_shardings=places)


def make_advance(
    train_step: Callable,
    feed: pipeline.Feed,
    like: Any,
    clock: Clock,
    on_event: OnEvent,
    begin_step: Callable[[int], None] = lambda step: None,
) -> Callable:
    """`advance(step, count, state, totals)`: runs `count` steps, compiling at the first call of a count.

    Args:
      like: shapes and shardings of (state, totals).
      begin_step: told the step that is about to run, once it is compiled.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    run_steps = jax.jit(
        steps.make_run_steps(train_step, feed.fetch),
        donate_argnums=0,
        out_shardings=places,
    )
    programs, ahead = {}, collections.deque()

    def advance(step, count, state, totals):
        args = (state, totals, feed.data, feed.items(step, count))
        if count not in programs:
            with clock.pause():
                begin = time.perf_counter()
                programs[count] = run_steps.lower(*args).compile()
                seconds = time.perf_counter() - begin
            on_event({'kind': 'compiled', 'steps': count, 'seconds': seconds})
        begin_step(step + 1)
        state, totals = programs[count](*args)
        ahead.append(totals)
        if len(ahead) > _CALLS_AHEAD:
            jax.block_until_ready(ahead.popleft())
        return state, totals

    return advance


def last_step(experiment: experiment_lib.Experiment, until_epoch: float) -> int:
    """The last step of a run that ends or pauses at an epoch."""
    if until_epoch >= experiment.config.epochs:
        return experiment.total_steps
    return min(experiment.steps(until_epoch), experiment.total_steps)


def train_record(
    experiment: experiment_lib.Experiment,
    step: int,
    clock: Clock,
    totals: metrics.Sums,
    history: list[dict[str, Any]],
    images_per_second: float,
) -> dict[str, Any]:
    """The log line of a step: the sums since the last one."""
    bad_steps = int(totals['bad_steps'])
    # A skipped step does not move the optimiser's schedule on.
    skipped = bad_steps + sum(record.get('bad_steps', 0) for record in history)
    return {
        'kind': 'train',
        **_place(experiment, step, clock),
        **finite(metrics.summarize(totals)),
        'learning_rate': float(experiment.learning_rate(max(step - 1 - skipped, 0))),
        'bad_steps': bad_steps,
        'images_per_second': round(images_per_second, 1),
    }


def validation_record(
    experiment: experiment_lib.Experiment, step: int, clock: Clock, summary: dict[str, float]
) -> dict[str, Any]:
    """The log line of a validation."""
    spent = {'epsilon': experiment.private.epsilon(step)} if experiment.private else {}
    return {'kind': 'validation', **_place(experiment, step, clock), **finite(summary | spent)}


def _place(experiment, step: int, clock: Clock) -> dict[str, Any]:
    epoch = step * experiment.config.batch_size / experiment.examples
    return {'step': step, 'epoch': round(epoch, 4), 'seconds': round(clock.seconds(), 3)}


@functools.cache
def _tensorboardx():
    """The module, without PyTorch, which it would import where it is installed: that takes seconds."""
    hide = 'torch' not in sys.modules
    if hide:
        sys.modules['torch'] = None
    try:
        import tensorboardX
    finally:
        if hide:
            del sys.modules['torch']
    return tensorboardX


def tensorboard(
    workdir: Path, restored: workdir_lib.Restored | None, stack: contextlib.ExitStack
) -> Any:
    """The event file of the first process; what an earlier start wrote after the step is purged.

    tensorboardX's own `SummaryWriter` writes in a thread, where nobody sees that a disk is full.

    Returns:
      A `tensorboardX.RecordWriter`; None in the other processes.
    """
    if jax.process_index():
        return None
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'
    with workdir_lib.writable(workdir):
        writer = _tensorboardx().RecordWriter(str(workdir / name))
    stack.callback(_close, workdir, writer)
    _write_event(writer, 0, file_version='brain.Event:2')
    if restored:
        kind = _tensorboardx().proto.event_pb2.SessionLog
        _write_event(writer, restored.step + 1, session_log=kind(status=kind.START))
    return writer


def _close(workdir: Path, writer):
    with workdir_lib.writable(workdir):
        writer.close()


def _write_event(writer, step: int, **what):
    event = _tensorboardx().proto.event_pb2.Event(wall_time=time.time(), step=step, **what)
    writer.write(event.SerializeToString())


def write(workdir: Path, writer: Any, record: dict[str, Any]):
    """Adds a log line to metrics.jsonl and to TensorBoard's events, by the process that has a writer."""
    if not writer:
        return
    workdir_lib.append_metrics(workdir, record)
    summary = _tensorboardx().proto.summary_pb2.Summary
    values = [
        summary.Value(tag=f'{name}/{record["kind"]}', simple_value=value)
        for name, value in record.items()
        if name not in ('kind', 'step') and value is not None
    ]
    with workdir_lib.writable(workdir):
        _write_event(writer, record['step'], summary=summary(value=values))


def finite(summary: dict[str, float]) -> dict[str, float | None]:
    """None, which JSON has, for NaN and infinity, which it has not."""
    return {key: value if math.isfinite(value) else None for key, value in summary.items()}


def is_best(history: list[dict[str, Any]]) -> bool:
    """Whether the last validation has the highest accuracy so far."""
    *earlier, last = (record for record in history if record['kind'] == 'validation')
    return all(record['top1'] < last['top1'] for record in earlier)


class Diverged(UserError):
    """The loss stayed non-finite."""


def divergence(
    experiment: experiment_lib.Experiment,
    step: int,
    bad_in_a_row: int,
    history: list[dict[str, Any]],
    checkpoints: workdir_lib.Checkpoints | None = None,
) -> str:
    """The message after `config.max_bad_steps` non-finite steps in a row; '' before.

    Args:
      checkpoints: of the run; None where it shares them with others.
    """
    limit = experiment.config.max_bad_steps
    if bad_in_a_row < limit:
        return ''
    kept = 'The other seeds of its program go on where they have not diverged'
    if checkpoints:
        checkpoints.wait()
        saved = checkpoints.manager.latest_step()
        place = checkpoints.directory.parent
        kept = (
            'There is no checkpoint yet' if saved is None else f'Step {saved} is saved in {place}'
        )
    good = [r for r in history if r['kind'] == 'train' and r['loss'] is not None]
    last = (
        f'the last finite loss is {good[-1]["loss"]:.4g}, logged at step {good[-1]["step"]}'
        if good
        else 'no finite loss was logged'
    )
    return (
        f'Stopped at step {step}: the loss or its gradient has not been finite in the last '
        f'{bad_in_a_row} steps, since step {step - bad_in_a_row + 1} '
        f'(config.max_bad_steps={limit}); {last}. {kept}. Try, in another '
        '--workdir, a lower config.learning_rate, config.clip_norm=1.0 or a longer '
        'config.warmup_epochs.'
    )


class Hooks(NamedTuple):
    """What a loop does at its events.

    Attributes:
      log: `(step, state, totals)`, the sums since the last log line.
      validate: `(step, state) -> (give up, save)`.
      save: `(step, (state, totals))`, in the background.
      wait: `()`, until all that was saved is on disk.
      progress: `(step)`, after each call of the program.
    """

    log: Callable
    validate: Callable
    save: Callable
    wait: Callable
    progress: Callable


def drive(
    tree: Any,
    step: int,
    until: int,
    events: Events,
    advance: Callable,
    zeros: Callable,
    hooks: Hooks,
) -> tuple[Any, str]:
    """From a step to another, an early stop or a signal; the last step is on disk when it returns.

    Args:
      tree: (state, totals).
      until: where to pause, or after the call that it is in: other calls would have other roundings.
      zeros: makes new totals.

    Returns:
      The state, and 'done', 'early', 'paused' (`until` is not the end) or the signal.
    """
    (state, totals), early = tree, False
    with Signals() as signals:
        while step < until and not early:
            count = events.next_call(step)
            state, totals = advance(step, count, state, totals)
            step += count
            hooks.progress(step)
            due = step in events.checkpoint or step >= until
            if step in events.log:
                hooks.log(step, state, totals)
                totals = zeros()
            if step in events.validate:
                early, save = hooks.validate(step, state)
                due |= early or save
            name = signals.received(step in events.log)
            if due or name:
                hooks.save(step, (state, totals))
            if name:
                break
        hooks.wait()
        name = signals.received(together=True)  # it may have come while the last step was saved
    end = 'early' if early else 'done' if step == events.stops[-1] else 'paused'
    return state, name or end
