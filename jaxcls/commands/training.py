"""`jaxcls train`, `sweep`, `study` and `lr-find`."""

import functools
import shlex
import signal
import sys
from pathlib import Path

from jaxcls.commands import common
from jaxcls.errors import UserError
from jaxcls.terminal import printable, refuse, say

TRAIN_HELP = """\
examples:
  jaxcls                                              the digits, in a minute on a laptop
  jaxcls --config=experiments/resnet_cifar.py         an experiment
  jaxcls --config=experiments/lenet_mnist.py --config.epochs=5 --config.model.activation=relu

Any field of the config can be set as --config.FIELD=VALUE. Another name for a section (model,
optimizer, schedule, loss) starts it from the defaults of what it names. The same command goes on
with a run that was stopped.
"""


def _train_arguments(parser):
    common.add_config(parser)
    parser.add_argument(
        '--workdir', type=Path, default=None, help='of the run; default: runs/NAME_OF_THE_CONFIG'
    )


def _run_train(args) -> int:
    import jax
    from rich.console import Console

    from jaxcls import console, sweep

    config = common.load_config(args)
    common.start()
    directory = args.workdir or Path('runs') / (
        Path(args.config).stem if args.config else 'lenet_digits'
    )
    out = Console()
    reporter = console.Reporter(out)
    try:
        outcome = sweep.fit_seeds(config, directory, reporter)
    finally:
        reporter.close()
    if outcome.stopped in sweep.SIGNALS:
        return _stopped(outcome.stopped)
    diverged = _print_diverged([outcome])
    if jax.process_index() == 0:
        _print_results(config, outcome, out)
    return 2 if diverged else 0


def _print_results(config, outcome, out):
    from jaxcls import console, sweep
    from jaxcls.report import page

    if config.seeds == 1 and outcome.group.members[0].result:
        out.print(console.result_table(outcome.group.members[0]))
    elif config.seeds > 1:
        say(page.text(sweep.seeds_table(outcome)))


def _print_diverged(outcomes) -> bool:
    """Says which runs were given up, and whether any was."""
    messages = [message for outcome in outcomes for message in outcome.diverged()]
    for message in messages:
        refuse(message)
    return bool(messages)


def _stopped(name: str, file=None) -> int:
    """After a signal: says how to go on."""
    program = 'jaxcls' if Path(sys.argv[0]).stem == 'jaxcls' else 'python -m jaxcls.main'
    say(f'Stopped by {name}; all steps are saved. To go on, run:', file)
    say(f'  {program} {shlex.join(sys.argv[1:])}', file)
    return 128 + signal.Signals[name]


def _sweep_arguments(parser):
    common.add_config(parser)
    parser.add_argument(
        '--grid', action='append', default=[], metavar='FIELD=A,B', help='an axis; repeat for more'
    )
    parser.add_argument(
        '--setting',
        action='append',
        default=[],
        metavar='"FIELD=A FIELD=B"',
        help='fields that go together; repeat for more',
    )
    parser.add_argument('--workdir', type=Path, default=None, help='default: runs/sweep-CONFIG')
    parser.add_argument(
        '--rungs', type=int, default=1, help='of successive halving; 1 (default) trains all in full'
    )
    parser.add_argument(
        '--keep', type=float, default=0.5, help='share that goes on at each rung; default 0.5'
    )
    parser.add_argument('--list', action='store_true', help='print the members and their numbers')
    parser.add_argument(
        '--member',
        type=int,
        default=None,
        help='train one alone, as in a SLURM array: --member=$SLURM_ARRAY_TASK_ID',
    )
    common.add_json(parser)


def _run_sweep(args) -> int:
    from rich.console import Console

    from jaxcls import console, sweep
    from jaxcls.report import page

    if not (args.grid or args.setting):
        raise UserError(
            'A sweep needs settings: --grid learning_rate=0.1,0.01 or --setting "FIELD=VALUE ...".'
        )
    load = functools.partial(common.load_config, args)
    settings = sweep.settings(load, args.grid, args.setting)
    directory = args.workdir or Path('runs') / f'sweep-{Path(args.config or "lenet_digits").stem}'
    if args.list:
        rows = [
            {'member': i, 'setting': name, 'seed': config.seed}
            for i, (name, config) in enumerate(sweep.members(settings))
        ]
        lines = [f'{row["member"]:>4}  {row["setting"]}, seed {row["seed"]}' for row in rows]
        common.show(args, rows, lambda _: '\n'.join(lines))
        return 0
    if args.member is not None and args.rungs > 1:
        raise UserError('--member trains one run alone, and --rungs compares all; leave one out.')
    common.start()
    out = Console(quiet=args.json)
    reporter = console.SweepReporter(out)
    if args.member is not None:
        return _run_member(args, settings, directory, console.Reporter(out))
    outcomes = sweep.run(settings, directory, reporter, args.rungs, args.keep)
    stopped = next((o.stopped for o in outcomes if o.stopped in sweep.SIGNALS), '')
    if stopped:
        return _stopped(stopped, sys.stderr if args.json else None)
    _print_diverged(outcomes)
    section = sweep.table(outcomes)
    common.show(args, section, page.text)
    return 0


def _run_member(args, settings, directory, reporter) -> int:
    """One run of a sweep, such as one task of a SLURM array."""
    from jaxcls import sweep

    try:
        outcome = sweep.run_member(settings, directory, args.member, reporter)
    finally:
        reporter.close()
    if outcome.stopped in sweep.SIGNALS:
        return _stopped(outcome.stopped, sys.stderr if args.json else None)
    [member] = outcome.group.members
    if args.json:
        common.print_json(member.result)
    return 2 if _print_diverged([outcome]) else 0


def _study_arguments(parser):
    common.take_fields(parser)
    parser.add_argument('name', help='of a file in experiments/studies, or the path of one')
    parser.add_argument(
        '--data', default='mnist', help="'digits', 'mnist' (default) or 'cifar10' (wants a GPU)"
    )
    parser.add_argument('--seeds', type=int, default=0, help="a setting; default: the study's own")
    parser.add_argument(
        '--workdir', type=Path, default=None, help='default: runs/studies/NAME-DATA'
    )


def _run_study(args) -> int:
    from rich.console import Console
    from rich.text import Text

    from jaxcls import config, console, experiment, study
    from jaxcls.report import page

    common.start()
    loaded = study.load(args.name, args.data)
    study.check_free(loaded, [path for path, _ in args.overrides])
    config.apply_overrides(loaded.config, args.overrides, experiment.TABLES)
    if args.seeds:
        loaded.config.seeds = args.seeds
    directory = args.workdir or Path('runs') / 'studies' / f'{Path(args.name).stem}-{args.data}'
    out = Console()
    out.print(Text(printable(loaded.question, keep='\n')))
    try:
        sections = study.run(loaded, directory, console.SweepReporter(out))
    except study.Stopped as stopped:
        return _stopped(str(stopped))
    for section in sections:
        if section['kind'] == 'table':
            say(page.text(section))
    say(f'{directory / "report.html"}')
    return 0


def _lr_find_arguments(parser):
    common.add_config(parser)
    parser.add_argument('--low', type=float, default=1e-6, help='first rate; default 1e-6')
    parser.add_argument('--high', type=float, default=10.0, help='last rate; default 10')
    parser.add_argument('--steps', type=int, default=100, help='default 100')
    parser.add_argument(
        '--picture', type=Path, default=Path('lr_find.png'), help='default lr_find.png'
    )
    common.add_json(parser)


def _run_lr_find(args) -> int:
    config = common.load_config(args)
    common.start()
    from jaxcls import lr_find, pictures

    pictures.check_place(args.picture, '--picture')
    result = lr_find.lr_find(config, low=args.low, high=args.high, steps=args.steps)
    lr_find.write(result, args.picture)
    common.show(args, result, lambda result: f'{lr_find.text(result)}\npicture: {args.picture}')
    return 0


COMMANDS = {
    'train': (_train_arguments, _run_train, 'train a config, or go on with a run'),
    'sweep': (_sweep_arguments, _run_sweep, 'train a grid or a list of settings'),
    'study': (_study_arguments, _run_study, 'answer a question of experiments/studies'),
    'lr-find': (_lr_find_arguments, _run_lr_find, 'a learning-rate range test'),
}
