"""(b) The whole program, data included, against a loop over PyTorch's DataLoader or tf.data, interleaved.

    python experiments/benchmarks/program.py [lenet5 resnet20 ...] [--rounds=7] [--out=program.json]

MNIST for LeNet-5 and CIFAR-10 (shifted by up to 4 pixels and mirrored) for the others, as TFDS has them.
All have the split's bytes in memory, and the same network, batch, optimiser and augmentation: ours as `fit`
runs it; torch: a data set of tensors with torchvision's transforms and two DataLoader workers; tf.data:
the plain Flax loop of most tutorials (left out where TensorFlow is not installed). It runs our own step, so
what it shows is the data path alone. A line gives images/s, and our time over that of each with its spread.
"""

import argparse
import functools
import importlib.util
import json

import pairs

CASES = {
    'lenet5': ('mnist', 128, {}),
    'resnet20': ('cifar10', 128, {}),
    'resnet18': ('cifar10', 128, {'stem': 'small'}),
    'wrn16_4': ('cifar10', 128, {}),
}
STEPS = {'lenet5': 200, 'resnet20': 20, 'resnet18': 4, 'wrn16_4': 5}  # in a round on CPU


def config_of(name: str, augment: bool = True):
    """Our config of a case."""
    from jaxcls import config as config_lib
    from jaxcls import experiment, study

    data, batch_size, fields = CASES[name]
    config = config_lib.get_config()
    config.model = {'name': name, **fields}
    config.optimizer = {'name': 'sgd'}
    config.l2, config.batch_size = 5e-4, batch_size
    config.augment = study.CROP_AND_FLIP if augment and data == 'cifar10' else []
    config.data.update(name=f'tfds:{data}', train='train', mean=(0.5,), std=(0.25,))
    if data == 'cifar10':
        config.data.update(mean=(0.5,) * 3, std=(0.25,) * 3)
    return experiment.resolve(config)


def steps_of(name: str, accelerator: bool) -> int:
    """Steps of a round."""
    return STEPS[name] * (20 if accelerator else 1)


def ours(name: str):
    """Steps as `fit` runs them."""
    import jax

    from jaxcls import experiment as experiment_lib
    from jaxcls import loop, pipeline, sharding

    config, mesh = config_of(name), sharding.make_mesh()
    steps = steps_of(name, jax.default_backend() != 'cpu')
    reader, _, data = experiment_lib.open_data(config)
    experiment = experiment_lib.build_for(config, data)
    like = experiment_lib.abstract_checkpoint(experiment, mesh)
    order = functools.partial(
        pipeline.training_order, config.seed, experiment.examples, config.batch_size
    )
    feed = experiment_lib.make_feed(config, reader, order, mesh, 10**6, train=True)
    per_call = loop.Events.of(experiment, feed).steps_per_call
    clock = loop.Clock([])
    advance = loop.make_advance(experiment.train_step, feed, like, clock, lambda event: None)
    tree = experiment_lib.initial_state(experiment, like[0]), loop.make_zeros(like[1])()
    at = 0

    def run():
        nonlocal tree, at
        until = at + steps
        while at < until:
            count = per_call if until - at >= per_call else 1
            tree = advance(at, count, *tree)
            at += count
        jax.block_until_ready(tree)

    run()
    return run, {'units': steps * config.batch_size, 'device': jax.devices()[0].device_kind}


def arrays(name: str):
    """uint8 images [N, H, W, C] and int32 labels of the training split."""
    from jaxcls import experiment, pipeline

    return pipeline.load_arrays(experiment.open_data(config_of(name)).reader)


def torch_batches(name: str):
    """A DataLoader over a split in memory, with two workers, and the number of its images."""
    import torch
    from torchvision.transforms import v2

    data, batch_size, _ = CASES[name]
    changes = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if data == 'cifar10' else []
    channels = 3 if data == 'cifar10' else 1
    scale = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * channels, [0.25] * channels),
    ]
    transform = v2.Compose(changes + scale)
    images, labels = (torch.tensor(x) for x in arrays(name))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, i):
            return transform(images[i].permute(2, 0, 1)), int(labels[i])

    loader = torch.utils.data.DataLoader(
        Images(), batch_size, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True
    )
    return loader, len(labels)


def torch_loop(name: str):
    """A PyTorch loop over a DataLoader."""
    import peers
    import torch

    cuda = torch.cuda.is_available()
    device, steps, (loader, _) = (
        'cuda' if cuda else 'cpu',
        steps_of(name, cuda),
        torch_batches(name),
    )
    model = getattr(peers, name)().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = pairs.forever(loader)

    def run():
        for _ in range(steps):
            x, y = next(batches)
            x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            loss = peers.train_step(model, optimizer, x, y.to(device))
        float(loss)

    run()
    return run, {'units': steps * loader.batch_size}


def flax_loop(name: str):
    """The Flax loop of most tutorials, of our step: jitted alone, over host batches of tf.data."""
    import jax
    import tensorflow as tf

    from jaxcls import experiment as experiment_lib

    config, (images, labels) = config_of(name, augment=False), arrays(name)
    experiment = experiment_lib.build(config, images.shape[1:], 10, len(images))

    def change(image, label):
        if CASES[name][0] == 'cifar10':
            image = tf.image.random_crop(tf.pad(image, [[4, 4], [4, 4], [0, 0]]), images.shape[1:])
            image = tf.image.random_flip_left_right(image)
        return image, label

    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(10_000)
    data = data.map(change, tf.data.AUTOTUNE).batch(config.batch_size, drop_remainder=True)
    batches = data.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    steps = steps_of(name, jax.default_backend() != 'cpu')
    state = experiment_lib.init(experiment, 0)
    train_step = jax.jit(experiment.train_step, donate_argnums=0)

    def run():
        nonlocal state
        for _ in range(steps):
            image, label = next(batches)
            rows = {'label': label, 'index': label, 'epoch': label * 0, 'mask': label >= 0}
            state, sums = train_step(state, {'image': image, **rows})
        jax.block_until_ready((state, sums))

    run()
    return run, {'units': steps * config.batch_size}


SIDES = {'ours': ours, 'torch': torch_loop, 'tf.data': flax_loop}


def main():
    """Times the loops and prints, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('networks', nargs='*', type=pairs.one_of(CASES), default=list(CASES))
    parser.add_argument('--rounds', type=pairs.at_least_1, default=7)
    parser.add_argument('--sides', type=pairs.some_of(SIDES), default=list(SIDES))
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--worker', default='')
    args = parser.parse_args()
    if args.worker:
        [name] = args.networks
        pairs.serve(lambda: SIDES[args.worker](name))
        return
    sides, rows = list(args.sides), []
    if 'tf.data' in sides and not importlib.util.find_spec('tensorflow'):
        print('TensorFlow is not installed: the loop over tf.data is left out.')
        sides.remove('tf.data')
    others = [side for side in sides if side != 'ours'] if 'ours' in sides else []
    heads = ''.join(f'{f"over {side}":<23}' for side in others)
    print(
        f'{"network":<13}'
        + ''.join(f'{side:>9}' for side in sides)
        + f'  images/s  {heads}'.rstrip()
    )
    for name in args.networks:
        commands = {side: [__file__, name, '--worker', side] for side in sides}
        row = {'network': name, **pairs.summary(pairs.interleave(commands, args.rounds))}
        for side in others:
            row[side]['ratio'] = pairs.ratio(row['ours']['seconds'], row[side]['seconds'])
        rows.append(row)
        cells = ''.join(f'{1 / row[side]["median"]:>9,.0f}' for side in sides)
        ratios = ''.join(pairs.show_ratio(row[side]) for side in others)
        print(f'{name:<13}{cells}            {ratios}'.rstrip(), flush=True)
    if args.out:
        args.out.write_text(json.dumps({'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
