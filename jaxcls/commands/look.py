"""`jaxcls summary`, `models` and `data`: before anything is trained."""

from pathlib import Path

from jaxcls.commands import common
from jaxcls.errors import require
from jaxcls.terminal import say


def _summary_arguments(parser):
    common.add_config(parser)
    common.add_json(parser)


def _run_summary(args) -> int:
    config = common.load_config(args)
    common.start()
    from jaxcls import inspection

    summary = inspection.summarize(config)
    common.show(args, summary, inspection.summary_text)
    return 0


def _models_arguments(parser):
    parser.add_argument('pattern', nargs='?', default='*', help="such as 'resnet*'; default: all")
    common.add_json(parser)


def _run_models(args) -> int:
    from jaxcls import inspection

    rows = inspection.describe_models(args.pattern)
    if args.json:
        common.print_json({'models': list(rows)})
        return 0
    for i, row in enumerate(rows):
        header = '' if i else f'{inspection.MODELS_HEADER}\n'
        say(header + inspection.model_line(row))
    return 0


def _data_arguments(parser):
    common.add_config(parser)
    parser.add_argument(
        '--sheet', type=Path, default=Path('samples.png'), help='the picture to write'
    )
    parser.add_argument(
        '--samples', type=int, default=32, help='how many images are on it; default 32'
    )
    common.add_json(parser)


def _run_data(args) -> int:
    require(1 <= args.samples <= 1000, '--samples', args.samples, 'at least 1 and at most 1000')
    config = common.load_config(args)
    common.start()
    from jaxcls import inspection, pictures

    pictures.check_place(args.sheet, '--sheet')
    description = inspection.describe_data(config, args.sheet, args.samples)
    common.show(args, description, inspection.data_text)
    return 0


COMMANDS = {
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
    'data': (_data_arguments, _run_data, 'what a data set holds, and a sheet of augmented samples'),
}
