"""(h) The speed run against its authors' script on the same GPU, in turn.

    python experiments/benchmarks/airbench.py PATH/airbench94_muon.py [--rounds=5] [--out=airbench.json]

The script is that of https://github.com/KellerJordan/cifar10-airbench, as it stands. In the files that it
looks for it finds the CIFAR-10 that we read, re-encoded as JPEG or not. Its seconds are those it counts,
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
from pathlib import Path

import pairs

SPEEDRUN = Path(__file__).parent.parent / 'speedrun_cifar.py'
RECIPE = 'airbench94_muon'
SIDES = ('ours', 'theirs')
USED = ('class CifarNet', 'def main(run, model)', 'def print_training_details')


def ours():
    """A run of ours, each with the next seed."""
    from jaxcls import config

    speedrun = config.module_of(SPEEDRUN)
    recipe = speedrun.RECIPES[RECIPE]
    run, seed = speedrun.make_run(speedrun.get_config(RECIPE), recipe, 'flip_diagonal'), 0

    def work():
        nonlocal seed
        seed += 1
        return run(seed)

    return work, {}


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
    import torch

    from jaxcls import config

    sys.argv = [str(script)]  # it reads its own text there
    os.chdir(folder)
    reference, found = config.module_of(script), {}
    sys.modules[reference.__name__] = reference  # where torch.compile looks for it
    reference.print_training_details = lambda values, is_final_entry: found.update(values)
    model = reference.CifarNet().cuda().to(memory_format=torch.channels_last)
    model.compile(mode='max-autotune')
    reference.main('warmup', model)

    def work():
        top1 = reference.main(0, model)
        return {'seconds': found['time_seconds'], 'top1': top1}

    return work, {}


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
        return f'{script} is no file; get airbench94_muon.py of its authors.'
    try:
        parts = ast.parse(script.read_text()).body
    except (SyntaxError, UnicodeDecodeError) as error:
        return f'{script} is no Python: {error}'
    names = {ast.unparse(part).splitlines()[0] for part in parts}
    missing = [name for name in USED if not any(line.startswith(name) for line in names)]
    if missing:
        return f'{script} has no {", ".join(missing)}: it is not airbench94_muon.py.'
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
        pairs.serve(ours if args.worker == 'ours' else lambda: theirs(script, args.folder))
        return
    if why := obstacle(script):
        parser.error(why)
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: [__file__, script, '--worker', name, '--folder', folder]
            for name in (*SIDES, 'splits')
        }
        pairs.last_line(commands.pop('splits'), 'splits')  # a process that gives the GPU back
        found = pairs.interleave(commands, args.rounds)
    rows = {side: timing.seconds for side, timing in found.items()}
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps({'recipe': RECIPE, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
