"""(f) Time to accuracy: the same recipe by us and by a PyTorch loop.

    python experiments/benchmarks/accuracy.py [lenet5 resnet20] [--pairs=3] [--out=accuracy.json]

LeNet-5 to 98.5% of MNIST's test split, ResNet-20 to 70% of CIFAR-10's, or to --target: SGD with momentum
and a cosine, both validated as often. In turn; seconds from when the splits are read until the
accuracy is first seen: compilation and evaluation count. Each pair has its own seed.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time

import pairs
import program

EPOCHS = {'lenet5': 2.0, 'resnet20': 6.0}
EVERY = {'lenet5': 0.25, 'resnet20': 0.5}
TARGET = {'lenet5': 0.985, 'resnet20': 0.7}


def ours(name: str, seed: int, target: float) -> float:
    """`fit`, until a validation reaches the target."""
    from ml_collections import ConfigDict

    from jaxcls import fit

    class Reached(Exception):
        pass

    begin = time.perf_counter()

    def look(event):
        nonlocal begin
        if event['kind'] == 'start':  # the splits are read, the state is there, nothing is compiled
            begin = time.perf_counter()
        if event['kind'] == 'validation' and event['top1'] >= target:
            raise Reached

    config = ConfigDict(program.config_of(name).to_dict())
    config.epochs, config.seed, config.learning_rate = EPOCHS[name], seed, 0.05
    config.validate_every_epochs, config.log_every_steps = EVERY[name], 1000
    config.checkpoint_every_epochs = EPOCHS[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(config, folder, look)
        except Reached:
            return time.perf_counter() - begin
    return float('nan')


def theirs(name: str, seed: int, target: float) -> float:
    """The PyTorch loop of program.py, with the same schedule and validations."""
    import peers
    import torch

    from jaxcls import experiment, pipeline

    torch.manual_seed(seed)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    loader, images = program.torch_batches(name)
    test = experiment.open_data(program.config_of(name)).validation
    x, y = (torch.tensor(a) for a in pipeline.load_arrays(pipeline.Reader(test)))
    x = ((x.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25).to(device)
    begin = time.perf_counter()
    model = getattr(peers, name)().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    total = round(EPOCHS[name] * images / 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    every = round(EVERY[name] * images / 128)
    for step, (batch, label) in enumerate(itertools.islice(pairs.forever(loader), total), 1):
        batch = batch.to(device, memory_format=torch.channels_last)
        peers.train_step(model, optimizer, batch, label.to(device))
        schedule.step()
        if step % every == 0 or step == total:
            model.eval()
            with torch.inference_mode():
                found = torch.cat([model(part).argmax(1).cpu() for part in x.split(500)])
            model.train()
            if (found == y).float().mean() >= target:
                return time.perf_counter() - begin
    return float('nan')


def main():
    """Times the pairs and prints, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('networks', nargs='*', type=pairs.one_of(EPOCHS), default=['lenet5'])
    parser.add_argument('--pairs', type=pairs.at_least_1, default=3)
    parser.add_argument('--target', type=pairs.share, default=None)
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--worker', default='')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.worker:
        [name] = args.networks
        out = os.fdopen(os.dup(1), 'w')
        os.dup2(2, 1)
        side = {'ours': ours, 'torch': theirs}[args.worker]
        with pairs.refusals():
            print(side(name, args.seed, args.target or TARGET[name]), file=out)
        return
    rows = []
    for name in args.networks:
        times = {'ours': [], 'torch': []}
        for seed in range(args.pairs):
            for side, found in times.items():
                command = [__file__, name, '--worker', side, '--seed', str(seed)]
                if args.target:
                    command += ['--target', str(args.target)]
                found.append(float(pairs.last_line(command, side)))
        rows.append({'network': name, **times, 'ratio': pairs.ratio(*times.values())})
        medians = '  '.join(
            f'{side} {statistics.median(found):.1f} s' for side, found in times.items()
        )
        print(f'{name:<10}{medians}  ratio {pairs.show_ratio(rows[-1])}'.rstrip(), flush=True)
    if args.out:
        args.out.write_text(json.dumps({'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
