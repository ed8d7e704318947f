"""`jaxcls explain`."""

from pathlib import Path

from jaxcls.commands import common
from jaxcls.errors import UserError

# What is given of image files, and to measure the methods on a split, with the defaults.
_OF_FILES = {'label': '', 'picture': Path('explain.png')}
_OF_A_SPLIT = {'split': '', 'examples': 50, 'threshold': 0.5}


def _arguments(parser):
    common.add_run(parser)
    parser.add_argument(
        'images', nargs='*', type=Path, help='image files; none: measures the methods on a split'
    )
    parser.add_argument(
        '--methods',
        default='',
        help='by commas: saliency, smooth_grad, integrated_gradients, occlusion, grad_cam, cam; '
        'default: all but cam, which is for networks that end with a mean',
    )
    parser.add_argument('--label', help='the class to explain; default: the predicted')
    parser.add_argument(
        '--feature',
        default='',
        help="of grad_cam and cam, such as 'stage2'; default: the last with a say",
    )
    parser.add_argument('--picture', type=Path, help='of image files; default explain.png')
    parser.add_argument('--split', help="to measure on; default: the run's validation split")
    parser.add_argument('--examples', type=int, help='to measure on; default 50')
    parser.add_argument(
        '--threshold',
        type=float,
        help='share of the maximum of a map from which on its box has it; default 0.5',
    )
    common.add_json(parser)


def _run(args) -> int:
    read, unread = (_OF_FILES, _OF_A_SPLIT) if args.images else (_OF_A_SPLIT, _OF_FILES)
    for name in unread:
        if getattr(args, name) is not None:
            raise UserError(
                f'--{name} is for measuring: leave it out, or the image files.'
                if args.images
                else f'--{name} is of image files: give some, or leave it out.'
            )
    for name, default in read.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    common.start()
    from jaxcls import explain, pictures

    methods = tuple(filter(None, args.methods.split(','))) or explain.DEFAULT
    if not args.images:
        found = explain.measure(
            args.workdir, methods, args.split, args.examples, args.feature, args.checkpoint,
            args.threshold,
        )  # fmt: skip
        common.show(args, found, _measured)
        return 0
    pictures.check_place(args.picture, '--picture')
    rows, figure = explain.explain(
        args.workdir, args.images, methods, args.label, args.feature, args.checkpoint
    )
    figure.savefig(args.picture, dpi=120)
    common.show(args, {'images': rows, 'picture': str(args.picture)}, _explained)
    return 0


def _explained(found) -> str:
    lines = [f'{row["image"]}: {row["class"]} {row["probability"]:.1%}' for row in found['images']]
    gaps = [row['completeness'] for row in found['images'] if row['completeness'] is not None]
    if gaps:
        lines.append(
            f'integrated gradients miss the difference of the logits by {max(gaps):.1%} at most'
        )
    return '\n'.join([*lines, f'picture: {found["picture"]}'])


def _measured(found) -> str:
    lines = [
        f'{found["split"]}, {found["examples"]} images',
        f'{"":<22}{"deletion":>18}{"insertion":>18}{"fresh head":>12}{"all fresh":>12}',
    ]
    for name, row in found['methods'].items():
        areas = ''.join(
            f'{row[key]:>9.3f} +- {row[f"{key}_half"]:.3f}' for key in ('deletion', 'insertion')
        )
        lines.append(f'{name:<22}{areas}{row["head"]:>12.2f}{row["all"]:>12.2f}')
    lines.append(
        'Deletion: less is better; insertion: more is; fresh: rank correlation with the maps of a '
        'network with random weights, near 1 is bad.'
    )
    if 'boxes' in found:
        lines.append(f'{"boxes":<22}{"IoU":>8}{"IoU >= 0.5":>24}{"and class right":>18}')
        lines += [
            f'{name:<22}{row["iou"]:>8.3f}{row["known"]:>10.1%} ({row["known_low"]:.1%} to '
            f'{row["known_high"]:.1%}){row["top1"]:>12.1%}'
            for name, row in found['boxes'].items()
        ]
    return '\n'.join(lines)


COMMANDS = {
    'explain': (_arguments, _run, 'why a run answers as it does: maps of images, and their worth')
}
