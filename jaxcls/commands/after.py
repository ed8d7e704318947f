"""`jaxcls evaluate`, `report`, `compare`, `few-shot`, `verify` and `export-weights`."""

import signal
import tempfile
from pathlib import Path

from jaxcls.commands import common
from jaxcls.errors import UserError
from jaxcls.terminal import say


def _evaluate_arguments(parser):
    common.add_run(parser, nargs='?')
    common.add_config(parser, 'instead of a run: evaluates the weights of --config.model.init_from')
    parser.add_argument(
        '--split', default='', help="such as 'test'; default: the run's validation split"
    )
    parser.add_argument(
        '--tta',
        default='none',
        help="test-time augmentation: 'flip', 'shift', 'flip_shift', 'flip_diagonal', or how many views: "
        "the image and draws of the run's own augmentation",
    )
    common.add_json(parser)


def _run_evaluate(args) -> int:
    if args.workdir and (args.config or args.overrides):
        raise UserError(
            f'{args.workdir} has its own config: leave out --config, or the directory of the run.'
        )
    if not args.workdir and args.checkpoint != 'latest':
        raise UserError(f'--checkpoint={args.checkpoint} is of a run; give its directory.')
    config = None if args.workdir else common.load_config(args)
    common.start()
    from jaxcls import evaluation, runs

    if args.workdir:
        result = evaluation.evaluate(args.workdir, args.split, args.checkpoint, args.tta)
    else:
        result = evaluation.evaluate_run(
            runs.open_weights(config, args.split), args.split, args.tta
        )
    if args.json:
        common.print_json(result)
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
        f'ROC-AUC {common.number(result["roc_auc_macro"])}, '
        f'average precision {common.number(result["average_precision_macro"])} (one against the rest)\n'
        f'log loss {result["log_loss"]:.4f}, Brier {result["brier"]:.4f}, ECE {result["ece"]:.4f}; '
        f'after temperature scaling ({common.number(result["temperature"])}): '
        f'{common.number(result["log_loss_calibrated"])}, {common.number(result["brier_calibrated"])}, '
        f'{common.number(result["ece_calibrated"])}'
    )
    return 0


def _print_seeds(workdir: Path, result):
    seeds = f'{len(result["members"])} of {result["seeds"]} seeds'
    say(f'{workdir}, {seeds}, {result["split"]}: mean +- 95% interval')
    for key in ('top1', 'top5', 'log_loss', 'f1_macro', 'iou_mean', 'roc_auc_macro', 'ece'):
        if found := result['mean'].get(key):
            half = '' if found['half_width'] is None else f' +- {found["half_width"]:.4f}'
            say(f'  {key:<14} {found["mean"]:.4f}{half}')


def _report_arguments(parser):
    common.add_workdirs(parser)
    parser.add_argument(
        '--out', type=Path, default=Path('report'), help='directory; default report'
    )


def _run_report(args) -> int:
    common.start()
    from jaxcls.report import runs

    say(runs.write(args.workdirs, args.out))
    return 0


def _compare_arguments(parser):
    common.add_workdirs(parser)
    common.add_json(parser)


def _run_compare(args) -> int:
    common.start()
    from jaxcls.report import compare

    groups = compare.read(args.workdirs)
    common.show(args, compare.as_json(groups), lambda _: compare.text(groups))
    return 0


def _few_shot_arguments(parser):
    common.add_run(parser)
    common.take_fields(parser)
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 5, 10, 25], help='a class')
    parser.add_argument('--seeds', type=int, default=5, help='draws of examples; default 5')
    common.add_json(parser)


def _run_few_shot(args) -> int:
    common.start_alone()
    from jaxcls import transfer

    result = transfer.few_shot(
        args.workdir, args.shots, args.seeds, args.overrides, args.checkpoint
    )
    if args.json:
        common.print_json(result)
        return 0
    say(f'{args.workdir} on {result["data"]}, {len(result["classes"])} classes: ridge regression')
    for row in result['shots']:
        spread = '' if row['half_width'] is None else f' +- {row["half_width"]:.2%} (95%)'
        say(f'  {row["per_class"]:>6} examples a class: accuracy {row["top1"]:.2%}{spread}')
    return 0


def _export_arguments(parser):
    common.add_run(parser)
    parser.add_argument('file', type=Path, help='to write, such as model.safetensors')
    parser.add_argument(
        '--names', default='jaxcls', help="'jaxcls' (default), 'timm' or 'torchvision'"
    )
    common.add_json(parser)


def _run_export(args) -> int:
    common.start_alone()
    from jaxcls import transfer

    result = transfer.export_weights(args.workdir, args.file, args.names, args.checkpoint)
    common.show(
        args,
        result,
        lambda result: (
            f'{result["path"]}: {result["arrays"]} arrays of {result["model"]}, '
            f'{result["parameters"]:,} parameters, in the names of {result["scheme"]}'
        ),
    )
    return 0


def _verify_arguments(parser):
    parser.add_argument('workdir', type=Path, nargs='?', help='the directory of a run')
    common.add_config(
        parser, 'with --resume, instead of a run: the config to try; default: the digits'
    )
    parser.add_argument(
        '--resume',
        action='store_true',
        help='kill a short run of the config twice, and compare it bit for bit with one left alone',
    )
    common.add_json(parser)


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
    common.start()
    from jaxcls import verify

    rows = verify.verify(args.workdir)
    common.show(args, rows, lambda rows: '\n'.join(map(_verified, rows)))
    problems = [row for row in rows if row['problem']]
    if problems:
        intact = {row['workdir'] for row in rows if not row['problem']}
        lost = sorted({row['workdir'] for row in problems} - intact)
        advice = 'Training goes on from the newest that is intact; repeat its `jaxcls train`.'
        if lost:
            advice = (
                f'None is intact in {", ".join(lost)}: restore it from a copy, or start anew in another '
                '--workdir.'
            )
        raise UserError(f'{len(problems)} of {len(rows)} checkpoints are damaged. {advice}')


def _verify_resuming(args):
    config = common.load_config(args)
    common.start()
    from jaxcls import verify

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which leaves no directory behind
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
    common.show(args, found, lambda _: text)


def _verified(row) -> str:
    state = f'damaged: {row["problem"]}' if row['problem'] else f'intact, {row["arrays"]} arrays'
    return f'{row["workdir"]}  step {row["step"]:>6,}  {state}'


COMMANDS = {
    'report': (_report_arguments, _run_report, 'one HTML page about runs'),
    'compare': (
        _compare_arguments,
        _run_compare,
        'runs side by side, with tests of the difference',
    ),
    'evaluate': (_evaluate_arguments, _run_evaluate, 'metrics of a run on a split'),
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
}
