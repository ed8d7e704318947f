"""`jaxcls predict`, `export` and `serve`."""

import csv
import signal
import sys
from pathlib import Path

from jaxcls import serving
from jaxcls.commands import common
from jaxcls.errors import UserError, require
from jaxcls.terminal import printable, refuse, say


def _predict_arguments(parser):
    common.add_run(parser)
    parser.add_argument('images', nargs='+', help='image files, folders or globs')
    parser.add_argument('--top', type=int, default=5, help='how many classes; default 5')
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument('--csv', action='store_true', help='print CSV: one line an image')
    common.add_json(forms)


def _run_predict(args) -> int:
    require(args.top >= 1, '--top', args.top, 'at least 1')
    common.start()
    from jaxcls import classify, runs

    run = runs.open_run(args.workdir, args.checkpoint)
    classify.check(args.images)
    results = classify.classify(run, classify.find(args.images), args.top)
    if args.json:
        results = list(results)
        common.print_json({'images': results})
        return _status(sum('problem' not in result for result in results))
    show = _print_csv if args.csv else _print_text
    return _status(show(_left_out(results), min(args.top, len(run.class_names))))


def _status(images: int) -> int:
    if not images:
        raise UserError('None of the files is an image. Give the path of an image.')
    return 0


def _left_out(results):
    """The results but for files that are no images, which are named on standard error."""
    for result in results:
        if 'problem' in result:
            refuse(f'left out: {result["problem"]}')
        else:
            yield result


def _print_text(results, _top: int) -> int:
    """Prints results as they come, and returns how many there were."""
    count = 0
    for result in results:
        count += 1
        say(result['image'])
        for guess in result['predictions']:
            say(f'  {guess["probability"]:7.2%}  {guess["class"]}')
    return count


def _print_csv(results, top: int) -> int:
    """As `_print_text`, a line an image: its path, then class and probability of each rank."""
    writer = csv.writer(sys.stdout, lineterminator='\n')
    names = [f'{what}_{i + 1}' for i in range(top) for what in ('class', 'probability')]
    writer.writerow(['image', *names])
    count = 0
    for result in results:
        count += 1
        row = [printable(result['image'])]
        for guess in result['predictions']:
            row += [printable(guess['class']), f'{guess["probability"]:.6f}']
        writer.writerow(row)
    return count


def _export_arguments(parser):
    common.add_run(parser)
    parser.add_argument('file', type=Path, help='to write, such as model.zip or model.onnx')
    parser.add_argument(
        '--format',
        default='stablehlo',
        help="'stablehlo' (default; a .zip, for JAX on CPU, CUDA and TPU), 'onnx' (a .onnx) or 'tflite' "
        '(a .tflite, for LiteRT on phones and small boards)',
    )
    parser.add_argument(
        '--output', default='probabilities', help="'probabilities' (default) or 'logits'"
    )
    parser.add_argument(
        '--images', type=int, default=64, help='of the validation split, to check it on; default 64'
    )
    common.add_json(parser)


def _run_export(args) -> int:
    common.start_alone()
    from jaxcls import export

    result = export.export(
        args.workdir, args.file, args.format, args.output, args.images, args.checkpoint
    )
    common.show(
        args,
        result,
        lambda result: (
            f'{result["path"]}: {result["format"]}, {result["bytes"]:,} bytes; on {result["images"]} '
            f'images its outputs are within {result["max_difference"]:.1g} of the run (relative)'
        ),
    )
    return 0


def _serve_arguments(parser):
    common.add_run(parser)
    parser.add_argument('--host', default='127.0.0.1', help='default 127.0.0.1: this machine alone')
    parser.add_argument('--port', type=int, default=8000, help='default 8000; 0 takes a free one')
    parser.add_argument(
        '--allowed-host',
        action='append',
        default=[],
        metavar='NAME',
        help='that the Host header may name besides localhost; repeat for more',
    )
    defaults = serving.Settings()
    for name, meaning in (
        ('max_batch', 'images that go through the network together'),
        ('queue', 'requests that may wait; more are answered 503'),
        ('max_body', 'bytes of a request'),
        ('max_pixels', 'pixels of an image'),
        ('timeout', 'seconds for headers, and for the body, to come'),
    ):
        default = getattr(defaults, name)
        parser.add_argument(
            f'--{name.replace("_", "-")}',
            type=type(default),
            default=default,
            help=f'{meaning}; default {default}',
        )


def _run_serve(args) -> int:
    settings = serving.Settings(
        args.max_batch,
        queue=args.queue,
        max_body=args.max_body,
        max_pixels=args.max_pixels,
        timeout=args.timeout,
        hosts=tuple(name.lower() for name in args.allowed_host),
    )
    serving.check(settings)
    common.start_alone()
    from jaxcls.serving import server

    def report(address):
        say(f'{args.workdir} is served at {address} (Ctrl-C stops it)')

    name = server.serve(args.workdir, args.host, args.port, settings, args.checkpoint, report)
    return 128 + signal.Signals[name]


COMMANDS = {
    'predict': (_predict_arguments, _run_predict, 'the most probable classes of image files'),
    'export': (_export_arguments, _run_export, 'a run as one file that runs without jaxcls'),
    'serve': (_serve_arguments, _run_serve, 'a local server of a run, with a page'),
}
