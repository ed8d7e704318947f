"""`jaxcls compress`."""

from pathlib import Path

from jaxcls.commands import common
from jaxcls.errors import UserError
from jaxcls.terminal import say


def _arguments(parser):
    common.add_run(parser)
    common.take_fields(parser)
    parser.add_argument(
        '--methods',
        nargs='+',
        help='steps joined by +: channels:SHARE, magnitude:SHARE, low_rank:ENERGY, int8, int8_trained',
    )
    parser.add_argument('--split', default='', help="default: the run's validation split")
    parser.add_argument(
        '--epochs', type=float, default=0.0, help='to train where weights are removed; default 0'
    )
    parser.add_argument(
        '--distill', action='store_true', help='train with the original as the teacher'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('compressed'), help='of those runs; default compressed'
    )
    parser.add_argument('--rounds', type=int, default=15, help='of timing; default 15')
    parser.add_argument(
        '--picture', type=Path, default=Path('compress.png'), help='default compress.png'
    )
    common.add_json(parser)


def _run(args) -> int:
    if not 0 <= args.epochs < 1e6 or args.rounds < 1:
        raise UserError(
            f'--epochs is {args.epochs:g} and --rounds {args.rounds}; give at least 0 and at least 1.'
        )
    if (args.overrides or args.distill) and not args.epochs:
        what = f'--config.{args.overrides[0][0]}' if args.overrides else '--distill'
        raise UserError(f'{what} is of the runs that train: give --epochs as well.')
    common.start_alone()
    from jaxcls import compress, footprint, pictures

    pictures.check_place(args.picture, '--picture')
    tell = (lambda event: None) if args.json else _tell
    result = compress.compress(
        args.workdir,
        args.methods or compress.METHODS,
        args.split,
        args.checkpoint,
        args.epochs,
        args.out,
        args.overrides,
        args.distill,
        args.rounds,
        tell,
    )
    footprint.plot(result).savefig(args.picture, dpi=120)
    result = {**result, 'picture': str(args.picture)}
    common.show(args, result, lambda result: f'{footprint.text(result)}\n{result["picture"]}')
    return 0


def _tell(event):
    if event['kind'] == 'method':
        say(f'making {event["method"]}')
    elif event['kind'] == 'validation':
        say(f'  epoch {event["epoch"]:.2f}: accuracy {event["top1"]:.2%}')
    elif event['kind'] == 'measure':
        say(f'measuring {len(event["methods"])} networks')


COMMANDS = {
    'compress': (_arguments, _run, 'a run made smaller: size, FLOPs, latency, accuracy'),
}
