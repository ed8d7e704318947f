"""`jaxcls attack`."""

import fractions
from pathlib import Path

from jaxcls.commands import common
from jaxcls.errors import UserError


def _arguments(parser):
    common.add_run(parser)
    parser.add_argument('--split', default='', help="default: the run's validation split")
    parser.add_argument(
        '--examples', type=int, default=0, help='the first so many of the split; default: all'
    )
    parser.add_argument(
        '--attacks',
        default='fgsm,pgd',
        help="by commas: fgsm, pgd, square; or 'none'; default fgsm,pgd",
    )
    parser.add_argument(
        '--epsilons',
        default='',
        help='by commas, of pixels in [0, 1], such as 4/255,8/255; default: what fits the norm and '
        'grey or coloured images',
    )
    parser.add_argument('--norm', default='linf', help="'linf' (default) or 'l2'")
    parser.add_argument('--steps', type=int, default=40, help='of pgd; default 40')
    parser.add_argument('--restarts', type=int, default=1, help='of pgd; default 1')
    parser.add_argument('--queries', type=int, default=1000, help='of square; default 1000')
    parser.add_argument(
        '--corruptions', default='', help="by commas, such as fog,snow; 'all': the 15 common ones"
    )
    parser.add_argument(
        '--reference', type=Path, help='a run whose errors on corruptions ours are divided by'
    )
    parser.add_argument(
        '--ood',
        default='',
        help="data to tell from the run's: tfds:NAME, folder:PATH, ... or noise",
    )
    parser.add_argument('--seed', type=int, default=0, help='of all that is drawn; default 0')
    parser.add_argument(
        '--picture', type=Path, default=Path('robustness.png'), help='default robustness.png'
    )
    common.add_json(parser)


def _run(args) -> int:
    names = [] if args.attacks == 'none' else _names(args.attacks)
    if not names and not args.corruptions and not args.ood:
        raise UserError('There is nothing to measure: give --attacks, --corruptions or --ood.')
    if args.reference and not args.corruptions:
        raise UserError('--reference is for --corruptions: give both, or leave it out.')
    if not 0 <= args.seed < 2**31:
        raise UserError(f'--seed is {args.seed}; it must be at least 0 and less than 2**31.')
    epsilons = [_number(text) for text in _names(args.epsilons)]
    common.start_alone()
    from jaxcls import corruptions, pictures, robustness, runs

    draws = bool(names or args.corruptions)
    if draws:
        pictures.check_place(args.picture, '--picture')
    attacks = robustness.make_attacks(names, args.norm, args.steps, args.restarts, args.queries)
    kinds = _names(args.corruptions)
    kinds = tuple(corruptions.CORRUPTIONS) if kinds == ['all'] else kinds
    run = runs.open_run(args.workdir, args.checkpoint)
    reference = runs.open_run(args.reference) if args.reference else None
    result = {'workdir': str(args.workdir)}
    if attacks:
        grey = run.experiment.image_shape[2] == 1
        epsilons = epsilons or robustness.EPSILONS[args.norm, grey]
        found = robustness.attack_run(run, attacks, epsilons, args.split, args.examples, args.seed)
        result['attacked'] = {'norm': args.norm, **found}
    if kinds:
        result['corrupted'] = robustness.corruption_accuracy(
            run, kinds, args.split, args.examples, reference, args.seed
        )
    if args.ood:
        result['ood'] = robustness.out_of_distribution(
            run, args.ood, args.split, args.examples, args.seed
        )
    if draws:
        figure = pictures.robustness(result.get('attacked'), result.get('corrupted'))
        figure.savefig(args.picture, dpi=120)
        result['picture'] = str(args.picture)
    common.show(args, result, _text)
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(',') if name.strip()]


def _number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        return float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(
            f'--epsilons has {text!r}; it must be numbers by commas, such as 0.1,0.3 or 4/255,8/255.'
        ) from None


def _text(result) -> str:
    parts = [str(result['workdir'])]
    if 'attacked' in result:
        parts.append(_attacked(result['attacked']))
    if 'corrupted' in result:
        parts.append(_corrupted(result['corrupted']))
    if 'ood' in result:
        parts.append(_ood(result['ood']))
    if 'picture' in result:
        parts.append(result['picture'])
    return '\n'.join(parts)


def _attacked(found) -> str:
    lines = [
        f'{found["split"]}, step {found["step"]}: {found["examples"]:,} examples, {found["norm"]}'
    ]
    rows = [{'attack': 'clean', 'epsilon': 0.0, **found['clean']}, *found['attacks']]
    for row in rows:
        low, high = row['interval']
        lines.append(
            f'  {row["attack"]:<7} epsilon {row["epsilon"]:.4f}  accuracy {row["accuracy"]:7.2%} '
            f'(95% interval {low:.2%} to {high:.2%})'
        )
    return '\n'.join(lines)


def _corrupted(found) -> str:
    lines = [
        f'{found["split"]}: {found["examples"]:,} examples, error {found["clean_error"]:.2%}; '
        f'corrupted, at severity 1 to 5:'
    ]
    for row in found['kinds']:
        errors = ' '.join(f'{error:7.2%}' for error in row['errors'])
        relative = f', {row["relative"]:.1%} of the reference' if 'relative' in row else ''
        lines.append(f'  {row["kind"]:<18} {errors}  mean {row["mean"]:.2%}{relative}')
    relative = f', mCE {found["relative"]:.1%} of the reference' if 'relative' in found else ''
    lines.append(f'  mean corruption error {found["mean_error"]:.2%}{relative}')
    return '\n'.join(lines)


def _ood(found) -> str:
    lines = [
        f'{found["split"]} ({found["examples"]:,} examples) against {found["other"]} '
        f'({found["other_examples"]:,}):'
    ]
    for score in ('max_softmax', 'energy'):
        row = found[score]
        lines.append(f'  {score:<12} AUROC {row["auroc"]:.4f}, FPR at 95% TPR {row["fpr95"]:.2%}')
    return '\n'.join(lines)


COMMANDS = {
    'attack': (
        _arguments,
        _run,
        'accuracy under attack and corruptions, and on strange data',
    )
}
