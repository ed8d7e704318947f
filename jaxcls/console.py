"""What a run shows: a live line on a terminal, plain lines elsewhere, tables at the end."""

import time
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxcls import results
from jaxcls.terminal import printable


def print_line(console: Console, text: str):
    """One line, as it is."""
    console.print(Text(printable(text, keep='\n')), soft_wrap=True)


class Reporter:
    """`fit`'s `on_event`: prints to standard output as the run goes."""

    def __init__(self, console: Console):
        self.console = console
        self.train: dict[str, Any] = {}
        self.window: list[dict[str, Any]] = []
        self.progress = Progress(
            TextColumn('{task.description}'), BarColumn(), console=console, transient=True
        )
        self.task = self.progress.add_task('compiling', total=None)

    def __call__(self, event: dict[str, Any]):
        if jax.process_index() == 0:
            getattr(self, f'on_{event["kind"]}')(event)

    def on_begin(self, event):
        if 'source' in event:
            fresh = sorted({path.rpartition('/')[0].split('/', 1)[1] for path in event['fresh']})
            kept = f'; {", ".join(fresh)} begins afresh' if fresh else ''
            self.print(f'Starting from {event["loaded"]} arrays of {event["source"]}{kept}.')
        else:
            self.print(
                '  '.join(f'{key} {value:.4g}' for key, value in event.items() if key != 'kind')
            )

    def on_start(self, event):
        run = event['run']
        experiment, config = run.experiment, run.experiment.config
        parameters = sum(leaf.size for leaf in jax.tree.leaves(event['state'].params))
        self.begin_at(event['step'], run)
        shape = 'x'.join(map(str, experiment.image_shape))
        self.print(
            f'{config.model.name} ({parameters:,} parameters) on {config.data.name}: '
            f'{experiment.examples:,} images {shape}, {experiment.num_classes} classes, '
            f'{self.total:,} steps of {config.batch_size} on {describe_devices(run.mesh)}, '
            f'in {run.workdir}'
        )
        if experiment.private:
            self.print(self.private(experiment))
        if event['step']:
            self.print(f'Resuming after step {event["step"]:,}.')
        if self.console.is_terminal:
            self.progress.start()

    def private(self, experiment) -> str:
        """The privacy of a run, before it is trained."""
        plan, planned = experiment.private, experiment.steps(experiment.config.epochs)
        if not plan.noise_multiplier:
            return 'Private training without noise: it guarantees nothing.'
        ends = f'; the budget ends it after {self.total:,} of {planned:,} steps'
        return (
            f'Private training: noise multiplier {plan.noise_multiplier:.4g}, batches of '
            f'{plan.batch_size} on average, at most {plan.rows}; epsilon '
            f'{plan.epsilon(self.total):.3f} at delta {plan.delta:g} in the end'
            f'{ends if self.total < planned else ""}.'
        )

    def begin_at(self, step: int, run):
        """What the lines to come need of a run, or of several in one program."""
        experiment = run.experiment
        self.total, self.batch_size = experiment.total_steps, experiment.config.batch_size
        self.epochs_a_step = self.batch_size / experiment.examples
        self.validate = run.events.validate
        self.first, self.begin = step, time.perf_counter()

    def on_restart(self, event):
        self.print(
            f'{event["workdir"]} has no checkpoint: it was stopped before it saved one. Its '
            f'{event["dropped"]} log lines are dropped, and it starts again from step 0.'
        )

    def on_compiled(self, event):
        self.begin += event['seconds']
        if event['seconds'] > 10:
            self.print(f'Compiled in {event["seconds"]:.1f} s.')

    def on_progress(self, event):
        if not self.console.is_terminal:
            return
        step = event['step']
        speed = (step - self.first) / max(time.perf_counter() - self.begin, 1e-6)
        left = (self.total - step) / max(speed, 1e-6)
        parts = [f'step {step:,}/{self.total:,}', f'epoch {step * self.epochs_a_step:.2f}']
        if self.train:
            parts += [
                f'loss {show(self.train["loss"])}',
                f'accuracy {show(self.train["top1"], "%")}',
            ]
        parts += [f'{speed * self.batch_size:,.0f} images/s', f'{_duration(left)} left']
        self.progress.update(
            self.task, description='  '.join(parts), completed=step, total=self.total
        )

    def on_train(self, event):
        self.train = event
        self.window.append(event)
        if not self.console.is_terminal and event['step'] not in self.validate:
            self.print(f'{self.line(event)}  {self.speed(event)}')

    def on_validation(self, event):
        """An epoch's line: validation, then training since the validation before."""
        seed = event.get('seed')  # of several in one program
        mean = results.average([record for record in self.window if record.get('seed') == seed])
        self.window = [record for record in self.window if record.get('seed') != seed]
        train = f'training {show(mean["loss"])} {show(mean["top1"], "%")}'
        self.print(f'{self.line(event)} validation  {train}  {self.speed(self.train)}')

    def on_checkpoint(self, event):
        pass

    def on_complete(self, event):
        self.print(f'{event["workdir"]} is complete. Choose another --workdir to train again.')

    def on_member(self, event):
        self.print(f'Training in {", ".join(map(str, event["workdirs"]))}')

    def on_together(self, event):
        self.begin_at(event['step'], event['run'])
        self.print(f'{len(event["run"].members)} seeds in one program, {self.total:,} steps')
        if self.console.is_terminal:
            self.progress.start()

    def on_baseline(self, event):
        self.total, self.batch_size, self.validate = 1, event['examples'], {1}
        self.print(
            f'{event["estimator"]} on {event["examples"]:,} images, {event["features"]:,} features'
        )

    def line(self, event) -> str:
        """Where a record was taken, its loss and its accuracy."""
        place = f'step {event["step"]:>{len(str(self.total))}}/{self.total}  epoch {event["epoch"]:7.2f}'
        if 'seed' in event:
            place += f'  seed {event["seed"]}'
        if event.get('epsilon') is not None:
            place += f'  epsilon {event["epsilon"]:.3f}'
        return f'{place}  loss {show(event["loss"])}  accuracy {show(event["top1"], "%")}'

    def speed(self, event) -> str:
        """Images a second, the time left, and what was skipped."""
        speed = event['images_per_second']
        left = (self.total - event['step']) * self.batch_size / max(speed, 1e-6)
        skipped = f'  {event["bad_steps"]} non-finite steps skipped' if event['bad_steps'] else ''
        return f'{speed:,.0f} images/s  {_duration(left)} left{skipped}'

    def print(self, text: str):
        """One line, as it is."""
        print_line(self.console, text)

    def close(self):
        """Takes the live line away."""
        if self.progress.live.is_started:
            self.progress.stop()


class SweepReporter:
    """`on_event` of a sweep or a study: a line for each setting, and what each run ends with."""

    def __init__(self, console: Console):
        self.console = console

    def __call__(self, event: dict[str, Any]):
        if jax.process_index():
            return
        if event['kind'] == 'setting':
            print_line(self.console, f'[{event["number"]}/{event["count"]}] {event["name"]}')
        elif event['kind'] in ('row', 'diverged'):
            print_line(self.console, f'  {event["text"]}')


def describe_devices(mesh) -> str:
    """Such as '1 cpu' or '8 NVIDIA H100'."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    return f'{mesh.size} {", ".join(kinds)}'


def show(value: float | None, unit: str = '') -> str:
    """A metric in four digits, or as a percentage; 'none' where it was not finite."""
    if value is None:
        return 'none'
    return f'{value:.2%}' if unit == '%' else f'{value:.4f}'


def result_table(member: results.Member) -> Table:
    """The end of a run: accuracy with its interval, the gap, where the files are."""
    summary = member.result
    title = escape(printable(f'Result of {member.workdir}'))
    table = Table(show_header=False, title=title, title_justify='left')
    low, high = summary['top1_interval']
    rows = {
        'validation accuracy': f'{summary["top1"]:.2%}  (95% interval {low:.2%} to {high:.2%})',
        'best epoch': f'{summary["best_top1"]:.2%}',
        'top-5 accuracy': f'{summary["top5"]:.2%}',
        'macro F1, mean IoU': f'{summary["f1_macro"]:.4f}, {summary["iou_mean"]:.4f}',
        'validation loss': show(summary['loss']),
    }
    train, last = member.of_kind('train'), member.last_epoch()
    if last['top1'] is not None:
        rows['training, last epoch'] = f'loss {last["loss"]:.4f}, accuracy {last["top1"]:.2%}'
        rows['gap in accuracy'] = f'{last["top1"] - summary["top1"]:+.2%} training over validation'
    if summary.get('epsilon') is not None:
        delta = member.config.privacy.delta
        rows['privacy'] = f'epsilon {summary["epsilon"]:.3f} at delta {delta:g}'
    skipped = sum(record['bad_steps'] for record in train)
    if skipped:
        rows['skipped steps'] = f'{skipped} were not finite'
    rows['epochs, time'] = f'{summary["epoch"]:.1f}, {_duration(summary["seconds"])}'
    rows['pictures'] = 'curves.png, confusion.png'
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(min(seconds, 359_999)), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'
