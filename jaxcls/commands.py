"""The commands of the command line: arguments, and what each runs and prints."""

import functools
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from jaxcls.errors import UserError
from jaxcls.terminal import printable, refuse, say, warning_line

TRAIN_HELP = """\
examples:
  jaxcls                                              the digits, in a minute on a laptop
  jaxcls --config=experiments/resnet_cifar.py         an experiment
  jaxcls --config=experiments/lenet_mnist.py --config.epochs=5 --config.model.activation=relu

Any field of the config can be set as --config.FIELD=VALUE. Another name for a section (model,
optimizer, schedule, loss) starts it from the defaults of what it names. The same command goes on
with a run that was stopped.
"""


def _add_config(parser, description='a file with get_config() (it is run); default: the digits'):
    parser.add_argument('--config', default='', help=description)


def _add_json(parser):
    parser.add_argument('--json', action='store_true', help='print one JSON object, nothing else')


def _add_run(parser, nargs=None):
    parser.add_argument('workdir', type=Path, nargs=nargs, help='the directory of a run')
    parser.add_argument(
        '--checkpoint', default='latest', help="'latest' (default), 'best' or a step"
    )


def _train_arguments(parser):
    _add_config(parser)
    parser.add_argument(
        '--workdir', type=Path, default=None, help='of the run; default: runs/NAME_OF_THE_CONFIG'
    )


def _evaluate_arguments(parser):
    _add_run(parser, nargs='?')
    _add_config(parser, 'instead of a run: evaluates the weights of --config.model.init_from')
    parser.add_argument(
        '--split', default='', help="such as 'test'; default: the run's validation split"
    )
    parser.add_argument(
        '--tta',
        default='none',
        help="test-time augmentation: 'flip', 'shift', 'flip_shift', or how many views to average: "
        "the image and draws of the run's own augmentation",
    )
    _add_json(parser)


def _sweep_arguments(parser):
    _add_config(parser)
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
    _add_json(parser)


def _study_arguments(parser):
    parser.add_argument('name', help='of a file in experiments/studies, or the path of one')
    parser.add_argument(
        '--data', default='mnist', help="'digits', 'mnist' (default) or 'cifar10' (wants a GPU)"
    )
    parser.add_argument('--seeds', type=int, default=0, help="a setting; default: the study's own")
    parser.add_argument(
        '--workdir', type=Path, default=None, help='default: runs/studies/NAME-DATA'
    )


def _lr_find_arguments(parser):
    _add_config(parser)
    parser.add_argument('--low', type=float, default=1e-6, help='first rate; default 1e-6')
    parser.add_argument('--high', type=float, default=10.0, help='last rate; default 10')
    parser.add_argument('--steps', type=int, default=100, help='default 100')
    parser.add_argument(
        '--picture', type=Path, default=Path('lr_find.png'), help='default lr_find.png'
    )
    _add_json(parser)


def _workdirs(parser):
    parser.add_argument('workdirs', nargs='+', type=Path, help='directories of runs')


def _report_arguments(parser):
    _workdirs(parser)
    parser.add_argument(
        '--out', type=Path, default=Path('report'), help='directory; default report'
    )


def _compare_arguments(parser):
    _workdirs(parser)
    _add_json(parser)


def _predict_arguments(parser):
    _add_run(parser)
    parser.add_argument('images', nargs='+', type=Path, help='image files')
    parser.add_argument('--top', type=int, default=5, help='how many classes; default 5')
    _add_json(parser)


def _summary_arguments(parser):
    _add_config(parser)
    _add_json(parser)


def _data_arguments(parser):
    _add_config(parser)
    parser.add_argument(
        '--sheet', type=Path, default=Path('samples.png'), help='the picture to write'
    )
    parser.add_argument(
        '--samples', type=int, default=32, help='how many images are on it; default 32'
    )
    _add_json(parser)


def _few_shot_arguments(parser):
    _add_run(parser)
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 5, 10, 25], help='a class')
    parser.add_argument('--seeds', type=int, default=5, help='draws of examples; default 5')
    _add_json(parser)


def _export_arguments(parser):
    _add_run(parser)
    parser.add_argument('file', type=Path, help='to write, such as model.safetensors')
    parser.add_argument(
        '--names', default='jaxcls', help="'jaxcls' (default), 'timm' or 'torchvision'"
    )
    _add_json(parser)


def _verify_arguments(parser):
    parser.add_argument('workdir', type=Path, nargs='?', help='the directory of a run')
    _add_config(parser, 'with --resume, instead of a run: the config to try; default: the digits')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='kill a short run of the config twice, and compare it bit for bit with one left alone',
    )
    _add_json(parser)


def _models_arguments(parser):
    parser.add_argument('pattern', nargs='?', default='*', help="such as 'resnet*'; default: all")
    _add_json(parser)


def _start():
    """Before the first use of a device: one cache of compiled programs for all runs."""
    import logging

    import jax

    from jaxcls import sharding

    for name in ('absl', 'asyncio'):  # Orbax logs what it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.formatwarning = warning_line
    sharding.start_processes()
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get('JAXCLS_CACHE') or Path.home() / '.cache' / 'jaxcls'
        jax.config.update('jax_compilation_cache_dir', str(Path(cache) / 'programs'))


def _load_config(args, more=()):
    """The config of --config and its fields on the command line, and `more` overrides."""
    from jaxcls import config as config_lib
    from jaxcls import experiment

    config = config_lib.load_file(args.config) if args.config else config_lib.get_config()
    config_lib.apply_overrides(config, [*args.overrides, *more], experiment.TABLES)
    return experiment.resolve(config)


def _print_json(value):
    text = json.dumps(_json_numbers(value), allow_nan=False)
    print(text.replace('\x7f', '\\u007f'))  # the one control character that JSON leaves as it is


def _print(args, value, text):
    """A result as `text` makes it, or with --json as it is."""
    if args.json:
        _print_json(value)
    else:
        say(text(value))


def _json_numbers(value):
    """null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_train(args) -> int:
    import jax
    from rich.console import Console

    from jaxcls import console, sweep
    from jaxcls.report import page

    config = _load_config(args)
    _start()
    directory = args.workdir or Path('runs') / (
        Path(args.config).stem if args.config else 'lenet_digits'
    )
    out = Console()
    reporter = console.Reporter(out)
    try:
        outcome = sweep.fit_seeds(config, directory, reporter)
    finally:
        reporter.close()
    if jax.process_index():
        return 0
    if outcome.stopped in sweep.SIGNALS:
        return _stopped(outcome.stopped)
    diverged = _print_diverged([outcome])
    if config.seeds == 1 and outcome.group.members[0].result:
        out.print(console.result_table(outcome.group.members[0]))
    elif config.seeds > 1:
        say(page.text(sweep.seeds_table(outcome)))
    return 2 if diverged else 0


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


def _run_sweep(args) -> int:
    from rich.console import Console

    from jaxcls import console, sweep
    from jaxcls.report import page

    if not (args.grid or args.setting):
        raise UserError(
            'A sweep needs settings: --grid learning_rate=0.1,0.01 or --setting "FIELD=VALUE ...".'
        )
    load = functools.partial(_load_config, args)
    settings = sweep.settings(load, args.grid, args.setting)
    directory = args.workdir or Path('runs') / f'sweep-{Path(args.config or "lenet_digits").stem}'
    if args.list:
        rows = [
            {'member': i, 'setting': name, 'seed': config.seed}
            for i, (name, config) in enumerate(sweep.members(settings))
        ]
        lines = [f'{row["member"]:>4}  {row["setting"]}, seed {row["seed"]}' for row in rows]
        _print(args, rows, lambda _: '\n'.join(lines))
        return 0
    if args.member is not None and args.rungs > 1:
        raise UserError('--member trains one run alone, and --rungs compares all; leave one out.')
    _start()
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
    _print(args, section, page.text)
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
        _print_json(member.result)
    return 2 if _print_diverged([outcome]) else 0


def _run_study(args) -> int:
    from rich.console import Console
    from rich.text import Text

    from jaxcls import config, console, experiment, study
    from jaxcls.report import page

    _start()
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


def _run_lr_find(args) -> int:
    config = _load_config(args)
    _start()
    from jaxcls import lr_find, pictures

    pictures.check_place(args.picture, '--picture')
    result = lr_find.lr_find(config, low=args.low, high=args.high, steps=args.steps)
    lr_find.write(result, args.picture)
    _print(args, result, lambda result: f'{lr_find.text(result)}\npicture: {args.picture}')
    return 0


def _run_report(args) -> int:
    _start()
    from jaxcls.report import runs

    say(runs.write(args.workdirs, args.out))
    return 0


def _run_compare(args) -> int:
    _start()
    from jaxcls.report import compare

    groups = compare.read(args.workdirs)
    _print(args, compare.as_json(groups), lambda _: compare.text(groups))
    return 0


def _run_evaluate(args) -> int:
    if args.workdir and (args.config or args.overrides):
        raise UserError(
            f'{args.workdir} has its own config: leave out --config, or the directory of the run.'
        )
    if not args.workdir and args.checkpoint != 'latest':
        raise UserError(f'--checkpoint={args.checkpoint} is of a run; give its directory.')
    config = None if args.workdir else _load_config(args)
    _start()
    from jaxcls import evaluation, runs

    if args.workdir:
        result = evaluation.evaluate(args.workdir, args.split, args.checkpoint, args.tta)
    else:
        result = evaluation.evaluate_run(
            runs.open_weights(config, args.split), args.split, args.tta
        )
    if args.json:
        _print_json(result)
        return 0
    if 'members' in result:
        _print_seeds(args.workdir, result)
        return 0
    low, high = result['top1_interval']
    name = args.workdir or config.model.init_from
    say(
        f'{name}, step {result["step"]}, {result["split"]}: {result["examples"]:,.0f} examples\n'
        f'accuracy {result["top1"]:.2%} (95% interval {low:.2%} to {high:.2%}), '
        f'top-5 {result["top5"]:.2%}, loss {result["loss"]:.4f}\n'
        f'balanced accuracy {result["balanced_accuracy"]:.2%}, macro F1 {result["f1_macro"]:.4f}, '
        f'mean IoU {result["iou_mean"]:.4f}, kappa {result["kappa"]:.4f}, '
        f'Matthews {result["matthews"]:.4f}\n'
        f'ROC-AUC {_number(result["roc_auc_macro"])}, '
        f'average precision {_number(result["average_precision_macro"])} (one against the rest)\n'
        f'log loss {result["log_loss"]:.4f}, Brier {result["brier"]:.4f}, ECE {result["ece"]:.4f}; '
        f'after temperature scaling ({_number(result["temperature"])}): '
        f'{_number(result["log_loss_calibrated"])}, {_number(result["brier_calibrated"])}, '
        f'{_number(result["ece_calibrated"])}'
    )
    return 0


def _print_seeds(workdir: Path, result):
    seeds = f'{len(result["members"])} of {result["seeds"]} seeds'
    say(f'{workdir}, {seeds}, {result["split"]}: mean +- 95% interval')
    for key in ('top1', 'top5', 'log_loss', 'f1_macro', 'iou_mean', 'roc_auc_macro', 'ece'):
        if found := result['mean'].get(key):
            half = '' if found['half_width'] is None else f' +- {found["half_width"]:.4f}'
            say(f'  {key:<14} {found["mean"]:.4f}{half}')


def _number(value) -> str:
    return 'undefined' if value is None else f'{value:.4f}'


def _run_predict(args) -> int:
    if args.top < 1:
        raise UserError(f'--top is {args.top}; it must be at least 1.')
    _start()
    from jaxcls import serve

    results = serve.predict(args.workdir, args.images, args.top, args.checkpoint)
    if args.json:
        _print_json({'images': results})
        return 0
    for result in results:
        say(result['image'])
        for guess in result['predictions']:
            say(f'  {guess["probability"]:7.2%}  {guess["class"]}')
    return 0


def _run_summary(args) -> int:
    config = _load_config(args)
    _start()
    from jaxcls import inspection

    summary = inspection.summarize(config)
    _print(args, summary, inspection.summary_text)
    return 0


def _run_data(args) -> int:
    if args.samples < 1:
        raise UserError(f'--samples is {args.samples}; it must be at least 1.')
    config = _load_config(args)
    _start()
    from jaxcls import inspection, pictures

    pictures.check_place(args.sheet, '--sheet')
    description = inspection.describe_data(config, args.sheet, args.samples)
    _print(args, description, inspection.data_text)
    return 0


def _run_few_shot(args) -> int:
    _start()
    from jaxcls import transfer

    result = transfer.few_shot(
        args.workdir, args.shots, args.seeds, args.overrides, args.checkpoint
    )
    if args.json:
        _print_json(result)
        return 0
    say(f'{args.workdir} on {result["data"]}, {len(result["classes"])} classes: ridge regression')
    for row in result['shots']:
        spread = '' if row['half_width'] is None else f' +- {row["half_width"]:.2%} (95%)'
        say(f'  {row["per_class"]:>6} examples a class: accuracy {row["top1"]:.2%}{spread}')
    return 0


def _run_export(args) -> int:
    _start()
    from jaxcls import transfer

    result = transfer.export_weights(args.workdir, args.file, args.names, args.checkpoint)
    _print(
        args,
        result,
        lambda result: (
            f'{result["path"]}: {result["arrays"]} arrays of {result["model"]}, '
            f'{result["parameters"]:,} parameters, in the names of {result["scheme"]}'
        ),
    )
    return 0


def _run_verify(args) -> int:
    if bool(args.workdir) == args.resume or (args.workdir and (args.config or args.overrides)):
        raise UserError(
            'Give the directory of a run, to check its checkpoints; or --resume with a --config, to try '
            'on this machine whether its runs resume.'
        )
    if args.resume:
        _verify_resuming(args)
    else:
        _verify_checkpoints(args)
    return 0


def _verify_checkpoints(args):
    _start()
    from jaxcls import verify

    rows = verify.verify(args.workdir)
    _print(args, rows, lambda rows: '\n'.join(map(_verified, rows)))
    problems = [row for row in rows if row['problem']]
    if problems:
        raise UserError(
            f'{len(problems)} of {len(rows)} checkpoints are damaged. Training goes on from the newest '
            'that is intact; repeat its `jaxcls train`.'
        )


def _verify_resuming(args):
    config = _load_config(args)
    _start()
    from jaxcls import verify

    with tempfile.TemporaryDirectory(prefix='jaxcls-verify-') as directory:
        found = verify.resumes(config, Path(directory))
    if found['differs']:
        raise UserError(
            f'The resumed run differs: {", ".join(found["differs"][:5])}. On a GPU, set '
            'XLA_FLAGS=--xla_gpu_deterministic_ops=true; elsewhere that is a bug: please report it.'
        )
    killed = ' and '.join(map(str, found['killed']))
    text = (
        f'{found["steps"]} steps of {config.model.name} on {config.data.name}, killed after step {killed}, '
        f'against a run left alone: the log and {found["arrays"]} arrays are the same, bit for bit'
    )
    _print(args, found, lambda _: text)


def _verified(row) -> str:
    state = f'damaged: {row["problem"]}' if row['problem'] else f'intact, {row["arrays"]} arrays'
    return f'{row["workdir"]}  step {row["step"]:>6,}  {state}'


def _run_models(args) -> int:
    from jaxcls import inspection

    rows = inspection.describe_models(args.pattern)
    if args.json:
        _print_json({'models': list(rows)})
        return 0
    for i, row in enumerate(rows):
        header = '' if i else f'{inspection.MODELS_HEADER}\n'
        say(header + inspection.model_line(row))
    return 0


COMMANDS = {
    'train': (_train_arguments, _run_train, 'train a config, or go on with a run'),
    'sweep': (_sweep_arguments, _run_sweep, 'train a grid or a list of settings'),
    'study': (_study_arguments, _run_study, 'answer a question of experiments/studies'),
    'lr-find': (_lr_find_arguments, _run_lr_find, 'a learning-rate range test'),
    'report': (_report_arguments, _run_report, 'one HTML page about runs'),
    'compare': (
        _compare_arguments,
        _run_compare,
        'runs side by side, with tests of the difference',
    ),
    'evaluate': (_evaluate_arguments, _run_evaluate, 'metrics of a run on a split'),
    'predict': (_predict_arguments, _run_predict, 'the most probable classes of image files'),
    'summary': (
        _summary_arguments,
        _run_summary,
        'layers, parameters, FLOPs and memory of a config',
    ),
    'models': (
        _models_arguments,
        _run_models,
        'the networks: size, FLOPs, published accuracy, paper',
    ),
    'few-shot': (
        _few_shot_arguments,
        _run_few_shot,
        "accuracy of a linear classifier on a run's features",
    ),
    'verify': (
        _verify_arguments,
        _run_verify,
        "whether a run's checkpoints are intact, and a config's runs resume exactly",
    ),
    'export-weights': (_export_arguments, _run_export, "a run's weights as safetensors"),
    'data': (_data_arguments, _run_data, 'what a data set holds, and a sheet of augmented samples'),
}
