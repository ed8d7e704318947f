"""`jaxcls audit`: membership inference."""

from pathlib import Path

from jaxcls.commands import common
from jaxcls.terminal import say


def _audit_arguments(parser):
    common.add_run(parser)
    parser.add_argument(
        '--roc', type=Path, default=None, help='a picture to write, such as roc.png'
    )
    common.add_json(parser)


def _run_audit(args) -> int:
    common.start()
    from jaxcls import membership, pictures

    if args.roc:
        pictures.check_place(args.roc, '--roc')
    found, attacks = membership.audit(args.workdir, args.checkpoint)
    if args.roc:
        membership.picture(found, attacks).savefig(args.roc, dpi=120)
    common.show(args, found, membership.audit_text)
    if args.roc and not args.json:
        say(f'ROC curves: {args.roc}')
    return 0


COMMANDS = {
    'audit': (
        _audit_arguments,
        _run_audit,
        'membership inference: which examples a run was trained on',
    ),
}
