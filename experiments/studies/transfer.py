"""Does it help to start from a network that has seen other classes, and when does it stop helping?

    python experiments/studies/transfer.py [--seeds=3] [--runs=runs/transfer]

Trains a small ResNet on one half of CIFAR-10's classes, then on the other half with 10, 100 and all
(5,000) images a class: from scratch, fine-tuned, and as a linear probe. Prints the accuracy on the
5,000 test images of those classes as mean +- half of the 95% t-interval over seeds, each with its own
source network and its own draw of images, and draws transfer.png. What is done is not done again.

Hardware: 2 CPU cores. Time: 40 minutes beside other work. Measured (3 seeds, CIFAR-10 re-encoded as
JPEG, source networks of 6 epochs):

    images a class                 10               100             5,000
    from scratch       38.05% +- 4.09%    56.63% +- 2.78%    75.69% +- 1.83%
    fine-tuned         54.83% +- 4.79%    66.05% +- 2.62%    76.54% +- 3.03%
    linear probe       54.61% +- 1.68%    59.91% +- 3.54%    62.35% +- 1.85%

So it helps by 17 points at 10 images a class, by 9 at 100, and not measurably with all 25,000; a fixed
network is as good as a fine-tuned one at 10, and 13 points worse than a fresh start in the end.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxcls import config as config_lib
from jaxcls import fit, intervals

HERE = Path(__file__).parent.parent
# Images a class -> epochs and batch size: small sets are seen many times.
SIZES = {10: (100.0, 50), 100: (40.0, 50), 5000: (4.0, 128)}
# How a network starts -> learning rate and fields. Fine-tuning wants a lower rate than a fresh start;
# the rates are common ones and were not searched for.
ARMS = {
    'from scratch': (0.1, {'model.init_from': ''}),
    'fine-tuned': (0.03, {}),
    'linear probe': (0.1, {'freeze': '^(?!head)', 'model.norm': 'frozen_batch'}),
}


def train_source(seed: int, runs: Path):
    config = config_lib.load_file(HERE / 'transfer_source.py')
    config.seed = seed
    run(config, runs / f'source-{seed}')


def target(arm: str, per_class: int, seed: int, runs: Path):
    """The config of one run."""
    learning_rate, fields = ARMS[arm]
    epochs, batch_size = SIZES[per_class]
    config = config_lib.load_file(HERE / 'transfer_target.py')
    config.update_from_flattened_dict(
        {
            'seed': seed,
            'epochs': epochs,
            'batch_size': batch_size,
            'learning_rate': learning_rate,
            'validate_every_epochs': epochs,
            'checkpoint_every_epochs': epochs,
            'data.per_class': per_class,
            'model.init_from': str(runs / f'source-{seed}'),
            'model.norm': 'batch',
            **fields,
        }
    )
    return config


def run(config, workdir: Path):
    """`fit` to its end; a signal ends the script, and repeating its command goes on."""
    result = fit(config, workdir)
    if result.stopped in ('SIGINT', 'SIGTERM'):
        sys.exit(f'Stopped by {result.stopped}; all steps are saved. Repeat the command to go on.')
    return result


def measure(seeds: int, runs: Path) -> dict[str, dict[int, list[float]]]:
    """Accuracies by arm, size of the training set, and seed."""
    found = {arm: {size: [] for size in SIZES} for arm in ARMS}
    for seed in range(seeds):
        train_source(seed, runs)
        for size in SIZES:
            for arm in ARMS:
                name = f'{arm.replace(" ", "-")}-{size}-{seed}'
                value = run(target(arm, size, seed, runs), runs / name).metrics['top1']
                found[arm][size].append(value)
                print(f'seed {seed}, {size:>5} a class, {arm:<13} {value:.2%}', flush=True)
    return found


def table(found) -> str:
    lines = [f'{"images a class":<15}' + ''.join(f'{size:>18,}' for size in SIZES)]
    for arm, values in found.items():
        cells = (intervals.mean_interval(values[size]) for size in SIZES)
        shown = (f'{mean:.2%}' + f' +- {half:.2%}' * math.isfinite(half) for mean, half in cells)
        lines.append(f'{arm:<15}' + ''.join(f'{cell:>18}' for cell in shown))
    return '\n'.join(lines)


def plot(found, path: Path):
    figure = Figure(figsize=(6.5, 4.5), layout='constrained')
    axes = figure.subplots()
    for (arm, values), color in zip(found.items(), ('#888888', '#0b62a4', '#d1702c'), strict=True):
        mean, half = np.array([intervals.mean_interval(values[size]) for size in SIZES]).T
        axes.errorbar(list(SIZES), mean, half, label=arm, color=color, marker='o', capsize=4)
    axes.set(xscale='log', xlabel='training images a class', ylabel='test accuracy')
    axes.set_xticks(list(SIZES), [f'{size:,}' for size in SIZES])
    axes.set_title('Five classes of CIFAR-10 after training on the other five')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--runs', type=Path, default=Path('runs/transfer'))
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    found = measure(args.seeds, args.runs)
    print(table(found))
    plot(found, args.runs / 'transfer.png')
    print(f'picture: {args.runs / "transfer.png"}')


if __name__ == '__main__':
    main()
