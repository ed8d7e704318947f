"""The command line: `python -m jaxcls.main [COMMAND] ...`, also installed as `jaxcls`.

Exit status: 0 done, 2 a mistake to mend, 130 stopped by Ctrl-C, 143 by SIGTERM (both after saving).
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

from jaxcls.errors import UserError

_TRAIN_HELP = """\
examples:
  jaxcls                                              the digits, in a minute on a laptop
  jaxcls --config=experiments/resnet_cifar.py         an experiment
  jaxcls --config=experiments/lenet_mnist.py --config.epochs=5 --config.model.activation=relu

Any field of the config can be set as --config.FIELD=VALUE. Another name for a section (model,
optimizer, schedule, loss) starts it from the defaults of what it names. The same command goes on
with a run that was stopped.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f'jaxcls: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('jaxcls: stopped.', file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    argv, overrides = _split_overrides(argv)
    if not argv or (argv[0] not in _COMMANDS and argv[0] not in ('-h', '--help')):
        argv = ['train', *argv]
    parser = argparse.ArgumentParser(
        prog='jaxcls',
        description='Image classification in JAX.',
        epilog='Without a command: train. `jaxcls train --help` shows how to set a config.',
    )
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for name, (add_arguments, run, description) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=_TRAIN_HELP if name == 'train' else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
        command.set_defaults(run=run, command=name)
    args = parser.parse_args(argv)
    args.overrides = overrides
    if overrides and not hasattr(args, 'config') and args.command != 'few-shot':
        parser.error(f'{args.command} does not take --config fields; leave out {overrides[0][0]!r}')
    return args


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of the arguments."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith('--config.'):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix('--config.').partition('=')
        overrides.append((path, value if equals else next(words, '')))
    return rest, overrides


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


def _models_arguments(parser):
    parser.add_argument('pattern', nargs='?', default='*', help="such as 'resnet*'; default: all")
    _add_json(parser)


def _start():
    """Before the first use of a device: one cache of compiled programs for all runs."""
    import logging

    import jax

    from jaxcls import sharding

    logging.getLogger('absl').setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_args, **_kwargs: f'jaxcls: {message}\n'
    sharding.start_processes()
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get('JAXCLS_CACHE') or Path.home() / '.cache' / 'jaxcls'
        jax.config.update('jax_compilation_cache_dir', str(Path(cache) / 'programs'))


def _load_config(args):
    from jaxcls import config as config_lib
    from jaxcls import experiment

    config = config_lib.load_file(args.config) if args.config else config_lib.get_config()
    config_lib.apply_overrides(config, args.overrides, experiment.TABLES)
    return experiment.resolve(config)


def _print_json(value):
    print(json.dumps(_json_numbers(value), allow_nan=False))


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

    from jaxcls import console, train, workdir

    config = _load_config(args)
    _start()
    directory = args.workdir or Path('runs') / (
        Path(args.config).stem if args.config else 'lenet_digits'
    )
    out = Console()
    reporter = console.Reporter(out)
    try:
        result = train.fit(config, directory, reporter)
    finally:
        reporter.close()
    if jax.process_index():
        return 0
    if result.stopped in ('SIGINT', 'SIGTERM'):
        reporter.print(f'Stopped by {result.stopped}; all steps are saved. To go on, run:')
        program = 'jaxcls' if Path(sys.argv[0]).stem == 'jaxcls' else 'python -m jaxcls.main'
        reporter.print(f'  {program} {shlex.join(sys.argv[1:])}')
        return 128 + signal.Signals[result.stopped]
    out.print(console.result_table(result, workdir.read_json(directory / 'result.json')))
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
        run = runs.open_run(args.workdir, args.checkpoint)
    else:
        run = runs.open_weights(config, args.split)
    result = evaluation.evaluate_run(run, args.split)
    if args.json:
        _print_json(result)
        return 0
    low, high = result['top1_interval']
    name = args.workdir or config.model.init_from
    print(
        f'{name}, step {result["step"]}, {result["split"]}: {result["examples"]:,.0f} examples\n'
        f'accuracy {result["top1"]:.2%} (95% interval {low:.2%} to {high:.2%}), '
        f'top-5 {result["top5"]:.2%}, loss {result["loss"]:.4f}\n'
        f'balanced accuracy {result["balanced_accuracy"]:.2%}, macro F1 {result["f1_macro"]:.4f}, '
        f'mean IoU {result["iou_mean"]:.4f}'
    )
    return 0


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
        print(result['image'])
        for guess in result['predictions']:
            print(f'  {guess["probability"]:7.2%}  {guess["class"]}')
    return 0


def _run_summary(args) -> int:
    config = _load_config(args)
    _start()
    from jaxcls import inspection

    summary = inspection.summarize(config)
    if args.json:
        _print_json(summary)
    else:
        print(inspection.summary_text(summary))
    return 0


def _run_data(args) -> int:
    if args.samples < 1:
        raise UserError(f'--samples is {args.samples}; it must be at least 1.')
    config = _load_config(args)
    _start()
    from jaxcls import inspection

    description = inspection.describe_data(config, args.sheet, args.samples)
    if args.json:
        _print_json(description)
    else:
        print(inspection.data_text(description))
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
    print(f'{args.workdir} on {result["data"]}, {len(result["classes"])} classes: ridge regression')
    for row in result['shots']:
        spread = '' if row['half_width'] is None else f' +- {row["half_width"]:.2%} (95%)'
        print(f'  {row["per_class"]:>6} examples a class: accuracy {row["top1"]:.2%}{spread}')
    return 0


def _run_export(args) -> int:
    _start()
    from jaxcls import transfer

    result = transfer.export_weights(args.workdir, args.file, args.names, args.checkpoint)
    if args.json:
        _print_json(result)
    else:
        print(
            f'{result["path"]}: {result["arrays"]} arrays of {result["model"]}, '
            f'{result["parameters"]:,} parameters, in the names of {result["scheme"]}'
        )
    return 0


def _run_models(args) -> int:
    from jaxcls import inspection

    rows = inspection.describe_models(args.pattern)
    if args.json:
        _print_json({'models': list(rows)})
        return 0
    for i, row in enumerate(rows):
        header = '' if i else f'{inspection.MODELS_HEADER}\n'
        print(header + inspection.model_line(row), flush=True)
    return 0


_COMMANDS = {
    'train': (_train_arguments, _run_train, 'train a config, or go on with a run'),
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
    'export-weights': (_export_arguments, _run_export, "a run's weights as safetensors"),
    'data': (_data_arguments, _run_data, 'what a data set holds, and a sheet of augmented samples'),
}

if __name__ == '__main__':
    sys.exit(main())
