"""(h) The speed run against its authors' script on the same GPU, in turn.

    python experiments/benchmarks/airbench.py PATH/airbench94_muon.py [--rounds=5] [--out=airbench.json]
    python experiments/benchmarks/airbench.py PATH/airbench96_faster.py

The script is one of https://github.com/KellerJordan/cifar10-airbench, as it stands. In the files that
it looks for it finds the CIFAR-10 that we read, re-encoded as JPEG or not. Its seconds are those it counts,
which leave out what it evaluates after each epoch; ours are of a whole run (`speedrun_cifar.py`). Accuracy is
that of six views. Needs a GPU, and minutes: the script tunes its kernels first. With the environment
variables TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=ATEN and TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN
it chooses among those of cuDNN and cuBLAS alone.
"""

import argparse
import ast
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pairs

SPEEDRUN = Path(__file__).parent.parent / 'speedrun_cifar.py'
SIDES = ('ours', 'theirs')


class Script(NamedTuple):
    """One of the authors' scripts.

    Attributes:
      uses: how the definitions begin that are used of it, by which it is known.
      prepare: `module -> (a run, which returns the accuracy)`, to be compiled as the script does.
      seconds: the variable of a run that holds what it took.
    """

    uses: tuple[str, ...]
    prepare: Callable[[Any], Callable[[], float]]
    seconds: str


def _airbench94(module):
    import torch

    model = module.CifarNet().cuda().to(memory_format=torch.channels_last)
    model.compile(mode='max-autotune')
    module.main('warmup', model)
    return lambda: module.main(0, model)


def _airbench96(module):
    import torch

    nets = [module.make_net(module.hyp[name]) for name in ('proxy', 'net', 'net')]
    for net in nets[0], nets[2]:
        net[0].bias.requires_grad = False
    nets = [torch.compile(net, mode='max-autotune') for net in nets]
    return lambda: module.main(0, module.hyp, *nets)


# By the name of our recipe.
SCRIPTS = {
    'airbench94_muon': Script(
        ('class CifarNet', 'def main(run, model)', 'def print_training_details'),
        _airbench94,
        'time_seconds',
    ),
    'airbench96_faster': Script(
        (
            'hyp =',
            'def make_net',
            'def main(run, hyp, model_proxy, model_trainbias, model_freezebias)',
            'def print_training_details',
        ),
        _airbench96,
        'total_time_seconds',
    ),
}


def missing(script: Path) -> dict[str, list[str]]:
    """By the name of our recipe: what its script defines and this one does not."""
    parts = [ast.unparse(part) for part in ast.parse(script.read_text()).body]
    return {
        name: [use for use in known.uses if not any(part.startswith(use) for part in parts)]
        for name, known in SCRIPTS.items()
    }


def recipe_of(script: Path) -> str | None:
    """Which recipe of ours a script is."""
    return next((name for name, lacks in missing(script).items() if not lacks), None)


def ours(name: str):
    """A run of ours, each with the next seed."""
    from jaxcls import config

    speedrun = config.module_of(SPEEDRUN)
    run = speedrun.make_run(speedrun.get_config(name), speedrun.RECIPES[name], 'flip_diagonal')
    seed = 0

    def work():
        nonlocal seed
        seed += 1
        return run(seed)

    return work, run(0)


def write_splits(folder: Path):
    """CIFAR-10 as the script keeps it: uint8 [N, 32, 32, 3] and labels, in `train.pt` and `test.pt`."""
    import torch

    from jaxcls import config, experiment, pipeline

    fields = experiment.resolve(config.load_file(SPEEDRUN))
    training, validation, data = experiment.open_data(fields)
    folder.mkdir()
    for name, reader in (('train', training), ('test', pipeline.Reader(validation))):
        images, labels = (torch.tensor(array) for array in pipeline.load_arrays(reader))
        split = {'images': images, 'labels': labels.long(), 'classes': list(data['class_names'])}
        torch.save(split, folder / f'{name}.pt')


def theirs(script: Path, folder: Path):
    """A run of the script, which keeps what it has compiled."""
    from jaxcls import config

    known = SCRIPTS[recipe_of(script)]
    sys.argv = [str(script)]  # it reads its own text there
    os.chdir(folder)
    module, seconds = config.module_of(script), 0.0
    sys.modules[module.__name__] = module  # where torch.compile looks for it

    def note(values, is_final_entry):
        nonlocal seconds
        seconds = values[known.seconds]

    module.print_training_details = note
    run = known.prepare(module)

    def work():
        top1 = run()
        return {'seconds': seconds, 'top1': top1}

    return work, work()


def tell(side: str, news: dict):
    """A line when a side is ready, and after each of its runs: it may take minutes to the next."""
    ready = (
        f' ready in {news["prepare"]:.0f} s, of which the first run' if 'prepare' in news else ''
    )
    print(f'{side}{ready}: {news["seconds"]:.2f} s, {100 * news["top1"]:.2f}%', flush=True)


def table(rows: dict[str, list[dict]]) -> str:
    """Mean seconds and accuracy of both, with 95% intervals, and the ratio round by round."""
    from jaxcls import intervals

    lines = []
    for side, runs in rows.items():
        seconds, top1 = ([run[key] for run in runs] for key in ('seconds', 'top1'))
        (mean, width), (accuracy, around) = map(intervals.mean_interval, (seconds, top1))
        lines.append(
            f'{side:<8}{mean:.2f} s +- {width:.2f}  {100 * accuracy:.2f}% +- {100 * around:.2f}'
        )
    sides = ([run['seconds'] for run in rows[side]] for side in SIDES)
    lines.append('ratio   {:.2f} ({:.2f} to {:.2f})'.format(*pairs.ratio(*sides)))
    return '\n'.join(lines)


def obstacle(script: Path) -> str:
    """Why it cannot be timed here; '' where it can."""
    if not script.is_file():
        return f'{script} is no file; get {".py or ".join(SCRIPTS)}.py of its authors.'
    try:
        lacks = missing(script)
    except (SyntaxError, UnicodeDecodeError) as error:
        return f'{script} is no Python: {error}'
    if all(lacks.values()):
        reasons = (f'has no {", ".join(uses)}: it is not {name}.py' for name, uses in lacks.items())
        return f'{script} {"; it ".join(reasons)}.'
    if not importlib.util.find_spec('torch'):
        return "PyTorch is not installed: pip install -e '.[bench]'."
    import torch

    return (
        ''
        if torch.cuda.is_available()
        else 'PyTorch sees no GPU here: the script runs on nothing else.'
    )


def main():
    """Times both and prints, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('script', type=Path)
    parser.add_argument('--rounds', type=pairs.at_least_1, default=5)
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--worker', choices=[*SIDES, 'splits'], default=None)
    parser.add_argument('--folder', type=Path, default=None)
    args = parser.parse_args()
    script = args.script.resolve()
    if args.worker == 'splits':
        write_splits(args.folder / 'cifar10')
        print('written')
        return
    if args.worker:
        side = {
            'ours': lambda: ours(recipe_of(script)),
            'theirs': lambda: theirs(script, args.folder),
        }
        pairs.serve(side[args.worker], times=1)
        return
    if why := obstacle(script):
        parser.error(why)
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: [__file__, script, '--worker', name, '--folder', folder]
            for name in (*SIDES, 'splits')
        }
        pairs.last_line(commands.pop('splits'), 'splits')  # a process that gives the GPU back
        found = pairs.interleave(commands, args.rounds, uncounted=0, on_news=tell)
    rows = {side: timing.seconds for side, timing in found.items()}
    print(table(rows))
    if args.out:
        args.out.write_text(
            json.dumps({'recipe': recipe_of(script), 'rows': rows}, indent=1) + '\n'
        )


if __name__ == '__main__':
    main()
