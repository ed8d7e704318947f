"""Which network learns most in a given time: AlexNet, GoogLeNet or a ResNet, all fitted to 32x32?

    python experiments/studies/same_minutes.py [--minutes=10] [--runs=runs/same_minutes]

Trains each on CIFAR-10 for as many epochs as its own speed allows, measured before on a few steps,
and with its schedule over those. Prints test accuracy, parameters, FLOPs of an image, epochs and the
time it took (training alone). One run each: differences of a point say nothing.

Hardware: 2 CPU cores, --minutes=3, CIFAR-10 re-encoded as JPEG (minutes are of training; XLA takes four more
to compile GoogLeNet's step):

    network           accuracy  parameters  MFLOPs  epochs  minutes
    alexnet_cifar       59.80%   1,788,538     149    0.81      3.0
    googlenet_cifar     38.27%     631,382     182    0.17      3.1
    resnet20_cifar      58.96%     269,722      81    0.90      3.0
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

from jaxcls import config as config_lib
from jaxcls import fit, inspection

HERE = Path(__file__).parent.parent
# Experiment -> what it is given of the recipe that all three share.
NETWORKS = {
    'alexnet_cifar': {},
    'googlenet_cifar': {},
    'resnet20_cifar': {
        'optimizer': {'name': 'sgd', 'nesterov': True},
        'schedule': {'name': 'one_cycle'},
        'learning_rate': 0.2,
        'l2': 5e-4,
    },
}
TRIAL_STEPS = 24


def load(name: str, epochs: float, train: str = 'train'):
    config = config_lib.load_file(HERE / f'{name}.py')
    for field, value in NETWORKS[name].items():
        config[field] = value
    config.epochs = epochs
    config.data.train = train
    config.validate_every_epochs = config.checkpoint_every_epochs = epochs
    return config


def run(config, workdir: Path):
    """`fit` to its end; a signal ends the script, and repeating its command goes on."""
    result = fit(config, workdir)
    if result.stopped in ('SIGINT', 'SIGTERM'):
        sys.exit(f'Stopped by {result.stopped}; all steps are saved. Repeat the command to go on.')
    return result


def images_per_second(name: str, runs: Path) -> float:
    """Of the second half of a short run."""
    images = TRIAL_STEPS * 128
    config = load(name, 1.0, f'train[:{images}]')
    config.data.validation = 'test[:128]'
    config.log_every_steps = TRIAL_STEPS // 2
    records = run(config, runs / f'trial-{name}').records
    return [r for r in records if r['kind'] == 'train'][-1]['images_per_second']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--runs', type=Path, default=Path('runs/same_minutes'))
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    print(
        f'{"network":<17}{"accuracy":>9}{"parameters":>12}{"MFLOPs":>8}{"epochs":>8}{"minutes":>9}'
    )
    for name in NETWORKS:
        speed = images_per_second(name, args.runs)
        epochs = round(args.minutes * 60 * speed / 50_000, 2)
        result = run(load(name, epochs), args.runs / name)
        train = [r for r in result.records if r['kind'] == 'train']
        seconds = math.fsum(r['examples'] / r['images_per_second'] for r in train)
        size = inspection.summarize(load(name, epochs))
        print(
            f'{name:<17}{result.metrics["top1"]:>9.2%}{size["parameters"]:>12,}'
            f'{size["flops"] / 1e6:>8.0f}{epochs:>8.2f}{seconds / 60:>9.1f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
